# SPDX-License-Identifier: Apache-2.0
"""S3: the labelled paths of a run, before, during and after its training."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pfnas_fast.data import check_images
from pfnas_fast.detection import DetectionSupernet
from pfnas_fast.filter import ExactSampler, PathFilter, next_paths
from pfnas_fast.space import Path
from pfnas_fast.train import Labels, label_paths
from pfnas_fast.train.engine import stream_id
from pfnas_fast.train.labelling import bin_edges_m, budget_bins, merge_labels

if TYPE_CHECKING:
    from pfnas_fast.run.job import Job

ACTIVE_STAGE = "labels-active"
_ACTIVE_POOL_PER_BIN = 256


def run_label(job: Job) -> None:
    """S3: measure paths in every budget bin on images that no weight has seen."""
    labels = measure_labels(job)
    job.run.write_json(
        "labels.json",
        {
            "num": len(labels.paths),
            "labelling": job.config.labelling,
            "label": labels.label_name,
            "reliability": labels.reliability,
        },
    )


def measure_labels(job: Job) -> Labels:
    """The labels of S3 in one set; rows that are there already are not measured again."""
    return merge_labels(list(measure_label_sets(job).values()))


def measure_label_sets(job: Job) -> dict[str, Labels]:
    """The labels of S3 by the stage that they were measured under: "labels", with active ones beside it."""
    check_images(job.data.label)
    net = job.load_net("warmup" if job.config.uses_filter else "train")
    if job.config.labelling == "stratified":
        return {"labels": label_drawn(job, net, "labels", job.labels_per_bin)}
    first = label_drawn(job, net, "labels", job.labels_per_bin - job.labels_per_bin // 2)
    return {"labels": first, ACTIVE_STAGE: _label(job, net, ACTIVE_STAGE, paths=_active_paths(job, first))}


def measure_drift(job: Job) -> Labels:
    """Label a quarter as many fresh paths after training: does the filter still rank them?"""
    return label_drawn(job, job.load_net("train"), "relabels", job.relabels_per_bin)


def label_drawn(job: Job, net: DetectionSupernet, stage: str, per_bin: int) -> Labels:
    """Measure `per_bin` paths, drawn for `stage`, in each budget bin."""
    return _label(job, net, stage, per_bin=per_bin)


def _label(
    job: Job, net: DetectionSupernet, stage: str, *, per_bin: int = 1, paths: Sequence[Path] | None = None
) -> Labels:
    return label_paths(
        net,
        job.data.label,
        per_bin=per_bin,
        num_bins=job.config.num_bins,
        paths=paths,
        calib=job.data.calib,
        run=job.run,
        stage=stage,
        progress=job.progress,
    )


def _active_paths(job: Job, known: Labels) -> list[Path]:
    """The second half of the labels: what a filter of the first half knows least about, alike in all bins.

    They are written down before the first is measured, so that a resumed run measures the same.
    """
    file = f"{ACTIVE_STAGE}.json"
    if not job.run.has(file):
        pool, bins = _active_pool(job, known)
        macs_m = job.cost.macs_m(pool)
        flt = PathFilter(job.space, cost=job.cost, condition=job.filter_condition, network_share=0.0)
        flt.fit(known.paths, known.label, known.macs_m, label_sd=known.label_sd, seed=job.config.seed)
        num_bins = job.config.num_bins
        wanted = min(num_bins * (job.labels_per_bin // 2), len(pool))
        chosen = next_paths(flt, pool, macs_m, num_paths=wanted, num_bins=num_bins, bins=bins)
        job.run.write_json(file, [path.to_json() for path in job.space.decode(pool[chosen])])
    return [job.space.path_from_json(entry) for entry in job.run.read_json(file)]


def _active_pool(job: Job, known: Labels) -> tuple[np.ndarray, np.ndarray]:
    """Distinct unlabelled candidates uint8 [n, num_slots] and their bins int64 [n]."""
    edges = bin_edges_m(job.cost, job.config.num_bins)
    sampler = ExactSampler(job.cost)
    rng = np.random.default_rng([job.config.seed, stream_id(ACTIVE_STAGE)])
    drawn = [job.space.encode(known.paths)]
    for low, high in itertools.pairwise(edges):
        feasible = sampler.budgets.feasible(low, high)
        for resolution in feasible:
            count = -(-_ACTIVE_POOL_PER_BIN // len(feasible))
            drawn.append(sampler.sample(rng, count, low, high, resolution))
    population = np.concatenate(drawn)
    first = np.sort(np.unique(population, axis=0, return_index=True)[1])
    pool = population[first[first >= len(known.paths)]]
    return pool, budget_bins(job.cost, job.cost.macs_m(pool), job.config.num_bins)


@dataclass(frozen=True)
class JoinedLabels:
    """Labels of several versions of the weights, on one scale.

    Attributes:
        paths: n paths.
        label: float64 [n].
        macs_m: Millions, float64 [n].
        label_sd: Noise, in the unit of `label`, float64 [n].
    """

    paths: list[Path]
    label: np.ndarray
    macs_m: np.ndarray
    label_sd: np.ndarray


def join_labels(sets: Sequence[Labels]) -> JoinedLabels:
    """Put labels of different weights together.

    They differ in level and spread, so each set is standardised by itself; a pairwise loss between sets then
    asks only what is true of both.
    """
    spreads = [max(float(labels.label.std()), 1e-9) for labels in sets]
    pairs = list(zip(sets, spreads, strict=True))
    return JoinedLabels(
        [path for labels in sets for path in labels.paths],
        np.concatenate([(labels.label - labels.label.mean()) / spread for labels, spread in pairs]),
        np.concatenate([labels.macs_m for labels in sets]),
        np.concatenate([np.full(len(labels.paths), labels.label_sd / spread) for labels, spread in pairs]),
    )
