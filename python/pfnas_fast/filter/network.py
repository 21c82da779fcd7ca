# SPDX-License-Identifier: Apache-2.0
"""An ensemble of small rankers as one stacked network, and its form for scoring millions of paths."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["LookupScorer", "RankerEnsemble"]


class RankerEnsemble(nn.Module):
    """`num_members` independent MLPs with a linear skip, evaluated together by batched products.

    Member e computes ``w3 . relu(W2 relu(W1 x + b1) + b2) + w0 . x``. The skip makes 'every gene has its own
    worth' free to learn, which is most of the signal when labels are few; the hidden layers add what genes do
    together.

    Args:
        num_features: F, additive features per path, the budget (if any) last.
        hidden: Widths of the two hidden layers.
        num_members: E, members of the ensemble.
        dropout: Probability of dropping a unit of the hidden layers during training.
        generator: Source of the initial weights.
        film: The budget scales and shifts the first hidden layer, ``(1 + a z) (W1 x + b1) + c z``, instead of
            being one input of it (FiLM, arXiv:1709.07871); the skip sees it as before.
    """

    def __init__(
        self,
        num_features: int,
        *,
        hidden: tuple[int, int],
        num_members: int,
        generator: torch.Generator,
        dropout: float = 0.0,
        film: bool = False,
    ) -> None:
        super().__init__()
        self.hidden = hidden
        self.num_members = num_members
        self.dropout = dropout
        self.generator = generator

        def weights(fan_in: int, width: int, gain: float = 2.0) -> nn.Parameter:
            scale = (gain / fan_in) ** 0.5
            return nn.Parameter(torch.randn(num_members, fan_in, width, generator=generator) * scale)

        first, second = hidden
        self.weight_1 = weights(num_features, first)  # [E, F, H1]
        self.bias_1 = nn.Parameter(torch.zeros(num_members, 1, first))
        self.weight_2 = weights(first, second)  # [E, H1, H2]
        self.bias_2 = nn.Parameter(torch.zeros(num_members, 1, second))
        self.weight_3 = weights(second, 1, gain=0.1)  # [E, H2, 1]
        self.skip = nn.Parameter(torch.zeros(num_members, num_features, 1))  # [E, F, 1]
        self.film = nn.Parameter(torch.zeros(2, num_members, 1, first)) if film else None  # a, c

    def _drop(self, hidden: Tensor) -> Tensor:
        if not self.training or self.dropout == 0.0:
            return hidden
        keep = torch.rand(hidden.shape, generator=self.generator) >= self.dropout
        return hidden * keep / (1.0 - self.dropout)

    def _first_layer(self, x: Tensor) -> Tensor:
        if self.film is None:
            return torch.baddbmm(self.bias_1, x, self.weight_1)
        genes, z = x[..., :-1], x[..., -1:]
        scale, shift = self.film.unbind(0)
        return (1.0 + scale * z) * torch.baddbmm(self.bias_1, genes, self.weight_1[:, :-1]) + shift * z

    def forward(self, features: Tensor) -> Tensor:
        """Score paths.

        Args:
            features: [n, F], or [E, n, F] where members see different rows.

        Returns:
            [E, n].
        """
        x = features if features.dim() == 3 else features.expand(self.num_members, -1, -1)
        hidden = self._drop(F.relu(self._first_layer(x)))
        hidden = self._drop(F.relu(torch.baddbmm(self.bias_2, hidden, self.weight_2)))
        return (torch.bmm(hidden, self.weight_3) + torch.bmm(x, self.skip)).squeeze(2)


@dataclass(frozen=True)
class LookupScorer:
    """The ensemble with its first layer and skip folded into one table per (slot, code).

    Attributes:
        table: [num_slots * (max_code + 1), E * H1 + E], what a choice adds to the first layer and to the
            skip.
        offset: [E * H1 + E], their biases.
        budget: [E * H1 + E], what one unit of the normalised budget adds; None without a budget input.
        weight_2: [E, H1, H2].
        bias_2: [E, 1, H2].
        weight_3: [E, H2, 1], already divided by the members' score scale.
        slot_starts: int64 [num_slots], first table row of each slot.
    """

    table: Tensor
    offset: Tensor
    budget: Tensor | None
    weight_2: Tensor
    bias_2: Tensor
    weight_3: Tensor
    slot_starts: Tensor

    @classmethod
    def fold(
        cls,
        network: RankerEnsemble,
        design: Tensor,
        feature_mean: Tensor,
        score_mean: Tensor,
        score_scale: Tensor,
        *,
        input_scale: float,
        has_budget: bool,
    ) -> LookupScorer:
        """Fold a trained network, its feature and its score normalisation.

        Args:
            network: The trained ensemble on inputs ``(x - mean) * input_scale``.
            design: [num_slots, max_code + 1, F0], features of each choice.
            feature_mean: [F0].
            score_mean: [E], subtracted from each member's score.
            score_scale: [E], divides it afterwards, so that members vote with equal weight.
            input_scale: Factor on features and budget.
            has_budget: Whether the network's last feature is the budget.

        Returns:
            The scorer.
        """
        num_slots, num_codes, num_features = design.shape
        members, first = network.num_members, network.hidden[0]
        with torch.no_grad():
            weight_1 = network.weight_1.double()
            skip = network.skip.double() / score_scale.double().view(-1, 1, 1)
            genes = (
                torch.cat(
                    [
                        weight_1[:, :num_features].permute(1, 0, 2).reshape(num_features, -1),
                        skip[:, :num_features, 0].t(),
                    ],
                    dim=1,
                )
                * input_scale
            )
            offset = -feature_mean.double() @ genes
            offset[: members * first] += network.bias_1.double().flatten()
            offset[members * first :] -= score_mean.double() / score_scale.double()
            budget = None
            if has_budget:
                budget = (torch.cat([weight_1[:, -1].flatten(), skip[:, -1, 0]]) * input_scale).float()
            return cls(
                table=(design.double().view(-1, num_features) @ genes).float().contiguous(),
                offset=offset.float(),
                budget=budget,
                weight_2=network.weight_2.detach().clone(),
                bias_2=network.bias_2.detach().clone(),
                weight_3=(network.weight_3.detach() / score_scale.view(-1, 1, 1)).contiguous(),
                slot_starts=torch.arange(num_slots) * num_codes,
            )

    @torch.inference_mode()
    def members(self, codes: Tensor, budget: Tensor | None) -> Tensor:
        """Score one chunk of paths with every member.

        Args:
            codes: uint8 [n, num_slots].
            budget: float32 [n], normalised log MACs; None where the network has no such input.

        Returns:
            float32 [E, n], each member on the common scale.
        """
        num_members, first, _ = self.weight_2.shape
        flat = F.embedding_bag(codes.long() + self.slot_starts, self.table, mode="sum") + self.offset
        if self.budget is not None and budget is not None:
            flat = flat.addr(budget, self.budget)
        hidden = flat[:, : num_members * first].view(-1, num_members, first).transpose(0, 1).relu()
        hidden = torch.baddbmm(self.bias_2, hidden, self.weight_2).relu_()
        return torch.bmm(hidden, self.weight_3).squeeze(2) + flat[:, num_members * first :].t()
