# SPDX-License-Identifier: Apache-2.0
"""Statistics per path: exact, and never left behind in the model."""

import io
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pfnas_fast import _C
from pfnas_fast._system import force_cpu_isa, supported_cpu_isas
from pfnas_fast.detection import DetectionSupernet
from pfnas_fast.errors import InputError
from pfnas_fast.space import load_space, uniform_population
from pfnas_fast.supernet import (
    Backbone,
    BNStatistics,
    ClassificationSupernet,
    DynamicBatchNorm2d,
    recalibrate,
    recalibrate_paths,
    set_running_statistics,
    use_statistics,
)


@pytest.fixture
def net() -> ClassificationSupernet:
    torch.manual_seed(0)
    return ClassificationSupernet(load_space("tiny"), num_classes=4)


@pytest.fixture
def batches() -> list[Tensor]:
    torch.manual_seed(1)
    return [
        torch.randn(n, 3, 64, 64) * scale + shift for n, scale, shift in ((5, 1, 0), (3, 2, 1), (2, 0.5, -3))
    ]


def snapshot(model: nn.Module) -> dict[str, Any]:
    state: dict[str, Any] = {name: value.clone() for name, value in model.state_dict().items()}
    state.update({"mode " + name: module.training for name, module in model.named_modules()})
    for name, module in model.named_modules():
        if isinstance(module, DynamicBatchNorm2d):
            state["lent " + name] = (module.statistics is None, module.collector is None)
    return state


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert before.keys() == after.keys()
    for name, value in before.items():
        same = torch.equal(value, after[name]) if isinstance(value, Tensor) else value == after[name]
        assert same, name


def test_moments_are_those_of_all_values_at_once(net, batches) -> None:
    """Unequal batches with very different means: averaging their variances would be far off."""
    statistics = recalibrate(net, net.space.min_path(), batches)
    mean, var = statistics.layers["backbone.stem.bn"]
    with torch.no_grad():
        values = torch.cat([net.backbone.stem.conv(b) for b in batches]).double()
    torch.testing.assert_close(mean.double(), values.mean((0, 2, 3)), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(var.double(), values.var((0, 2, 3), correction=0), rtol=1e-5, atol=1e-6)


def test_one_batch_reproduces_training_mode(net, batches) -> None:
    path = net.space.max_path()
    statistics = recalibrate(net, path, batches[:1])
    net.tail.dropout.p = 0.0
    with torch.no_grad():
        trained = net.train()(batches[0], path)
        with use_statistics(net, statistics):
            assert not net.training
            evaluated = net(batches[0], path)
    assert float(evaluated.std()) > 1e-3
    torch.testing.assert_close(evaluated, trained, rtol=1e-4, atol=1e-5)


def test_covers_exactly_the_layers_of_the_path_in_its_widths(net, batches) -> None:
    space = net.space
    for path in space.decode(uniform_population(space, np.random.default_rng(0), 3)):
        statistics = recalibrate(net, path, batches)
        expected = {
            "backbone.stem.bn": 8,
            "backbone.first_block.depth.bn": 8,
            "backbone.first_block.project.bn": 8,
        }
        expected["tail.feature.bn"] = space.tail.feature_channels
        for block in space.blocks:
            if block.position < path.depths[block.stage]:
                name, mid = (
                    f"backbone.blocks.{block.index}",
                    block.mid_channels(path.expand_ratios[block.index]),
                )
                expected.update({f"{name}.expand_bn": mid, f"{name}.depth_bn": mid})
                expected[f"{name}.project_bn"] = block.out_channels
        assert {n: mean.shape[0] for n, (mean, _) in statistics.layers.items()} == expected
        assert all(
            mean.shape == var.shape and not mean.requires_grad for mean, var in statistics.layers.values()
        )


@pytest.mark.parametrize("training", [True, False])
def test_leaves_the_model_as_it_was(net, batches, training: bool) -> None:
    net.train(training)
    net.backbone.stem.bn.eval()  # a frozen layer must stay frozen
    before = snapshot(net)
    statistics = recalibrate(net, net.space.min_path(), batches)
    with use_statistics(net, statistics):
        net(batches[0], net.space.min_path())
    assert_same(before, snapshot(net))


def test_restores_after_exceptions(net, batches) -> None:
    before = snapshot(net)

    def failing():
        yield batches[0]
        raise KeyError("disk")

    with pytest.raises(KeyError, match="disk"):
        recalibrate(net, None, failing())
    assert_same(before, snapshot(net))
    statistics = recalibrate(net, None, batches)
    with pytest.raises(KeyError, match="inside"), use_statistics(net, statistics):
        raise KeyError("inside")
    assert_same(before, snapshot(net))


def test_contexts_nest(net, batches) -> None:
    path, x = net.space.min_path(), batches[0]
    first, second = recalibrate(net, path, batches[:1]), recalibrate(net, path, batches[1:])
    with torch.no_grad(), use_statistics(net, first):
        expected = net(x, path)
        with use_statistics(net, second):
            assert not torch.equal(net(x, path), expected)
        assert torch.equal(net(x, path), expected)


def test_recalibrating_inside_lent_statistics_measures_afresh(net, batches) -> None:
    path = net.space.min_path()
    plain, other = recalibrate(net, path, batches), recalibrate(net, path, batches[:1])
    with use_statistics(net, other):
        nested = recalibrate(net, path, batches)
    for name, (mean, var) in plain.layers.items():
        assert torch.equal(nested.layers[name][0], mean)
        assert torch.equal(nested.layers[name][1], var)


def test_statistics_of_another_path_are_refused(net, batches) -> None:
    space = net.space
    narrow, wide = space.path(ks=3, e=2, d=2), space.path(ks=3, e=3, d=2)
    deep = space.path(ks=3, e=2, d=3)
    with use_statistics(net, recalibrate(net, narrow, batches)):
        with pytest.raises(InputError, match=r"expected statistics of 24 channels .* got 16 channels"):
            net(batches[0], wide)
        with pytest.raises(InputError, match="got 0 channels"):
            net(batches[0], deep)


def test_statistics_of_another_model_are_refused(net, batches) -> None:
    statistics = recalibrate(net, None, batches)
    with (
        pytest.raises(InputError, match=r"got the layer 'backbone\.stem\.bn'"),
        use_statistics(net.backbone, statistics),
    ):
        pass
    with use_statistics(net.backbone, statistics.within("backbone")):
        net.backbone(batches[0], net.active_path)


def test_any_module_with_dynamic_norms_through_a_callable(batches) -> None:
    class Detector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk = Backbone(load_space("tiny"))
            self.levels = nn.ModuleList(DynamicBatchNorm2d(c) for c in self.trunk.space.tap_channels)

    model = Detector()
    path = model.trunk.space.min_path()

    def forward(images: Tensor) -> list[Tensor]:
        return [norm(f) for norm, f in zip(model.levels, model.trunk(images, path), strict=True)]

    statistics = recalibrate(model, None, batches, forward=forward)
    assert {"levels.0", "levels.1", "levels.2"} <= statistics.layers.keys()
    with torch.no_grad(), use_statistics(model, recalibrate(model, None, batches[:1], forward=forward)):
        normalised = forward(batches[0])
    for feature in normalised:
        torch.testing.assert_close(feature.mean((0, 2, 3)), torch.zeros(feature.shape[1]), rtol=0, atol=1e-4)


def test_a_layer_used_twice_pools_both_uses() -> None:
    norm = DynamicBatchNorm2d(3)
    x, y = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 2, 2) + 5
    statistics = recalibrate(norm, None, [x], forward=lambda images: (norm(images), norm(y)))
    values = torch.cat([x.flatten(2), y.flatten(2)], dim=2)
    mean, var = statistics.layers[""]
    torch.testing.assert_close(mean, values.mean((0, 2)))
    torch.testing.assert_close(var, values.var((0, 2), correction=0))


def test_what_cannot_be_measured_is_refused(net) -> None:
    with pytest.raises(InputError, match="expected at least one batch for batches, got none"):
        recalibrate(net, None, [])
    with pytest.raises(InputError, match="expected a model with DynamicBatchNorm2d, got Linear"):
        recalibrate(nn.Linear(2, 2), None, [])
    with pytest.raises(
        InputError, match=r"more than one value per channel .* got input \(1, \d+, 1, 1\) at backbone"
    ):
        recalibrate(net, None, [torch.randn(1, 3, 32, 32)])


def test_statistics_travel_through_files(net, batches) -> None:
    statistics = recalibrate(net, None, batches)
    buffer = io.BytesIO()
    torch.save(statistics.to_dict(), buffer)
    buffer.seek(0)
    loaded = BNStatistics.from_dict(torch.load(buffer, weights_only=True))
    for other in (loaded, pickle.loads(pickle.dumps(statistics))):
        assert other.layers.keys() == statistics.layers.keys()
        for name, pair in statistics.layers.items():
            assert all(torch.equal(a, b) for a, b in zip(pair, other.layers[name], strict=True))
    with pytest.raises(TypeError):
        statistics.layers["backbone.stem.bn"] = (torch.zeros(1), torch.zeros(1))  # type: ignore[index]
    with pytest.raises(InputError, match="expected 'mean' and 'var' with the same layers for entries"):
        BNStatistics.from_dict({"mean": {}})


def test_set_running_statistics_writes_the_active_slices(net, batches) -> None:
    path = net.set_active_subnet(ks=3, e=2, d=1)
    before = snapshot(net)
    statistics = set_running_statistics(net, [(images, None) for images in batches])
    norm = net.backbone.blocks[0].depth_bn
    mid = statistics.layers["backbone.blocks.0.depth_bn"][0].shape[0]
    assert torch.equal(norm.running_mean[:mid], statistics.layers["backbone.blocks.0.depth_bn"][0])
    assert torch.equal(norm.running_mean[mid:], before["backbone.blocks.0.depth_bn.running_mean"][mid:])
    assert torch.equal(norm.weight, before["backbone.blocks.0.depth_bn.weight"])
    with torch.no_grad():
        plain = net.eval()(batches[0])
        with use_statistics(net, recalibrate(net, path, batches)):
            torch.testing.assert_close(net(batches[0], path), plain)


@pytest.mark.parametrize("kind", [ClassificationSupernet, DetectionSupernet])
def test_backends_measure_the_same(kind: Any) -> None:
    nets = []
    for backend in ("reference", "fast"):
        torch.manual_seed(0)
        nets.append(kind(load_space("tiny"), num_classes=4, backend=backend))
    reference, fast = nets
    batches = [torch.randn(n, 3, 40, 56) * scale + 1 for n, scale in ((3, 1), (2, 0.5))]
    for path in reference.space.decode(uniform_population(reference.space, np.random.default_rng(1), 5)):
        before = snapshot(fast)
        expected, actual = recalibrate(reference, path, batches), recalibrate(fast, path, batches)
        assert_same(before, snapshot(fast))
        assert actual.layers.keys() == expected.layers.keys()
        for name, (mean, var) in expected.layers.items():
            scale = float(var.max().sqrt())
            torch.testing.assert_close(actual.layers[name][0], mean, rtol=0, atol=1e-4 * scale, msg=name)
            torch.testing.assert_close(actual.layers[name][1], var, rtol=0, atol=1e-4 * scale**2, msg=name)


def test_one_op_per_block_where_a_whole_path_may_not_be_compiled(batches, monkeypatch) -> None:
    net = ClassificationSupernet(load_space("tiny"), num_classes=4, backend="fast")
    block, calls, path = net.backbone.blocks[0], [], net.space.min_path()
    compiled = recalibrate(net, path, batches)
    run = block._train
    monkeypatch.setattr(block, "_train", lambda *args: calls.append(1) or run(*args))
    recalibrate(net, path, batches)
    assert not calls
    handle = net.tail.register_forward_hook(lambda *_: None)
    by_blocks = recalibrate(net, path, batches)
    assert len(calls) == len(batches)
    handle.remove()
    handle = block.depth_conv.register_forward_hook(lambda *_: None)
    by_layers = recalibrate(net, path, batches)
    assert len(calls) == len(batches)
    handle.remove()

    def watched_from_the_second_batch():
        yield batches[0]
        handle = block.depth_conv.register_forward_hook(lambda *_: None)
        yield from batches[1:2]
        handle.remove()
        yield from batches[2:]

    mixed = recalibrate(net, path, watched_from_the_second_batch())
    for other in (by_blocks, by_layers, mixed):
        for name, (mean, var) in compiled.layers.items():
            torch.testing.assert_close(other.layers[name][0], mean, rtol=1e-3, atol=1e-3, msg=name)
            torch.testing.assert_close(other.layers[name][1], var, rtol=1e-3, atol=1e-3, msg=name)


@pytest.mark.parametrize("kind", [ClassificationSupernet, DetectionSupernet])
@pytest.mark.parametrize("tier", ["portable", "avx2", "avx512"])
def test_compiled_moments_are_exact(kind: Any, tier: str) -> None:
    """Against float64 layers, for images far from zero, odd sizes and maps of one pixel."""
    if tier not in supported_cpu_isas():
        pytest.skip(f"this CPU (or this build) does not run the {tier} tier")
    torch.manual_seed(0)
    net = kind(load_space("tiny"), num_classes=4, backend="fast")
    twin = kind(load_space("tiny"), num_classes=4)
    twin.load_state_dict(net.state_dict())
    twin.double()
    shapes = [(3, 33, 47), (2, 64, 40), (9, 17, 17), (2, 90, 1), (2, 1, 70)]
    paths = net.space.decode(uniform_population(net.space, np.random.default_rng(3), len(shapes)))
    force_cpu_isa(tier)
    _C.poison_thread_scratch()
    try:
        for path, shape in zip(paths, shapes, strict=True):
            batch = torch.randn(shape[0], 3, *shape[1:]) + 5
            actual, expected = recalibrate(net, path, [batch]), recalibrate(twin, path, [batch.double()])
            assert actual.layers.keys() == expected.layers.keys()
            for name, (mean, var) in expected.layers.items():
                # A batch of few values divides by small deviations, which magnify rounding.
                limit = 1e-4 if shape[0] * shape[1] * shape[2] > 4000 else 1e-2
                scale = float(var.max().sqrt()) + 1e-3
                assert float((actual.layers[name][0] - mean).abs().max()) <= limit * scale, name
                assert float((actual.layers[name][1] - var).abs().max()) <= limit * scale**2, name
    finally:
        force_cpu_isa(None)


def test_same_bits_for_any_number_of_threads() -> None:
    net = DetectionSupernet(load_space("tiny"), num_classes=4, backend="fast")
    batch, before, results = torch.randn(9, 3, 64, 96), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(recalibrate(net, net.space.max_path(), [batch]))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for name, (mean, var) in results[0].layers.items():
            assert torch.equal(other.layers[name][0], mean), name
            assert torch.equal(other.layers[name][1], var), name


def test_nan_reaches_the_moments() -> None:
    net = DetectionSupernet(load_space("tiny"), num_classes=4, backend="fast")
    batch = torch.randn(2, 3, 64, 64)
    batch[1, 0, 32, 32] = torch.nan
    statistics = recalibrate(net, net.space.min_path(), [batch])
    assert all(bool(mean.isnan().any()) for mean, _ in statistics.layers.values())


@pytest.mark.parametrize("backend", ["reference", "fast"])
def test_several_paths_in_one_pass(batches, backend: str) -> None:
    net = ClassificationSupernet(load_space("tiny"), num_classes=4, backend=backend)
    paths = [net.space.min_path(), net.space.max_path()]
    together = recalibrate_paths(net, paths, iter(batches))  # a loader can be read once only
    for path, statistics in zip(paths, together, strict=True):
        alone = recalibrate(net, path, batches)
        assert statistics.layers.keys() == alone.layers.keys()
        for name, (mean, var) in alone.layers.items():
            assert torch.equal(statistics.layers[name][0], mean)
            assert torch.equal(statistics.layers[name][1], var)


@pytest.mark.parametrize("backend", ["reference", "fast"])
def test_one_value_per_channel_is_refused(backend: str) -> None:
    net = ClassificationSupernet(load_space("tiny"), num_classes=4, backend=backend)
    with pytest.raises(InputError, match="more than one value per channel"):
        recalibrate(net, net.space.min_path(), [torch.zeros(1, 3, 2, 2)])
