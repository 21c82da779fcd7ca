# SPDX-License-Identifier: Apache-2.0
"""`labelling=active`: half of the labels are drawn, the others chosen where those say least."""

from pathlib import Path

import numpy as np
import pytest
import torch

import pfnas_fast as pf
from pfnas_fast.filter import Balanced
from pfnas_fast.run.finish import compute_ledger
from pfnas_fast.run.job import Job, open_job, run_stage
from pfnas_fast.run.labels import measure_label_sets, measure_labels
from pfnas_fast.train.labelling import merge_labels

SETTINGS = [
    "pretrain=false",
    "warmup_steps=2",
    "train_steps=2",
    "batch_size=2",
    "labels_per_bin=5",
    "num_bins=3",
    "calib_images=4",
    "filter_members=1",
    "labelling=active",
    "filter_refreshes=0",
    "backend=reference",
]


def _job(folder: Path, data: Path) -> Job:
    return open_job(folder, pf.make_config(overrides={"data": str(data)}, assignments=SETTINGS))


class Stop(Exception):
    """Stands for a kill."""


def _stop_at(stage: str, done: int) -> None:
    if (stage, done) == ("labels-active", 3):
        raise Stop(stage)


def test_half_of_the_labels_are_chosen(toy_detection: Path, tmp_path: Path) -> None:
    job = _job(tmp_path / "run", toy_detection)
    for stage in ("transfer", "warmup", "label"):
        run_stage(job, stage)
    sets = measure_label_sets(job)
    assert {name: np.bincount(labels.bins).tolist() for name, labels in sets.items()} == {
        "labels": [3, 3, 3],
        "labels-active": [2, 2, 2],
    }
    labels = measure_labels(job)
    assert len(set(labels.paths)) == 15
    assert job.run.read_json("labels.json")["num"] == 15
    assert job.run.read_json("labels.json")["label"] == labels.label_name
    assert labels.macs_t == pytest.approx(sum(part.macs_t for part in sets.values()))
    assert (labels.values["ap"] == np.concatenate([part.ap for part in sets.values()])).all()
    # The chosen ones are what the first half's process is least sure of: less sure than of random paths.
    first, active = sets.values()
    flt = pf.PathFilter(job.space, cost=job.cost, network_share=0.0)
    flt.fit(first.paths, first.label, first.macs_m, label_sd=first.label_sd)
    assert flt.parts is not None
    process = flt.parts.kernels[0]

    def variance(paths: list[pf.Path]) -> float:
        codes, z = flt.normalised_inputs(paths, job.cost.macs_m(paths))
        features = torch.from_numpy(flt.encoding.features(codes)) - flt.feature_mean()
        return float(process.posterior(features.double(), z)[0].mean())

    sampler = Balanced(job.space).bind(job.cost)
    random = job.space.decode(sampler.sample(np.random.default_rng(0), 200))
    assert variance(active.paths) > variance(random)


def test_interrupted_labelling_ends_like_an_uninterrupted_one(toy_detection: Path, tmp_path: Path) -> None:
    jobs = [_job(tmp_path / name, toy_detection) for name in ("whole", "cut")]
    for job in jobs:
        for stage in ("transfer", "warmup"):
            run_stage(job, stage)
    run_stage(jobs[0], "label")
    jobs[1].progress = lambda stage, done, total, info: _stop_at(stage, done)
    with pytest.raises(Stop):
        run_stage(jobs[1], "label")
    resumed = _job(tmp_path / "cut", toy_detection)
    measured: list[tuple[str, int]] = []
    resumed.progress = lambda stage, done, total, info: measured.append((stage, done))
    run_stage(resumed, "label")
    assert measured == [("labels-active", 4), ("labels-active", 5), ("labels-active", 6)]
    for name in ("labels.csv", "labels-active.csv", "labels.json"):
        assert resumed.run.path(name).read_text() == jobs[0].run.path(name).read_text(), name
    resumed.run.write_json("search.json", {"macs_t": 0.0})
    for stage in ("filter", "prune", "train"):
        run_stage(resumed, stage)
    ledger = compute_ledger(resumed)
    for name, labels in measure_label_sets(resumed).items():
        assert ledger[name]["macs_t"] == labels.macs_t
        assert ledger[name]["seconds"] > 0


def test_settings_and_empty_merges_are_refused() -> None:
    with pytest.raises(pf.InputError, match="at least 2 for labels_per_bin with labelling 'active'"):
        pf.make_config(assignments=["labelling=active", "labels_per_bin=1", "num_bins=10"])
    with pytest.raises(pf.InputError, match="stratified, active for labelling, got 'random'"):
        pf.make_config(assignments=["labelling=random"])
    with pytest.raises(pf.InputError, match="at least one set of labels"):
        merge_labels([])
