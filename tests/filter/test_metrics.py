# SPDX-License-Identifier: Apache-2.0
"""Ranking measures against scipy and hand-made cases."""

from typing import Any

import numpy as np
import pytest
from scipy.stats import kendalltau

from pfnas_fast.errors import InputError
from pfnas_fast.filter.metrics import (
    cost_bins,
    label_reliability,
    pair_tau,
    regret,
    tau_within_groups,
    top_k_recall,
)


def tau_of(*arguments, **settings) -> Any:
    return pair_tau(*arguments, **settings)


def all_pairs(n):
    return np.ones((n, n), bool)


def test_bins_of_equal_width_in_log_macs():
    macs = np.array([1.0, 1.9, 2.1, 4.1, 7.9, 8.0])
    assert cost_bins(macs, 3).tolist() == [0, 0, 1, 2, 2, 2]
    assert cost_bins(np.ones(4), 3).tolist() == [0, 0, 0, 0]
    assert cost_bins(np.ones(0), 3).tolist() == []


def test_bins_of_equal_population():
    macs = np.random.default_rng(0).random(80) + 1
    assert np.bincount(cost_bins(macs, 8, equal="population")).tolist() == [10] * 8


@pytest.mark.parametrize("arguments", [{"num_bins": 0}, {"num_bins": 2, "equal": "size"}])
def test_bad_bins_are_refused(arguments):
    with pytest.raises(InputError, match="cost_bins: expected"):
        cost_bins(np.ones(3), **arguments)


@pytest.mark.parametrize("levels", [1000, 4])
def test_tau_over_all_pairs_is_kendalls_tau_b(levels):
    rng = np.random.default_rng(levels)
    labels = rng.integers(0, levels, 60).astype(float)
    scores = np.round(labels + rng.normal(0, levels / 3, 60))
    tau = tau_of(scores, labels, all_pairs(60), reference=labels, num_bootstrap=200)
    expected: Any = kendalltau(scores, labels)
    assert tau.tau == pytest.approx(expected.statistic)
    assert tau.reference == pytest.approx(1.0)
    assert tau.low < tau.tau < tau.high
    assert tau.difference_high < 0
    groups = np.zeros(60, int)
    assert tau_within_groups(scores, labels, groups) == pytest.approx(tau.tau)


def test_tau_within_bins_is_blind_to_the_trend_between_bins():
    rng = np.random.default_rng(0)
    bins = np.repeat(np.arange(8), 25)
    labels = bins * 10.0 + rng.random(200)
    same = bins[:, None] == bins[None, :]
    trend = tau_of(bins + 1e-3 * rng.random(200), labels, all_pairs(200), reference=labels, num_bootstrap=50)
    within = tau_of(bins + 1e-3 * rng.random(200), labels, same, reference=labels, num_bootstrap=50)
    assert trend.tau > 0.85
    assert abs(within.tau) < 0.15


def test_bootstrap_interval_covers_the_truth_about_as_often_as_it_says():
    # Scores with a known expected tau: bivariate normal, tau = 2 / pi * arcsin(rho).
    rho, truth = 0.5, 2 / np.pi * np.arcsin(0.5)
    hits = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        labels = rng.normal(size=80)
        scores = rho * labels + np.sqrt(1 - rho**2) * rng.normal(size=80)
        tau = tau_of(scores, labels, all_pairs(80), reference=labels, num_bootstrap=200, seed=seed)
        hits += tau.low <= truth <= tau.high
    assert 50 <= hits <= 60


def test_no_pairs_no_tau():
    tau = tau_of(np.arange(3.0), np.arange(3.0), np.eye(3, dtype=bool), reference=np.arange(3.0))
    assert tau.tau is None
    assert tau.num_pairs == 0
    tau = tau_of(np.arange(3.0), np.ones(3), all_pairs(3), reference=np.arange(3.0))
    assert tau.tau is None


def test_top_k_recall_and_regret_by_hand():
    labels = np.arange(20.0)
    groups = np.zeros(20, int)
    assert top_k_recall(labels, labels, groups, fraction=0.1) == 1.0
    assert top_k_recall(-labels, labels, groups, fraction=0.1) == 0.0
    half = labels.copy()
    half[18] = -1.0  # one of the two best is missed
    assert top_k_recall(half, labels, groups, fraction=0.1) == 0.5
    assert regret(labels, labels, groups) == 0.0
    assert regret(-labels, labels, groups) == 19.0
    assert (
        regret(np.array([0.0, 1.0, 1.0, 0.0]), np.array([5.0, 3.0, 1.0, 4.0]), np.array([0, 0, 1, 1])) == 2.5
    )


def test_reliability_recovers_a_known_signal_to_noise_ratio():
    rng = np.random.default_rng(0)
    truth = rng.normal(0, 2.0, 4000)
    halves = truth[:, None] + rng.normal(0, 1.0, (4000, 2))
    result = label_reliability(halves)
    assert result["correlation"] == pytest.approx(0.8, abs=0.02)
    assert result["reliability"] == pytest.approx(8 / 9, abs=0.02)
    assert result["noise_sd"] == pytest.approx(np.sqrt(0.5), rel=0.05)
    assert result["label_sd"] == pytest.approx(np.sqrt(4.5), rel=0.05)


def test_reliability_within_bins_is_not_fooled_by_the_trend():
    rng = np.random.default_rng(0)
    bins = np.repeat(np.arange(8), 50)
    halves = 10.0 * bins[:, None] + rng.normal(0, 1.0, (400, 2))
    assert label_reliability(halves)["correlation"] > 0.99
    assert abs(label_reliability(halves, bins)["correlation"]) < 0.15


@pytest.mark.parametrize("halves", [np.ones((4, 3)), np.full((4, 2), np.nan), np.ones(4)])
def test_bad_halves_are_refused(halves):
    with pytest.raises(InputError, match="label_reliability"):
        label_reliability(halves)
