# SPDX-License-Identifier: Apache-2.0
"""The Gaussian process: exact gradient and held-out predictions; lookup tables equal to the formula."""

import numpy as np
import pytest
import torch
from scipy.optimize import approx_fprime

from pfnas_fast.filter import kernel
from pfnas_fast.filter.encoding import GeneEncoding
from pfnas_fast.filter.kernel import KernelModel, KernelScorer, fit_kernel

SIZES = [3, 2, 4, 1]


@pytest.fixture(scope="module")
def problem():
    rng = np.random.default_rng(0)
    encoding = GeneEncoding.of(num_choices=SIZES)
    codes = np.stack([rng.integers(0, size + 1, 40) for size in SIZES], axis=1).astype(np.uint8)
    features = encoding.features(codes)
    budget = rng.normal(size=40)
    labels = budget + features[:, 0] - features[:, 4] * features[:, 1] + 0.1 * rng.normal(size=40)
    labels = (labels - labels.mean()) / labels.std()
    return encoding, codes, features, budget, labels


@pytest.fixture(scope="module")
def model(problem):
    encoding, _, features, budget, labels = problem
    centred = features - features.mean(0)
    return fit_kernel(centred, encoding.feature_groups(), budget, labels, folds=np.arange(40) % 5)


def test_the_gradient_is_that_of_the_value(problem):
    encoding, _, features, budget, labels = problem
    groups = encoding.feature_groups()
    size = 8 + groups.max() + 1 + len(groups)
    mean, sd = np.zeros(size), np.full(size, 0.7)
    mean[:8] = kernel._PRIOR_MEAN
    theta = mean + 0.3 * np.random.default_rng(1).normal(size=size)
    known = np.linspace(0.0, 0.1, 40)
    arguments = (features.astype(np.float64), budget, labels, groups, known, mean, sd)
    _, gradient = kernel._negative_evidence(theta, *arguments)
    numeric = approx_fprime(theta, lambda t: kernel._negative_evidence(t, *arguments)[0], 1e-6)
    np.testing.assert_allclose(gradient, np.asarray(numeric), rtol=1e-3, atol=1e-4)


def test_held_out_predictions_equal_refitting_without_the_fold(problem, model):
    _, _, _, _, labels = problem
    noise = float(torch.exp(model.theta[7])) + kernel._JITTER
    for fold in range(5):
        test = torch.arange(40) % 5 == fold
        train = ~test
        x, z = model.features, model.budget
        gram = kernel._covariance(model.theta, model.groups, x[train], z[train], x[train], z[train])
        alpha = torch.linalg.solve(
            gram + noise * torch.eye(32, dtype=torch.float64), torch.from_numpy(labels)[train]
        )
        cross = kernel._covariance(model.theta, model.groups, x[test], z[test], x[train], z[train])
        torch.testing.assert_close(cross @ alpha, model.held_out[test], rtol=1e-6, atol=1e-8)


def test_it_learns_the_interaction(problem, model):
    _, _, _, _, labels = problem
    assert np.corrcoef(model.held_out.numpy(), labels)[0, 1] > 0.9


@pytest.mark.parametrize("with_budget", [True, False])
def test_lookup_tables_score_like_the_formula(problem, model, with_budget):
    encoding, codes, features, budget, _ = problem
    mean = torch.from_numpy(features.mean(0))
    if not with_budget:
        model = KernelModel(**{**model.state(), "budget": torch.zeros(40, dtype=torch.float64)})
    scorer = KernelScorer.fold(model, encoding.design(), mean, centre=0.3, scale=1.7)
    z = torch.from_numpy(budget) + 0.1
    scores = scorer.score(torch.from_numpy(codes), z.float() if with_budget else None)
    centred = torch.from_numpy(features) - mean
    expected = (model.predict(centred.double(), z if with_budget else torch.zeros_like(z)) - 0.3) / 1.7
    torch.testing.assert_close(scores.double(), expected, rtol=1e-4, atol=1e-5)


def test_known_noise_is_believed(problem):
    encoding, _, features, budget, labels = problem
    centred, groups = features - features.mean(0), encoding.feature_groups()
    spoiled = labels.copy()
    spoiled[0] += 8.0
    noise = np.zeros(40)
    noise[0] = 100.0
    folds = np.arange(40)
    told = fit_kernel(centred, groups, budget, spoiled, folds=folds, noise=noise)
    untold = fit_kernel(centred, groups, budget, spoiled, folds=folds)
    others = slice(1, None)
    error = [np.abs(m.held_out.numpy()[others] - labels[others]).mean() for m in (told, untold)]
    assert error[0] < error[1]
