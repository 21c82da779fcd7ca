# SPDX-License-Identifier: Apache-2.0
"""Prepared subnets: outputs equal to the reference on random paths; what drops them; copies, threads."""

import copy
import math
import pickle
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pfnas_fast import _C
from pfnas_fast._system import force_cpu_isa, supported_cpu_isas
from pfnas_fast.detection import DetectionSupernet, DetectorOutput
from pfnas_fast.errors import InputError
from pfnas_fast.ops import release_memory
from pfnas_fast.space import Path, load_space, uniform_population
from pfnas_fast.supernet import ClassificationSupernet, recalibrate, use_statistics

NETS = {"classifier": ClassificationSupernet, "detector": DetectionSupernet}


def make(kind: str, space: str = "tiny", *, backend: str = "fast", seed: int = 0) -> Any:
    """A net whose batch normalisations and kernel matrices are far from their initial values."""
    torch.manual_seed(seed)
    net = NETS[kind](load_space(space), num_classes=3, backend=backend)
    for name, values in [*net.named_parameters(), *net.named_buffers()]:
        if name.endswith(("running_var", "bn.weight", "scale.weight")):
            values.data.uniform_(0.7, 1.3)
        elif name.endswith(("running_mean", "bn.bias")):
            values.data.normal_(std=0.1)
        elif "matrix" in name:
            values.data += 0.05 * torch.randn_like(values)
    return net.eval()


def random_paths(net: Any, count: int, seed: int = 0) -> list[Path]:
    return net.space.decode(uniform_population(net.space, np.random.default_rng(seed), count))


def flat(output: Tensor | DetectorOutput) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    return [output.logits, output.ltrb, output.centerness]


def reference(net: Any, images: Tensor, path: Path) -> list[Tensor]:
    """Without the compiled path: gradients are enabled."""
    with torch.enable_grad():
        return [value.detach() for value in flat(net(images, path))]


def assert_close(actual: Any, expected: list[Tensor], exact: list[Tensor]) -> None:
    """Within 1e-5 of the float64 result, or four times as far from it as the float32 reference is."""
    for ours, theirs, truth in zip(flat(actual), expected, exact, strict=True):
        scale = truth.abs().max()
        allowed = max(1e-5, 4 * float((theirs.double() - truth).abs().max() / scale))
        assert float((ours.double() - truth).abs().max() / scale) <= allowed  # NaN fails as well


@pytest.fixture(autouse=True)
def poisoned_scratch() -> None:
    _C.poison_thread_scratch()


@pytest.mark.parametrize("space", ["tiny", "ofa_mbv3_w1.0"])
@pytest.mark.parametrize("kind", NETS)
@torch.no_grad()
def test_equals_the_reference_on_random_paths(kind: str, space: str) -> None:
    net = make(kind, space, backend="reference")
    twin = copy.deepcopy(net).double()
    sizes = [(1, 64, 64), (2, 33, 47), (3, 32, 40), (1, 1, 1), (1, 1, 70), (2, 65, 1)]
    paths = [net.space.max_path(), net.space.min_path(), *random_paths(net, 98)]
    for i, path in enumerate(paths):
        n, height, width = sizes[i % len(sizes)]
        images = torch.randn(n, 3, height, width)
        expected, exact = reference(net, images, path), reference(twin, images.double(), path)
        assert_close(net.prepare(path)(images), expected, exact)


@pytest.mark.parametrize("tier", ["portable", "avx2", "avx512"])
@pytest.mark.parametrize("kind", NETS)
@torch.no_grad()
def test_every_tier(kind: str, tier: str) -> None:
    if tier not in supported_cpu_isas():
        pytest.skip(f"this CPU (or this build) does not run the {tier} tier")
    net = make(kind, backend="reference")
    twin = copy.deepcopy(net).double()
    force_cpu_isa(tier)
    try:
        for path in random_paths(net, 5, seed=1):
            images = torch.randn(2, 3, 48, 80)
            expected = reference(net, images, path)
            assert_close(net.prepare(path)(images), expected, reference(twin, images.double(), path))
    finally:
        force_cpu_isa(None)


@pytest.mark.parametrize("size", [(96, 100), (130, 200), (200, 390), (420, 640)])
@pytest.mark.parametrize("kind", NETS)
@torch.no_grad()
def test_large_maps_run_image_by_image(kind: str, size: tuple[int, int]) -> None:
    """The larger the images, the more blocks run one image at a time; at 420 x 640 nearly all do."""
    net = make(kind, backend="reference")
    twin = copy.deepcopy(net).double()
    for path in [net.space.max_path(), *random_paths(net, 2, seed=2)]:
        images = torch.randn(2, 3, *size)
        expected = reference(net, images, path)
        assert_close(net.prepare(path)(images), expected, reference(twin, images.double(), path))


@pytest.mark.parametrize("tier", ["portable", "avx2", "avx512"])
@pytest.mark.parametrize("kind", NETS)
@torch.no_grad()
def test_same_bits_on_large_maps(kind: str, tier: str, num_threads: None) -> None:
    if tier not in supported_cpu_isas():
        pytest.skip(f"this CPU (or this build) does not run the {tier} tier")
    net = make(kind)
    path, images = net.space.max_path(), torch.randn(9, 3, 100, 140)
    images[4, 1, 50, 70] = math.nan
    force_cpu_isa(tier)
    try:
        alone = [flat(net.prepare(path)(image[None])) for image in images]
        for threads in (1, 2):
            torch.set_num_threads(threads)
            _C.poison_thread_scratch()
            for i, value in enumerate(flat(net.prepare(path)(images))):
                for image in (0, 1, 2, 3, 5, 6, 7, 8):
                    assert torch.equal(value[image], alone[image][i][0])
                    assert not value[image].isnan().any()
                assert value[4].isnan().any()
    finally:
        force_cpu_isa(None)


@pytest.mark.parametrize("kind", NETS)
@torch.no_grad()
def test_statistics_of_a_path(kind: str) -> None:
    """prepare(path, statistics) and forward under use_statistics agree with the reference backend."""
    net, plain = make(kind), make(kind, backend="reference")
    images = torch.randn(2, 3, 64, 96)
    for path in random_paths(net, 3):
        statistics = recalibrate(plain, path, [torch.randn(4, 3, 64, 96)])
        with use_statistics(plain, statistics):
            expected = flat(plain(images, path))
        with use_statistics(net, statistics):
            implicit = flat(net(images, path))
        for ours, given, wanted in zip(
            flat(net.prepare(path, statistics)(images)), implicit, expected, strict=True
        ):
            torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-4)
            assert torch.equal(ours, given)


@torch.no_grad()
def test_forward_uses_it_only_where_it_stands_for_forward() -> None:
    net = make("classifier")
    path, images = net.space.min_path(), torch.randn(2, 3, 32, 32)
    assert torch.equal(net(images, path), net.prepare(path)(images))
    seen: list[Any] = []
    handle = net.backbone.blocks[0].register_forward_hook(lambda *_: seen.append(1))
    net(images, path)
    assert seen  # a hook must be called
    handle.remove()
    with torch.enable_grad():
        assert net(images, path).requires_grad
    recalibrate(net, path, [images])  # reads the statistics of every layer


@pytest.mark.parametrize("layout", ["nchw", "channels_last", "sliced", "flipped"])
@torch.no_grad()
def test_images_of_any_layout(layout: str) -> None:
    net = make("classifier")
    images = torch.randn(2, 3, 32, 40)
    expected = net.prepare(net.space.max_path())(images)
    other = {
        "nchw": images,
        "channels_last": images.contiguous(memory_format=torch.channels_last),
        "sliced": torch.cat([images, images], dim=3)[..., 40:],
        "flipped": images.transpose(2, 3).contiguous().transpose(2, 3),
    }[layout]
    assert torch.equal(net.prepare(net.space.max_path())(other), expected)


def test_switching_paths_shares_the_weights() -> None:
    net = make("detector")
    one, two = net.prepare(net.space.max_path()), net.prepare(net.space.min_path())
    assert one._packed is two._packed
    assert net.prepare(net.space.max_path()) is one


@pytest.mark.parametrize("change", ["train", "load", "in place", "dropped", "moved"])
@torch.no_grad()
def test_changed_weights_drop_it(change: str) -> None:
    net = make("classifier")
    path, images = net.space.max_path(), torch.randn(1, 3, 32, 32)
    old = net.prepare(path)
    before = old(images)
    if change == "train":
        net.train().eval()
    elif change == "load":
        net.load_state_dict(make("classifier", seed=1).state_dict())
    elif change == "in place":
        net.backbone.blocks[0].expand_conv.weight.mul_(2)
    elif change == "dropped":
        net.drop_prepared()
    else:
        net.double().float()
    with pytest.raises(InputError, match="call prepare\\(\\) again"):
        old(images)
    after = net.prepare(path)(images)
    torch.testing.assert_close(after, reference(net, images, path)[0], rtol=1e-4, atol=1e-4)
    assert torch.equal(after, before) == (change not in ("load", "in place"))


@torch.no_grad()
def test_copies_stand_on_their_own() -> None:
    net = make("detector")
    path, images = random_paths(net, 1)[0], torch.randn(2, 3, 48, 64)
    subnet = net.prepare(path)
    expected = flat(subnet(images))
    for other in (copy.deepcopy(subnet), pickle.loads(pickle.dumps(subnet))):
        assert all(torch.equal(a, b) for a, b in zip(flat(other(images)), expected, strict=True))
    twin = copy.deepcopy(net)
    twin.backbone.stem.conv.weight.zero_()
    assert not torch.equal(flat(twin.prepare(path)(images))[0], expected[0])
    assert all(torch.equal(a, b) for a, b in zip(flat(subnet(images)), expected, strict=True))


@torch.no_grad()
def test_two_threads_run_two_paths_of_one_net() -> None:
    net = make("classifier")
    images = torch.randn(2, 3, 48, 48)
    subnets = [net.prepare(path) for path in (net.space.max_path(), net.space.min_path())]
    expected = [subnet(images) for subnet in subnets]
    wrong: list[int] = []

    def work(index: int) -> None:
        for _ in range(20):
            if not torch.equal(subnets[index](images), expected[index]):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@torch.no_grad()
def test_memory_may_be_released_while_another_thread_computes() -> None:
    """What a call uses stays until the thread asks for it again, not only until it asks for anything."""
    net = make("classifier")
    images = torch.randn(2, 3, 96, 96)
    subnet = net.prepare(net.space.max_path())
    expected, results = subnet(images), []
    thread = threading.Thread(target=lambda: results.extend(subnet(images) for _ in range(30)))
    thread.start()
    while thread.is_alive():
        release_memory()
    assert len(results) == 30
    assert all(torch.equal(result, expected) for result in results)


@pytest.fixture
def num_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@torch.no_grad()
def test_same_bits_for_any_number_of_threads(num_threads: None) -> None:
    net = make("detector")
    path, images = net.space.max_path(), torch.randn(5, 3, 64, 96)
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(flat(net.prepare(path)(images)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@torch.no_grad()
def test_same_bits_alone_and_in_a_batch() -> None:
    net = make("classifier")
    images = torch.randn(9, 3, 40, 40)
    subnet = net.prepare(net.space.max_path())
    assert torch.equal(subnet(images)[8], subnet(images[8:])[0])


@torch.no_grad()
def test_nan_in_gives_nan_out_of_its_image_only() -> None:
    net = make("classifier")
    images = torch.randn(3, 3, 32, 32)
    images[1, 0, 16, 16] = math.nan
    logits = net.prepare(net.space.max_path())(images)
    assert logits[1].isnan().all()
    assert not logits[::2].isnan().any()


@torch.no_grad()
def test_scratch_does_not_grow_and_can_be_released() -> None:
    net = make("classifier")
    images = torch.randn(1, 3, 32, 32)
    _C.release_scratch()
    for path in [*random_paths(net, 50), net.space.max_path()]:
        net.prepare(path)(images)
    held = _C.scratch_bytes()
    assert 0 < held < 64 << 20
    for path in random_paths(net, 1000, seed=3):
        net.prepare(path)(images)
    assert _C.scratch_bytes() <= held + (1 << 20)
    _C.release_scratch()
    assert _C.scratch_bytes() < held


def test_mistakes_are_named() -> None:
    net = make("classifier")
    path = net.space.min_path()
    other = make("classifier", "ofa_mbv3_w1.0")
    with pytest.raises(InputError, match="expected 4 stages and 12 blocks for path, got 5 and 20"):
        net.prepare(other.space.min_path())
    with pytest.raises(InputError, match="expected a net in eval mode"):
        copy.deepcopy(net).train().prepare(path)
    with pytest.raises(TypeError, match="expected a net of float32 on the CPU, got float64"):
        copy.deepcopy(net).double().prepare(path)
    statistics = recalibrate(net, path, [torch.randn(4, 3, 32, 32)])
    with pytest.raises(InputError, match="expected statistics of"):
        net.prepare(net.space.max_path(), statistics)
    detector = make("detector")
    foreign = recalibrate(detector, detector.space.min_path(), [torch.randn(4, 3, 32, 32)])
    with pytest.raises(InputError, match="expected statistics of this net, got the layer 'neck"):
        net.prepare(path, foreign)
    with pytest.raises(InputError, match=r"expected shape \[N, 3, H, W\]"):
        net.prepare(path)(torch.zeros(1, 4, 8, 8))
    with pytest.raises(TypeError, match="expected float32 on the CPU for images, got float64"):
        net.prepare(path)(torch.zeros(1, 3, 8, 8).double())


@torch.no_grad()
def test_empty_batch() -> None:
    net = make("classifier")
    assert net.prepare(net.space.min_path())(torch.zeros(0, 3, 32, 32)).shape == (0, 3)


def test_state_dict_is_unchanged() -> None:
    net = make("classifier")
    names = set(net.state_dict())
    net.prepare(net.space.min_path())
    assert set(net.state_dict()) == names
    assert isinstance(net, nn.Module)


@pytest.mark.parametrize("change", ["call", "parameter", "assign", "buffer", "layer", "double"])
@torch.no_grad()
def test_forward_sees_replaced_parts(change: str) -> None:
    net, other = make("classifier"), make("classifier", seed=1)
    path, images = net.space.max_path(), torch.randn(2, 3, 32, 32)
    net(images, path)  # packs
    ours, theirs = net.backbone.blocks[0], other.backbone.blocks[0]
    if change == "call":
        state = dict(other.named_parameters())
        actual = torch.func.functional_call(net, state, (images, path))
        with torch.enable_grad():
            expected = torch.func.functional_call(net, state, (images, path)).detach()
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(net(images, path), reference(net, images, path)[0], rtol=1e-4, atol=1e-4)
        return
    if change == "parameter":
        ours.expand_conv.weight = nn.Parameter(theirs.expand_conv.weight.clone())
    elif change == "assign":
        ours.load_state_dict(theirs.state_dict(), assign=True)
    elif change == "buffer":
        ours.expand_bn.running_mean = theirs.expand_bn.running_mean.clone()
    elif change == "layer":
        net.backbone.blocks[0] = theirs
    else:
        ours.double()
        with pytest.raises((RuntimeError, TypeError)):  # what the layers say; not stale weights
            net(images, path)
        return
    torch.testing.assert_close(net(images, path), reference(net, images, path)[0], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_statistics_lent_to_a_part_go_through_the_layers() -> None:
    net = make("classifier")
    path, images = net.space.min_path(), torch.randn(2, 3, 32, 32)
    statistics = recalibrate(net, path, [torch.randn(4, 3, 32, 32)])
    with use_statistics(net.backbone, statistics.within("backbone")):
        actual, expected = net(images, path), reference(net, images, path)[0]
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_nets_made_in_inference_mode_go_through_the_layers() -> None:
    with torch.inference_mode():
        net = make("classifier")
        path, images = net.space.min_path(), torch.randn(1, 3, 32, 32)
        assert net(images, path).shape == (1, 3)
        with pytest.raises(TypeError, match="inference mode"):
            net.prepare(path)


def test_a_detector_refuses_foreign_paths() -> None:
    net = make("detector")
    narrow = net.extract(net.space.min_path(), None)
    with pytest.raises(InputError, match="prepare: expected"):
        narrow.prepare(net.space.max_path())
    half = make("classifier")
    half.backbone.blocks[0].train()
    with pytest.raises(InputError, match=r"got 'backbone\.blocks\.0' in training mode"):
        half.prepare(half.space.min_path())
