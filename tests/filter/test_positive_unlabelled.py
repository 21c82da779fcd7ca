# SPDX-License-Identifier: Apache-2.0
"""The positive-unlabelled variant: its risk, what it learns, what it refuses."""

import numpy as np
import pytest
import torch
from test_path_filter import CHOICES, QUICK, table

from pfnas_fast.errors import InputError
from pfnas_fast.filter import WeakPathFilter
from pfnas_fast.filter.metrics import cost_bins, tau_within_groups
from pfnas_fast.filter.positive_unlabelled import non_negative_risk
from pfnas_fast.space import CostModel, load_space, uniform_population


def quick(**settings):
    return WeakPathFilter(num_choices=CHOICES, num_members=2, config=QUICK, **settings)


def test_risk_is_that_of_true_classes_where_the_unlabelled_are_drawn_from_them():
    """Unlabelled = prior * positives + (1 - prior) * negatives: the estimate equals the supervised risk."""
    rng = torch.Generator().manual_seed(0)
    positive = torch.randn(3, 40, generator=rng, dtype=torch.float64) + 1
    negative = torch.randn(3, 60, generator=rng, dtype=torch.float64) - 1
    estimate = non_negative_risk(positive, torch.cat([positive, negative], 1), 0.4)
    loss = torch.nn.functional.softplus
    truth = (0.4 * loss(-positive).mean(1) + 0.6 * loss(negative).mean(1)).sum()
    assert float(estimate) == pytest.approx(float(truth), rel=1e-12)


def test_risk_never_falls_below_zero():
    assert float(non_negative_risk(torch.full((1, 5), 30.0), torch.full((1, 5), -30.0), 0.5)) >= 0.0


def test_ranks_unseen_paths_better_than_macs():
    flt = quick().fit(*table(150))
    paths, worth, macs_m = table(500, seed=1)
    bins = cost_bins(macs_m, 6)
    ours = tau_within_groups(flt.score(paths, macs_m), worth, bins)
    assert ours > 0.3
    assert ours > tau_within_groups(macs_m, worth, bins)
    again = quick().fit(*table(150)).score(paths, macs_m)
    assert (again == flt.score(paths, macs_m)).all()
    assert flt.score(paths[:0], macs_m[:0]).shape == (0,)


def test_takes_a_space_and_its_costs():
    cost = CostModel(load_space("tiny"), num_classes=3)
    paths = uniform_population(cost.space, np.random.default_rng(0), 60)
    flt = WeakPathFilter(cost.space, cost=cost, num_members=1, config=QUICK)
    scores = flt.fit(paths, paths[:, 0].astype(float), cost.macs_m(paths)).score(paths)
    assert np.corrcoef(scores, paths[:, 0])[0, 1] > 0.5


def test_refusals():
    paths, worth, macs_m = table(20)
    with pytest.raises(InputError, match="0 < weak_share < 1"):
        quick(weak_share=1.0)
    with pytest.raises(InputError, match="num_unlabelled >= 1"):
        quick(num_unlabelled=0)
    with pytest.raises(InputError, match="expected a fitted filter"):
        quick().score(paths, macs_m)
    with pytest.raises(InputError, match="finite numbers for labels"):
        quick().fit(paths, np.full(20, np.nan), macs_m)
    with pytest.raises(InputError, match="expected macs_m"):
        quick().fit(paths, worth, macs_m).clone().fit(paths, worth, macs_m).score(paths)
