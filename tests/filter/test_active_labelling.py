# SPDX-License-Identifier: Apache-2.0
"""Active labelling chooses what the process knows least about, evenly over budgets."""

import numpy as np
import pytest
import torch
from test_path_filter import CHOICES, table

from pfnas_fast.errors import InputError
from pfnas_fast.filter import PathFilter, next_paths
from pfnas_fast.filter.metrics import cost_bins


def fitted(paths, worth, macs_m, **settings):
    return PathFilter(num_choices=CHOICES, network_share=0.0, **settings).fit(paths, worth, macs_m)


@pytest.fixture(scope="module")
def flt():
    return fitted(*table(60, noise=0.05))


def test_posterior_is_that_of_the_textbook(flt):
    model = flt.parts.kernels[0]
    codes, z = flt.normalised_inputs(table(30, seed=1)[0], table(30, seed=1)[2])
    x = torch.from_numpy(flt.encoding.features(codes)).double() - flt.feature_mean()
    variance, shared = model.posterior(x, z)
    k = model.covariance(model.features, model.budget, model.features, model.budget)
    cross = model.covariance(model.features, model.budget, x, z)
    noisy = k + (model.noise() + 1e-6) * torch.eye(len(k), dtype=torch.float64)
    want = model.covariance(x, z, x, z) - cross.T @ torch.linalg.solve(noisy, cross)
    assert torch.allclose(variance, want.diagonal(), atol=1e-8)
    assert torch.allclose(model.covariance(x, z, x, z) - shared.T @ shared, want, atol=1e-8)


def test_chosen_as_if_refitted_after_every_choice(flt):
    """The elimination must give the variances of a process that was told of each choice."""
    paths, _, macs_m = table(40, seed=2)
    chosen = next_paths(flt, paths, macs_m, num_paths=6, num_bins=1)
    model = flt.parts.kernels[0]
    codes, z = flt.normalised_inputs(paths, macs_m)
    x = torch.from_numpy(flt.encoding.features(codes)).double() - flt.feature_mean()
    seen_x, seen_z = model.features, model.budget
    for index in chosen:
        k = model.covariance(seen_x, seen_z, seen_x, seen_z)
        k = k + (model.noise() + 1e-6) * torch.eye(len(k), dtype=torch.float64)
        cross = model.covariance(seen_x, seen_z, x, z)
        variance = model.covariance(x, z, x, z).diagonal() - (cross * torch.linalg.solve(k, cross)).sum(0)
        assert float(variance[index]) == pytest.approx(float(variance.max()), rel=1e-3)
        seen_x, seen_z = torch.cat([seen_x, x[index : index + 1]]), torch.cat([seen_z, z[index : index + 1]])


def test_even_over_bins_and_distinct(flt):
    paths, _, macs_m = table(300, seed=3)
    chosen = next_paths(flt, paths, macs_m, num_paths=12, num_bins=4, equal="population")
    assert len(set(chosen.tolist())) == 12
    assert np.bincount(cost_bins(macs_m, 4, equal="population")[chosen]).tolist() == [3, 3, 3, 3]


def test_an_unseen_choice_comes_first():
    paths, worth, macs_m = table(80)
    known = paths[:, 2] != 3
    flt = fitted(paths[known], worth[known], macs_m[known])
    chosen = next_paths(flt, paths, macs_m, num_paths=4, num_bins=1)
    assert (paths[chosen[:1], 2] == 3).all()


def test_an_empty_bin_is_passed_over(flt):
    paths, _, macs_m = table(40, seed=4)
    rows = np.r_[np.argsort(macs_m)[:10], np.argsort(macs_m)[-10:]]
    assert len(next_paths(flt, paths[rows], macs_m[rows], num_paths=20, num_bins=8)) == 20


def test_refusals(flt):
    paths, _, macs_m = table(20)
    with pytest.raises(InputError, match="expected 1 to 20 for num_paths, got 21"):
        next_paths(flt, paths, macs_m, num_paths=21)
    with pytest.raises(InputError, match="expected a fitted filter with a Gaussian process"):
        next_paths(flt.clone(), paths, macs_m, num_paths=1)
