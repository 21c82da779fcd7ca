# SPDX-License-Identifier: Apache-2.0
"""A Gaussian process over genes and budget: the part of the filter that is strong when labels are few.

Its covariance is additive over slots before one exponential, so that its score, like the networks', is one
lookup per slot, a nonlinearity and a dot product.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["KernelModel", "KernelScorer", "fit_kernel"]

_NUM_GLOBAL = 8
# Log of: variance of the linear part over genes, of the linear budget, of the interactions; length scales of
# genes and budget in the interactions; length scale and variance of the budget's own curve; noise variance.
_PRIOR_MEAN = np.log([1.0, 1.0, 0.5, 3.0, 2.0, 1.0, 0.1, 0.1])
_PRIOR_SD = np.array([2.0, 2.0, 2.0, 0.7, 1.0, 0.7, 2.0, 1.0])
_GROUP_SD = 0.65  # how far a gene's relevance may stray from the common one, in log units
_COLUMN_SD = 0.55  # and a single choice's from its gene's
_JITTER = 1e-6


@dataclass(frozen=True)
class KernelModel:
    """A fitted process.

    Attributes:
        theta: float64 [8 + num_groups + F], logs: the shared hyperparameters, relevance per gene, per choice.
        groups: int64 [F], which gene each feature belongs to.
        features: float64 [n, F] of the labelled paths, centred.
        budget: float64 [n], normalised log MACs; zeros without a budget input.
        alpha: float64 [n], (K + noise)^-1 y.
        held_out: float64 [n], each label as predicted without the labels of its fold.
    """

    theta: Tensor
    groups: Tensor
    features: Tensor
    budget: Tensor
    alpha: Tensor
    held_out: Tensor

    def predict(self, features: Tensor, budget: Tensor) -> Tensor:
        """Mean of the process, the slow and obvious way (`KernelScorer` is the fast one).

        Args:
            features: float64 [m, F], centred as the labelled paths' were.
            budget: float64 [m].

        Returns:
            float64 [m].
        """
        covariance = _covariance(self.theta, self.groups, features, budget, self.features, self.budget)
        return covariance @ self.alpha

    def covariance(self, features: Tensor, budget: Tensor, features_2: Tensor, budget_2: Tensor) -> Tensor:
        """Prior covariance of two sets of paths, float64 [m, m_2]; arguments as `predict`."""
        return _covariance(self.theta, self.groups, features, budget, features_2, budget_2)

    def noise(self) -> float:
        """Variance of a label's noise, in units of the labels' variance."""
        return float(torch.exp(self.theta[7]))

    def posterior(self, features: Tensor, budget: Tensor) -> tuple[Tensor, Tensor]:
        """What the labels leave open.

        Args:
            features: float64 [m, F], centred as the labelled paths' were.
            budget: float64 [m].

        Returns:
            (variance float64 [m], whitened covariance with the labelled paths [n, m]: the posterior
            covariance is the prior's less the Gram matrix of its columns). Noise is taken as equal for all
            labels.
        """
        gram = self.covariance(self.features, self.budget, self.features, self.budget)
        gram.diagonal().add_(self.noise() + _JITTER)
        cross = self.covariance(self.features, self.budget, features, budget)
        shared = torch.linalg.solve_triangular(torch.linalg.cholesky(gram), cross, upper=False)
        prior = torch.cat(
            [
                self.covariance(x, z, x, z).diagonal()
                for x, z in zip(features.split(256), budget.split(256), strict=True)
            ]
        )
        return prior - (shared**2).sum(0), shared

    def state(self) -> dict[str, Tensor]:
        """The fields as a dict of tensors; `KernelModel(**state)` is the way back."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}

    def column_scale(self) -> Tensor:
        """What a feature is multiplied by before distances are taken, [F]."""
        gene = torch.exp(self.theta[_NUM_GLOBAL:])
        num_groups = len(gene) - len(self.groups)
        return gene[:num_groups][self.groups] * gene[num_groups:] * torch.exp(-self.theta[3])


def _covariance(theta: Tensor, groups: Tensor, x1: Tensor, z1: Tensor, x2: Tensor, z2: Tensor) -> Tensor:
    shared = torch.exp(theta[:_NUM_GLOBAL])
    num_groups = len(theta) - _NUM_GLOBAL - len(groups)
    relevance = torch.exp(theta[_NUM_GLOBAL : _NUM_GLOBAL + num_groups])[groups]
    scale = relevance * torch.exp(theta[_NUM_GLOBAL + num_groups :]) / shared[3]
    gap = (z1.unsqueeze(1) - z2) ** 2
    a, b = x1 * scale, x2 * scale
    distance = ((a**2).sum(1).unsqueeze(1) + (b**2).sum(1) - 2.0 * a @ b.t()).clamp_min(0.0)
    linear = shared[0] * 0.1 * x1 @ x2.t() + shared[1] * z1.unsqueeze(1) * z2
    curve = shared[6] * torch.exp(-0.5 * gap / shared[5] ** 2)
    return linear + curve + shared[2] * torch.exp(-0.5 * (distance + gap / shared[4] ** 2))


def _negative_evidence(
    theta: np.ndarray,
    x: np.ndarray,
    z: np.ndarray,
    y: np.ndarray,
    groups: np.ndarray,
    known_noise: np.ndarray,
    mean: np.ndarray,
    sd: np.ndarray,
) -> tuple[float, np.ndarray]:
    """Minus log (marginal likelihood times prior), and its gradient: 1/2 tr((K^-1 - alpha alpha^T) dK)."""
    from scipy.linalg import get_lapack_funcs

    shared = np.exp(theta[:_NUM_GLOBAL])
    num_groups = len(theta) - _NUM_GLOBAL - len(groups)
    scale = (
        np.exp(theta[_NUM_GLOBAL:][:num_groups])[groups]
        * np.exp(theta[_NUM_GLOBAL + num_groups :])
        / shared[3]
    )
    gap = (z[:, None] - z) ** 2
    scaled = x * scale
    norm = (scaled**2).sum(1)
    interaction = scaled @ scaled.T
    interaction *= 2.0
    interaction -= norm[:, None] + norm + gap / shared[4] ** 2
    interaction *= 0.5
    interaction = shared[2] * np.exp(interaction, out=interaction)
    curve = shared[6] * np.exp(gap * (-0.5 / shared[5] ** 2))
    linear, budget = 0.1 * shared[0] * (x @ x.T), shared[1] * np.outer(z, z)
    gram = interaction + curve + linear + budget
    gram[np.diag_indices_from(gram)] += shared[7] + known_noise + _JITTER
    potrf, potri = get_lapack_funcs(("potrf", "potri"), (gram,))
    factor, failed = potrf(gram, lower=1, overwrite_a=1)
    if failed:
        return 1e12, np.zeros_like(theta)  # a step too far: the line search comes back
    log_det = 2.0 * np.log(np.diagonal(factor)).sum()
    inverse, _ = potri(factor, lower=1, overwrite_c=1)
    inverse = np.tril(inverse) + np.tril(inverse, -1).T
    alpha = inverse @ y
    pull = inverse - np.outer(alpha, alpha)
    interaction *= pull
    curve *= pull
    # sum_ij P_ij (x_if - x_jf)^2 for every feature f at once.
    square = 2.0 * ((x**2).T @ interaction.sum(1) - (x * (interaction @ x)).sum(0))
    column = -0.5 * scale**2 * square
    gradient = np.concatenate(
        [
            [
                0.5 * (pull * linear).sum(),
                0.5 * (pull * budget).sum(),
                0.5 * interaction.sum(),
                -column.sum(),
                0.5 * (interaction * gap).sum() / shared[4] ** 2,
                0.5 * (curve * gap).sum() / shared[5] ** 2,
                0.5 * curve.sum(),
                0.5 * shared[7] * np.trace(pull),
            ],
            np.bincount(groups, column, minlength=num_groups),
            column,
        ]
    )
    offset = (theta - mean) / sd
    value = 0.5 * (y @ alpha + log_det + offset @ offset)
    return float(value), gradient + offset / sd


def fit_kernel(
    features: np.ndarray,
    groups: np.ndarray,
    budget: np.ndarray,
    labels: np.ndarray,
    *,
    folds: np.ndarray,
    noise: np.ndarray | None = None,
    num_iterations: int = 60,
) -> KernelModel:
    """Fit hyperparameters by the marginal likelihood (with priors), then the process.

    Args:
        features: float [n, F], centred additive features.
        groups: int64 [F], which gene each feature belongs to.
        budget: float [n], normalised log MACs; zeros for none.
        labels: float [n], standardised.
        folds: int [n], whose labels are left out together for `held_out`.
        noise: float [n], known noise variance of each label in the same unit, or None.
        num_iterations: Of L-BFGS.

    Returns:
        The model.

    Source:
        Rasmussen and Williams, Gaussian Processes for Machine Learning (2006), sec. 5.4 (marginal likelihood,
        automatic relevance determination; leaving out by the blockwise form of eq. 5.12).
    """
    from scipy.optimize import minimize

    x, z, y = features.astype(np.float64), budget.astype(np.float64), labels.astype(np.float64)
    num_groups = int(groups.max()) + 1
    known = np.zeros(len(y)) if noise is None else noise.astype(np.float64)
    mean = np.concatenate([_PRIOR_MEAN, np.zeros(num_groups + len(groups))])
    sd = np.concatenate([_PRIOR_SD, np.full(num_groups, _GROUP_SD), np.full(len(groups), _COLUMN_SD)])
    result = minimize(
        _negative_evidence,
        mean,
        args=(x, z, y, groups, known, mean, sd),
        jac=True,
        method="L-BFGS-B",
        bounds=list(zip(mean - 6.0, mean + 6.0, strict=True)),
        options={"maxiter": num_iterations},
    )
    theta, index = torch.from_numpy(result.x), torch.from_numpy(groups)
    rows, places = torch.from_numpy(x), torch.from_numpy(z)
    gram = _covariance(theta, index, rows, places, rows, places).numpy()
    inverse = np.linalg.inv(gram + np.diag(np.exp(result.x[7]) + known + _JITTER))
    alpha = inverse @ y
    held_out = y.copy()
    for fold in np.unique(folds):
        left_out = folds == fold
        held_out[left_out] -= np.linalg.solve(inverse[np.ix_(left_out, left_out)], alpha[left_out])
    return KernelModel(theta, index, rows, places, torch.from_numpy(alpha), torch.from_numpy(held_out))


@dataclass(frozen=True)
class KernelScorer:
    """A fitted process folded into lookup tables.

    Attributes:
        table: float32 [num_slots * (max_code + 1), n + 1]: minus half the squared distance that a choice adds
            to each labelled path, and its linear worth.
        offset: float32 [n + 1].
        centres: float32 [n], budgets of the labelled paths.
        alpha: float32 [n], weights of the interactions.
        curve: float32 [n], weights of the budget's own curve.
        scales: (half inverse squared budget length in the interactions, the same in the curve, linear budget
            worth).
        slot_starts: int64 [num_slots].
    """

    table: Tensor
    offset: Tensor
    centres: Tensor
    alpha: Tensor
    curve: Tensor
    scales: tuple[float, float, float]
    slot_starts: Tensor

    @classmethod
    def fold(
        cls, model: KernelModel, design: np.ndarray, feature_mean: Tensor, centre: float, scale: float
    ) -> KernelScorer:
        """Fold a model.

        Args:
            model: The fitted process.
            design: float32 [num_slots, max_code + 1, F].
            feature_mean: [F], subtracted from features.
            centre: Subtracted from the score.
            scale: Divides it afterwards.

        Returns:
            The scorer.
        """
        shared = torch.exp(model.theta[:_NUM_GLOBAL]).tolist()
        columns = model.column_scale()
        num_slots, num_codes, num_features = design.shape
        choices = torch.from_numpy(design).double().view(-1, num_features)
        mean = feature_mean.double()
        # |x - c|^2 = |x|^2 - 2 x.c + |c|^2; x is a sum of choices that share no column, so |x|^2 is additive.
        scaled, centres = choices * columns, (model.features + mean) * columns
        distance = (scaled**2).sum(1, keepdim=True) - 2.0 * scaled @ centres.t()
        worth = 0.1 * shared[0] * (model.features.t() @ model.alpha) / scale
        table = torch.cat([-0.5 * distance, (choices @ worth).unsqueeze(1)], dim=1)
        offset = torch.cat([-0.5 * (centres**2).sum(1), (-(mean @ worth) - centre / scale).view(1)])
        return cls(
            table=table.float().contiguous(),
            offset=offset.float(),
            centres=model.budget.float(),
            alpha=(shared[2] * model.alpha / scale).float(),
            curve=(shared[6] * model.alpha / scale).float(),
            scales=(
                0.5 / shared[4] ** 2,
                0.5 / shared[5] ** 2,
                shared[1] * float(model.budget @ model.alpha) / scale,
            ),
            slot_starts=torch.arange(num_slots) * num_codes,
        )

    @torch.inference_mode()
    def score(self, codes: Tensor, budget: Tensor | None) -> Tensor:
        """Score one chunk.

        Args:
            codes: uint8 [n, num_slots].
            budget: float32 [n], normalised log MACs, or None.

        Returns:
            float32 [n].
        """
        flat = F.embedding_bag(codes.long() + self.slot_starts, self.table, mode="sum").add_(self.offset)
        exponent, linear = flat[:, :-1], flat[:, -1].clone()
        if budget is not None:
            gap = (budget.unsqueeze(1) - self.centres).square_()
            exponent = exponent - self.scales[0] * gap
            linear += self.scales[2] * budget
            linear += gap.mul_(-self.scales[1]).exp_() @ self.curve
        else:
            linear += self.curve.sum()
        return exponent.exp() @ self.alpha + linear
