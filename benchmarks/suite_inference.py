# SPDX-License-Identifier: Apache-2.0
"""Prepared subnets against the extracted subnet in torch (B-static) and in onnxruntime (ORT).

`inference/n16/max` and so on: classifiers of ofa_mbv3_w1.0 with 1000 classes at 160 px, from
``net.prepare(path)``.
`inference/detector/...`: whole detectors (backbone, neck, head) with 80 classes at 320 px, up to their raw
predictions.

B-static: `get_active_subnet`, channels_last, eval, no gradients. ORT: the ONNX export of the same module, all
optimisations, intra_op threads as ours, one input array of ordinary NCHW layout. All three sides get the same
images; nothing is copied for one side only. Without onnxruntime (`pip install onnxruntime onnx onnxscript`)
its rows are left out, and stderr says so. threads/...: ours with one thread against ours with `--threads`
threads; only listed with more than one.
"""

import itertools
import pathlib
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from importlib.util import find_spec
from typing import Any

import torch
from harness import Comparison, on_one_thread
from torch import Tensor, nn

from pfnas_fast import DetectionSupernet
from pfnas_fast.space import load_space
from pfnas_fast.supernet import ClassificationSupernet, recalibrate

__all__ = ["comparisons"]

PATHS = {"max": (7, 6, 4), "mid": (5, 4, 3), "min": (3, 3, 2)}  # kernel size, expand ratio, depth
CLASSIFIER_PX = 160
DETECTOR_PX = 320


class DenseRaw(nn.Module):
    """A detector up to its raw predictions as one tensor [N, L, K + 5], as export wants it."""

    def __init__(self, detector: Any) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, images: Tensor) -> Tensor:
        output = self.detector.dense(images)
        return torch.cat([output.logits, output.ltrb, output.centerness[..., None]], dim=-1)


@lru_cache(maxsize=1)
def net_of(kind: str) -> Any:
    torch.manual_seed(0)
    space = load_space("ofa_mbv3_w1.0")
    if kind == "classifier":
        return ClassificationSupernet(space, num_classes=1000).eval()
    return DetectionSupernet(space, num_classes=80).eval()


@lru_cache(maxsize=1)
def problem(kind: str, path_name: str) -> tuple[Any, nn.Module, int]:
    """(prepared subnet, the same subnet as a plain module, image side in px)."""
    net = net_of(kind)
    size_px = CLASSIFIER_PX if kind == "classifier" else DETECTOR_PX
    kernel, expand, depth = PATHS[path_name]
    path = net.set_active_subnet(ks=kernel, e=expand, d=depth, resolution=size_px)
    statistics = recalibrate(net, path, [torch.randn(4, 3, size_px, size_px)])
    plain = net.get_active_subnet(statistics=statistics).eval()
    if kind == "detector":
        plain = DenseRaw(plain)
    return net.prepare(path, statistics), plain.to(memory_format=torch.channels_last), size_px


def raw(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    return torch.cat([output.logits, output.ltrb, output.centerness[..., None]], dim=-1)


def onnx_session(plain: nn.Module, images: Tensor) -> Callable[[], Any]:
    """The module in onnxruntime, bound to `images`."""
    import onnxruntime as ort  # pyright: ignore[reportMissingImports]

    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "net.onnx"
        torch.onnx.export(plain.to(memory_format=torch.contiguous_format), (images,), file, dynamo=True)
        options = ort.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.inter_op_num_threads = 1
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        session = ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: images.contiguous().numpy()}
    return lambda: session.run(None, feed)[0]


def inference(name: str, kind: str, path_name: str, batch: int, baseline: str) -> Comparison:
    """One row."""
    subnet, plain, size_px = problem(kind, path_name)
    images = torch.randn(batch, 3, size_px, size_px)

    @torch.no_grad()
    def ours() -> Any:
        return subnet(images)

    if baseline == "ort":
        theirs = onnx_session(plain, images)
    else:
        tuned = images.contiguous(memory_format=torch.channels_last)
        theirs = torch.no_grad()(lambda: plain(tuned))

    def check() -> None:
        expected = torch.as_tensor(theirs())
        error = float((raw(ours()) - expected).abs().max() / expected.abs().max())
        assert error <= 1e-3, f"{name}: the two sides differ by {error:.1e}"

    return Comparison(name, ours, theirs, check, baseline)


def threads(path_name: str, batch: int) -> Comparison:
    """More threads against one."""
    name = f"threads/inference/n{batch}/{path_name}"
    both = inference(name, "classifier", path_name, batch, "b-static")
    return Comparison(name, both.ours, on_one_thread(both.ours), both.check, baseline="1thread")


def baselines() -> tuple[str, ...]:
    """What is installed."""
    missing = [name for name in ("onnxruntime", "onnx", "onnxscript") if find_spec(name) is None]
    if missing:
        print(
            f"inference: rows against ort are left out: not installed: {', '.join(missing)}", file=sys.stderr
        )
        return ("b-static",)
    return ("b-static", "ort")


def comparisons() -> Iterator[tuple[str, Callable[[], Comparison]]]:
    """Every row's name with the function that prepares it."""
    against = baselines()
    for kind, batches in (("classifier", (16, 1)), ("detector", (8, 1))):
        prefix = "inference" if kind == "classifier" else "inference/detector"
        for batch, path_name, baseline in itertools.product(batches, PATHS, against):
            name = f"{prefix}/n{batch}/{path_name}"
            yield name, partial(inference, name, kind, path_name, batch, baseline)
    if torch.get_num_threads() > 1:
        for path_name in PATHS:
            yield f"threads/inference/n16/{path_name}", partial(threads, path_name, 16)
