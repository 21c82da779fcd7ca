# SPDX-License-Identifier: Apache-2.0
"""The report: honest held-out numbers, the refusal rule, JSON and PNG."""

import json
from typing import Any

import numpy as np
import pytest

from pfnas_fast.errors import InputError
from pfnas_fast.filter import PathFilter
from pfnas_fast.filter.report import choose_label, filter_report, held_out_scores
from pfnas_fast.filter.rivals import Rival
from pfnas_fast.space import CostModel, load_space, uniform_population

CHOICES = [3] * 6
FAST: dict[str, Any] = {"network_share": 0.0}  # the processes alone: a tenth of the time, the same rules


def table(n, noise, seed=0):
    """Gene 0 is worth more than all others, and costs nothing; MACs are worth something as well."""
    rng = np.random.default_rng(seed)
    paths = np.unique(rng.integers(0, 3, (4 * n, 6)), axis=0)
    paths = paths[rng.permutation(len(paths))[:n]]
    macs_m = np.exp(0.4 * paths[:, 1:].sum(1) + 0.01 * rng.random(len(paths)))
    worth = np.log(macs_m) + 0.8 * paths[:, 0]
    return paths, worth + noise * rng.normal(size=len(paths)), macs_m


def report_of(paths, labels, macs_m, **settings):
    return filter_report(
        PathFilter(num_choices=CHOICES, **FAST), paths, labels, macs_m, num_bootstrap=200, **settings
    )


def test_a_filter_that_knows_something_is_used(tmp_path):
    report = report_of(*table(120, 0.05), png=tmp_path / "report.png")
    within = report["tau"]["within_bins"]
    assert report["use_filter"] is True
    assert within["filter"] > 0.6
    assert within["filter_low"] < within["filter"] < within["filter_high"]
    assert within["difference_low"] > 0
    assert within["filter"] > within["macs_only"]
    assert report["tau"]["global"]["macs_only"] > within["macs_only"]
    assert report["regret"]["filter"] < report["regret"]["random"]
    assert report["top_k_recall"]["filter"] > report["top_k_recall"]["macs_only"]
    for name in ("regret", "top_k_recall"):
        assert report[name]["filter_low"] < report[name]["filter"] < report[name]["filter_high"]
    curve = report["sample_efficiency"]
    assert [row["num_labels"] for row in curve] == [34, 62, 96]
    assert curve[0]["tau_within"] < curve[-1]["tau_within"]
    assert json.loads(json.dumps(report)) == report
    assert (tmp_path / "report.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_a_filter_that_knows_no_more_than_macs_is_refused():
    paths, _, macs_m = table(120, 0.0)
    noise = np.random.default_rng(5).normal(size=len(paths))
    report = report_of(paths, np.log(macs_m) + 0.3 * noise, macs_m)
    assert report["use_filter"] is False
    assert "balanced" in report["reason"]
    assert report["tau"]["global"]["filter"] > 0.5  # which is why the global tau does not decide


def test_pure_noise_is_refused_about_always():
    rng = np.random.default_rng(0)
    used = 0
    for seed in range(8):
        paths, _, macs_m = table(60, 0.0, seed)
        used += report_of(paths, rng.normal(size=len(paths)), macs_m, seed=seed)["use_filter"]
    assert used <= 1


def test_held_out_means_held_out():
    # A lookup table of the labels would be perfect on paths it has seen and useless on others.
    class Memory:
        def clone(self):
            return Memory()

        def fit(self, paths, labels, macs_m, *, label_sd=None, seed=0):
            self.seen = {path.tobytes(): label for path, label in zip(paths, labels, strict=True)}
            return self

        def score(self, paths, macs_m):
            return np.array([self.seen.get(path.tobytes(), 0.0) for path in paths])

    paths, labels, macs_m = table(80, 0.0)
    scores, fold = held_out_scores(Memory(), paths, labels, macs_m, bins=np.zeros(80, int))
    assert (scores == 0.0).all()
    assert np.bincount(fold).tolist() == [16] * 5


def test_duplicates_never_straddle_folds():
    paths, labels, macs_m = table(60, 0.0)
    noise = np.random.default_rng(0).normal(size=60)
    paths, macs_m = np.tile(paths, (3, 1)), np.tile(macs_m, 3)
    report = report_of(paths, np.tile(np.log(macs_m[:60]) + noise, 3), macs_m)
    assert report["num_labels"] == 180
    assert report["num_distinct"] == 60
    assert report["tau"]["within_bins"]["filter"] < 0.35
    assert labels.shape == (60,)


def test_space_reports_within_resolution_and_reliability():
    cost = CostModel(load_space("tiny"), num_classes=3)
    population = uniform_population(cost.space, np.random.default_rng(0), 80)
    macs_m = cost.macs_m(population)
    rng = np.random.default_rng(1)
    truth = np.log(macs_m) + 0.2 * (population[:, 1] > 3)
    halves = truth[:, None] + 0.05 * rng.normal(size=(80, 2))
    flt = PathFilter(cost.space, cost=cost, **FAST)
    report = filter_report(
        flt, cost.space.decode(population), halves.mean(1), macs_m, label_halves=halves, num_bootstrap=100
    )
    assert (
        report["tau"]["within_bins_and_resolution"]["num_pairs"] < report["tau"]["within_bins"]["num_pairs"]
    )
    reliability = report["label_reliability"]
    assert reliability["overall"]["correlation"] > reliability["within_bins"]["correlation"] > 0.3
    assert reliability["within_bins"]["noise_sd"] == pytest.approx(0.05 / 2**0.5, rel=0.3)


def test_empty_bins_are_named_and_do_no_harm():
    paths, labels, macs_m = table(60, 0.05)
    low, high = np.quantile(macs_m, [0.3, 0.8])
    gap = (macs_m < low) | (macs_m > high)
    report = report_of(paths[gap], labels[gap], macs_m[gap])
    assert report["empty_bins"]
    assert all(report["per_bin"][index] == {"bin": index, "num_paths": 0} for index in report["empty_bins"])


def test_one_cost_for_all_is_one_bin():
    paths, labels, _ = table(40, 0.05)
    report = report_of(paths, labels, np.full(40, 7.0))
    assert report["per_bin"][0]["num_paths"] == 40
    assert report["tau"]["within_bins"]["macs_only"] == 0.0


def test_rivals_can_be_reported_too():
    report = filter_report(Rival("ridge", num_choices=CHOICES), *table(100, 0.05), num_bootstrap=100)
    assert report["use_filter"] is True


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda t: (t[0][:6], t[1][:6], t[2][:6]), "at least 10 distinct"),
        (lambda t: (t[0], np.full(40, np.nan), t[2]), "finite numbers for labels"),
        (lambda t: (t[0][:1].repeat(40, 0), t[1], t[2]), "at least 2 distinct"),
    ],
)
def test_unusable_labels_are_refused(change, text):
    with pytest.raises(InputError, match=text):
        report_of(*change(table(40, 0.05)))


def test_bad_halves_and_resolutions_are_refused():
    with pytest.raises(InputError, match="label_halves"):
        report_of(*table(40, 0.05), label_halves=np.ones((3, 2)))
    with pytest.raises(InputError, match="resolutions"):
        report_of(*table(40, 0.05), resolutions=[1, 2])


def test_the_more_reliable_label_is_chosen():
    rng = np.random.default_rng(0)
    bins = np.repeat(np.arange(4), 20)
    truth = bins + 0.3 * rng.normal(size=80)
    quiet = truth[:, None] + 0.05 * rng.normal(size=(80, 2))
    loud = truth[:, None] + 0.5 * rng.normal(size=(80, 2))
    name, details = choose_label({"ap50": loud, "ap": quiet}, bins)
    assert name == "ap"
    assert details["ap"]["correlation"] > details["ap50"]["correlation"]
    with pytest.raises(InputError, match="at least one"):
        choose_label({}, bins)
