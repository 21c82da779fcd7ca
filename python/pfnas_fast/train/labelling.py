# SPDX-License-Identifier: Apache-2.0
"""Label paths with their quality per budget bin (stage S3 of docs/method.md), and judge the labels' noise."""

from __future__ import annotations

import csv
import json
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import nn

from pfnas_fast.data import DetectionDataset
from pfnas_fast.detection import DetectionSupernet
from pfnas_fast.errors import InputError
from pfnas_fast.filter.report import choose_label
from pfnas_fast.run.folder import Run
from pfnas_fast.space import BudgetSampler, CostModel, Path, Space
from pfnas_fast.train.engine import Progress, stream_id
from pfnas_fast.train.evaluate import PathEvaluator

METRICS = ("ap", "ap50", "neg_loss")
CANDIDATE_LABELS = (*METRICS, "rank_mean")
_VALUES = tuple(f"{metric}{suffix}" for metric in METRICS for suffix in ("", "_a", "_b"))
_COLUMNS = ("index", "bin", "macs_m", "path", *_VALUES, "weights")


@dataclass(frozen=True)
class Labels:
    """Measured paths: each metric on all images and on two halves of them (split-half reliability).

    Attributes:
        paths: n paths.
        bins: Budget bin of each path, int64 [n].
        macs_m: MACs of the whole detector in millions, float64 [n].
        values: Metric name (with suffix `_a`, `_b` for the halves) -> float64 [n].
        label_name: The metric that serves as the label: the one with the best split-half reliability.
        label: float64 [n].
        label_sd: Standard deviation of the label's noise (paired over paths, since all see the same images).
        reliability: Metric -> what `pfnas_fast.filter.label_reliability` says of its halves within budget
            bins.
        macs_t: MACs executed for labelling, 10^12.
    """

    paths: list[Path]
    bins: np.ndarray
    macs_m: np.ndarray
    values: dict[str, np.ndarray]
    label_name: str
    label: np.ndarray
    label_sd: float
    reliability: dict[str, dict[str, float]]
    macs_t: float

    @property
    def ap(self) -> np.ndarray:
        """COCO AP of each path, float64 [n]."""
        return self.values["ap"]

    def halves(self, name: str) -> np.ndarray:
        """A metric on the two halves of the images, float64 [n, 2]."""
        return np.stack([self.values[f"{name}_a"], self.values[f"{name}_b"]], axis=1)


def label_paths(
    net: DetectionSupernet,
    dataset: DetectionDataset,
    *,
    per_bin: int = 16,
    num_bins: int = 8,
    calib: DetectionDataset | None = None,
    paths: Sequence[Path] | None = None,
    run: Run | None = None,
    seed: int = 0,
    stage: str | None = None,
    progress: Progress | None = None,
) -> Labels:
    """Measure `per_bin` paths in each of `num_bins` budget bins of equal width in log MACs.

    Args:
        net: Trained supernet (its weights stay as they are).
        dataset: Images that no weight was trained on.
        per_bin: Paths per bin, the resolution drawn uniformly among those that reach the bin.
        num_bins: Bins over the whole range of the space.
        calib: Images for BatchNorm; default: those that came with `dataset`.
        paths: Measure these paths instead of drawing any.
        run: Rows are appended to `<stage>.csv` as they are measured, and an interrupted call goes on after
            the last.
        seed: Start of the random stream, where no `run` gives one.
        stage: Name of the file and of the random stream. Default: "labels"; with a `run`, later calls on the
            same `Run` object are "labels-2", "labels-3", ... in the order of the calls.
        progress: Called as `progress(stage, done, total, {"ap": ...})`.

    Returns:
        The labels.

    Raises:
        InputError: fewer than 2 images, per_bin or num_bins below 1, or a file of other paths or of other
            weights.

    Source:
        DetOFA, arXiv:2303.13121 (relative performance under similar constraints); bins and noise treatment
        are ours.

    Example:
        >>> import pfnas_fast as pf
        >>> data = pf.load_detection("digits")
        >>> net = pf.DetectionSupernet(pf.load_space("tiny"), num_classes=10, backend="reference")
        >>> images, calib = data.label.subset(range(8)), data.calib.subset(range(8))
        >>> labels = pf.label_paths(net, images, per_bin=1, num_bins=2, calib=calib)
        >>> labels.ap.shape
        (2,)
    """
    if len(dataset) < 2:
        raise InputError(f"label_paths: expected at least 2 images in dataset, got {len(dataset)}")
    seed = run.seed if run is not None else seed
    if stage is None:
        stage = run.next_name("labels") if run is not None else "labels"
    if paths is None:
        drawn, bins = draw_labelled_paths(
            net.cost, per_bin=per_bin, num_bins=num_bins, seed=seed, stage=stage
        )
    else:
        drawn, bins = list(paths), budget_bins(net.cost, net.cost.macs_m(list(paths)), num_bins)
    weights = _fingerprint(net)
    rows = _read_rows(run, stage, drawn, weights)
    evaluator = PathEvaluator(net, dataset, calib=calib)
    for index in range(len(rows), len(drawn)):
        clock = time.perf_counter()
        row = _measure(evaluator, drawn[index], index, int(bins[index])) | {"weights": weights}
        rows.append(row)
        if run is not None:
            _append_row(run, stage, row)
            run.log("measured", stage=stage, index=index, seconds=round(time.perf_counter() - clock, 3))
        if progress is not None:
            progress(stage, index + 1, len(drawn), {"ap": float(row["ap"])})
    macs_m = net.cost.macs_m(drawn)
    macs_t = float(macs_m.sum()) * (len(dataset) + len(evaluator.calib)) / 1e6
    values = {name: np.array([float(row[name]) for row in rows]) for name in _VALUES}
    return _judge(drawn, bins, macs_m, values, macs_t)


def read_labels(run: Run, stage: str, space: Space, *, macs_t: float) -> Labels:
    """Labels as a finished `label_paths` wrote them, without the weights that they were measured with.

    Args:
        run: Where.
        stage: The name they were measured under.
        space: Their space.
        macs_t: MACs that were executed for them, 10^12.
    """
    rows = list(csv.DictReader(run.require(f"{stage}.csv").read_text().splitlines()))
    paths = [space.path_from_json(json.loads(row["path"])) for row in rows]
    bins = np.array([int(row["bin"]) for row in rows], np.int64)
    macs_m = np.array([float(row["macs_m"]) for row in rows])
    values = {name: np.array([float(row[name]) for row in rows]) for name in _VALUES}
    return _judge(paths, bins, macs_m, values, macs_t)


def merge_labels(sets: Sequence[Labels]) -> Labels:
    """Labels that were measured with the same weights, as one set; its label is chosen anew.

    Raises:
        InputError: no sets.
    """
    if not sets:
        raise InputError("merge_labels: expected at least one set of labels for sets, got none")
    return _judge(
        [path for labels in sets for path in labels.paths],
        np.concatenate([labels.bins for labels in sets]),
        np.concatenate([labels.macs_m for labels in sets]),
        {name: np.concatenate([labels.values[name] for labels in sets]) for name in _VALUES},
        sum(labels.macs_t for labels in sets),
    )


def draw_labelled_paths(
    cost: CostModel, *, per_bin: int, num_bins: int, seed: int, stage: str
) -> tuple[list[Path], np.ndarray]:
    """Draw distinct paths for each bin, fewer where a bin has fewer.

    Returns:
        n paths and their bins, int64 [n].
    """
    for name, value in (("per_bin", per_bin), ("num_bins", num_bins)):
        if value < 1:
            raise InputError(f"label_paths: expected at least 1 for {name}, got {value!r}")
    edges = bin_edges_m(cost, num_bins)
    sampler = BudgetSampler(cost)
    rng = np.random.default_rng([seed, stream_id(stage)])
    paths: dict[Path, int] = {}
    for index in range(num_bins):
        found = 0
        for _ in range(20 * per_bin):
            if found == per_bin:
                break
            feasible = sampler.feasible(edges[index], edges[index + 1])
            if not feasible:
                break
            resolution = int(rng.choice(feasible))
            path = cost.space.decode(sampler.sample(rng, 1, edges[index], edges[index + 1], resolution))[0]
            if path not in paths:
                paths[path] = index
                found += 1
    return list(paths), np.array(list(paths.values()), dtype=np.int64)


def bin_edges_m(cost: CostModel, num_bins: int) -> np.ndarray:
    """Edges of bins of equal width in log MACs over the whole range of the space.

    Returns:
        Millions of MACs, float64 [num_bins + 1].
    """
    low, high = cost.range_m()
    edges_m = np.exp(np.linspace(np.log(low), np.log(high), num_bins + 1))
    return edges_m * np.r_[1 - 1e-9, np.ones(num_bins - 1), 1 + 1e-9]


def budget_bins(cost: CostModel, macs_m: np.ndarray, num_bins: int) -> np.ndarray:
    """Bin of each cost, int64 [n]."""
    return np.clip(np.searchsorted(bin_edges_m(cost, num_bins), macs_m, side="right") - 1, 0, num_bins - 1)


def _measure(evaluator: PathEvaluator, path: Path, index: int, bin_index: int) -> dict[str, str]:
    detections, losses = evaluator.detect(path, with_loss=True)
    matches = evaluator.matches(detections)
    halves = {
        "": range(len(detections)),
        "_a": range(0, len(detections), 2),
        "_b": range(1, len(detections), 2),
    }
    neg_loss = {"": -sum(losses) / 2, "_a": -losses[0], "_b": -losses[1]}
    row = {
        "index": str(index),
        "bin": str(bin_index),
        "macs_m": repr(evaluator.net.cost.path_macs_m(path)),
        "path": json.dumps(path.to_json(), separators=(",", ":")),
    }
    for suffix, indices in halves.items():
        found = matches.metrics(images=indices)
        row[f"ap{suffix}"] = repr(found["ap"])
        row[f"ap50{suffix}"] = repr(found["ap50"])
        row[f"neg_loss{suffix}"] = repr(neg_loss[suffix])
    return row


def _fingerprint(net: nn.Module) -> str:
    """A name for this version of the weights: CRC-32 of all parameters, in hexadecimal."""
    crc = 0
    for name, parameter in sorted(net.named_parameters()):
        crc = zlib.crc32(name.encode(), crc)
        crc = zlib.crc32(parameter.detach().cpu().contiguous().numpy().tobytes(), crc)
    return f"{crc:08x}"


def _read_rows(run: Run | None, stage: str, paths: list[Path], weights: str) -> list[dict[str, str]]:
    """Rows measured before an interruption; a last line that a kill cut short is dropped from the file."""
    file = run.path(f"{stage}.csv") if run is not None else None
    if file is None or not file.exists():
        return []
    text = file.read_text()
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        file.write_text(whole)
    rows = list(csv.DictReader(whole.splitlines()))
    for row, path in zip(rows, paths, strict=False):
        if row.get("weights") != weights:
            raise InputError(
                f"label_paths: expected weights {row.get('weights')} (row {row['index']} of {file} was "
                f"measured with them), got {weights}; give another stage= or run="
            )
        if json.loads(row["path"]) != path.to_json():
            raise InputError(
                f"label_paths: expected path {path.to_json()} in row {row['index']} of {file}, "
                f"got {row['path']}"
            )
    return rows[: len(paths)]


def _append_row(run: Run, stage: str, row: dict[str, str]) -> None:
    file = run.path(f"{stage}.csv")
    is_new = not file.exists() or file.stat().st_size == 0
    with file.open("a", newline="") as stream:
        writer = csv.DictWriter(stream, _COLUMNS, lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerow(row)


def _judge(
    paths: list[Path], bins: np.ndarray, macs_m: np.ndarray, values: dict[str, np.ndarray], macs_t: float
) -> Labels:
    for suffix in ("", "_a", "_b"):
        ranks = [np.argsort(np.argsort(values[f"{metric}{suffix}"], kind="stable")) for metric in METRICS]
        values[f"rank_mean{suffix}"] = np.mean(ranks, axis=0) / max(1, len(paths) - 1)
    halves = {name: np.stack([values[f"{name}_a"], values[f"{name}_b"]], axis=1) for name in CANDIDATE_LABELS}
    best, reliability = choose_label(halves, bins)
    return Labels(
        paths, bins, macs_m, values, best, values[best], reliability[best]["noise_sd"], reliability, macs_t
    )
