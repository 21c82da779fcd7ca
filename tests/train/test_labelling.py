# SPDX-License-Identifier: Apache-2.0
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import pfnas_fast as pf
from pfnas_fast.train.labelling import bin_edges_m, budget_bins, draw_labelled_paths


@pytest.fixture(scope="module")
def net() -> pf.DetectionSupernet:
    torch.manual_seed(0)
    return pf.DetectionSupernet(pf.load_space("tiny"), num_classes=2, backend="reference").eval()


def test_paths_are_spread_over_bins_and_resolutions(net: pf.DetectionSupernet) -> None:
    paths, bins = draw_labelled_paths(net.cost, per_bin=6, num_bins=4, seed=0, stage="labels")
    assert len(set(paths)) == len(paths) == 24
    assert np.bincount(bins).tolist() == [6, 6, 6, 6]
    assert (budget_bins(net.cost, net.cost.macs_m(paths), 4) == bins).all()
    assert {path.resolution for path in paths} == set(net.space.resolutions)
    low, high = net.cost.range_m()
    assert bin_edges_m(net.cost, 4)[0] <= low
    assert bin_edges_m(net.cost, 4)[-1] >= high


def test_labels_and_resume(net: pf.DetectionSupernet, toy_detection: Path, tmp_path: Path) -> None:
    data = pf.load_detection(toy_detection, roles=pf.Roles(label=0.3, calib=8))
    whole = pf.label_paths(net, data.label, per_bin=1, num_bins=3, run=pf.Run(tmp_path / "whole"))
    assert whole.label_name in ("ap", "ap50", "neg_loss", "rank_mean")
    assert len(whole.paths) == len(whole.label) == 3
    assert whole.macs_t > 0

    run = pf.Run(tmp_path / "cut")
    text = (tmp_path / "whole" / "labels.csv").read_text()
    run.path("labels.csv").write_text(
        text[: text.rfind("\n", 0, -1) + 20]
    )  # the last line was cut short by a kill
    done: list[int] = []
    resumed = pf.label_paths(
        net, data.label, per_bin=1, num_bins=3, run=run, progress=lambda s, d, t, i: done.append(d)
    )
    assert done == [3]
    assert run.path("labels.csv").read_text() == text
    assert (resumed.label == whole.label).all()
    assert resumed.label_name == whole.label_name


def test_rows_of_other_paths_are_refused(
    net: pf.DetectionSupernet, toy_detection: Path, tmp_path: Path
) -> None:
    data = pf.load_detection(toy_detection, roles=pf.Roles(label=0.3, calib=8))
    run = pf.Run(tmp_path)
    pf.label_paths(net, data.label, paths=[net.space.min_path()], num_bins=2, run=run, stage="labels")
    with pytest.raises(pf.InputError, match="expected path"):
        pf.label_paths(net, data.label, paths=[net.space.max_path()], num_bins=2, run=run, stage="labels")


def test_rows_of_other_weights_are_refused(toy_detection: Path, tmp_path: Path) -> None:
    data = pf.load_detection(toy_detection, roles=pf.Roles(label=0.3, calib=8))
    torch.manual_seed(0)
    net = pf.DetectionSupernet(pf.load_space("tiny"), num_classes=2, backend="reference").eval()
    paths = [net.space.min_path()]
    pf.label_paths(net, data.label, paths=paths, run=pf.Run(tmp_path))
    assert len(pf.label_paths(net, data.label, paths=paths, run=pf.Run(tmp_path)).label) == 1
    with torch.no_grad():
        next(net.parameters()).view(-1)[0] += 1e-3
    with pytest.raises(pf.InputError, match=r"expected weights [0-9a-f]{8} .*labels\.csv"):
        pf.label_paths(net, data.label, paths=paths, run=pf.Run(tmp_path))


def test_successive_calls_on_one_run_have_names_of_their_own(
    net: pf.DetectionSupernet, toy_detection: Path, tmp_path: Path
) -> None:
    data, run = pf.load_detection(toy_detection, roles=pf.Roles(label=0.3, calib=8)), pf.Run(tmp_path)
    for path in (net.space.min_path(), net.space.max_path()):
        pf.label_paths(net, data.label, paths=[path], run=run)
    assert run.has("labels.csv")
    assert run.has("labels-2.csv")


@pytest.mark.parametrize(
    ("options", "message"), [({"per_bin": 0}, "for per_bin, got 0"), ({"num_bins": 0}, "for num_bins, got 0")]
)
def test_mistakes_are_named(
    net: pf.DetectionSupernet, toy_detection: Path, options: dict[str, Any], message: str
) -> None:
    data = pf.load_detection(toy_detection)
    with pytest.raises(pf.InputError, match=message):
        pf.label_paths(net, data.label, **options)


def test_statistics_are_per_path_and_leave_the_net_alone(
    net: pf.DetectionSupernet, toy_detection: Path
) -> None:
    data = pf.load_detection(toy_detection, roles=pf.Roles(label=0.3, calib=8))
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    evaluator = pf.PathEvaluator(net, data.label)
    small, large = (evaluator.statistics(path) for path in (net.space.min_path(), net.space.max_path()))
    assert small.layers.keys() < large.layers.keys()
    shared = [name for name in small.layers if small.layers[name][0].shape == large.layers[name][0].shape]
    different = [
        name for name in shared if not torch.allclose(small.layers[name][0], large.layers[name][0], rtol=1e-3)
    ]
    assert len(different) > len(shared) / 2
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())


def test_targets_kept_from_other_paths_change_nothing(net: pf.DetectionSupernet, toy_detection: Path) -> None:
    """Three resolutions, batches of two, the last one short: losses as by an evaluator of its own."""
    data = pf.load_detection(toy_detection, roles=pf.Roles(label=0.3, calib=8))
    images = data.label.subset(range(5))
    shared = pf.PathEvaluator(net, images, calib=data.calib, batch_size=2)
    paths = [replace(net.space.min_path(), resolution=r) for r in net.space.resolutions]
    for path in (*paths, *paths):
        alone = pf.PathEvaluator(net, images, calib=data.calib, batch_size=2)
        losses = shared.detect(path, with_loss=True)[1]
        assert np.isfinite(losses).all()
        assert losses == alone.detect(path, with_loss=True)[1]


def test_evaluator_needs_calibration_images(net: pf.DetectionSupernet, toy_detection: Path) -> None:
    data = pf.load_detection(toy_detection)
    with pytest.raises(pf.InputError, match="calibration images for calib, got None"):
        pf.PathEvaluator(net, data.fit)
