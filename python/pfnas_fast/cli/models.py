# SPDX-License-Identifier: Apache-2.0
"""Commands that work on one exported detector."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path as FilePath

import torch
from torch import Tensor, nn

from pfnas_fast.data import Roles, evaluate, load_detection, read_image, voc_ap50
from pfnas_fast.detection import Detector
from pfnas_fast.errors import InputError
from pfnas_fast.report.draw import draw_boxes, write_png

_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
_EXPORT_TOLERANCE = 1e-4


def validate(
    model: FilePath, data: str, split: str, seed: int, label_fraction: float = 0.2
) -> dict[str, float]:
    """The 12 COCO numbers of an exported detector on one role of a data set, and VOC's AP50 on VOC data.

    Args:
        model: File of an exported detector.
        data: Detection images, as for a run.
        split: Role: fit, calib, label, select or test.
        seed: The run's seed; the roles are drawn with it.
        label_fraction: The run's share of images with the role label.

    Raises:
        InputError: not a detector, an unknown split, or classes that differ from the detector's.
    """
    detector = Detector.load(model)
    loaded = load_detection(data, roles=Roles(label=label_fraction), seed=seed)
    roles = loaded.roles()
    if split not in roles:
        raise InputError(f"val: expected one of {', '.join(roles)} for --split, got {split!r}")
    dataset = roles[split]
    if tuple(dataset.class_names) != tuple(detector.class_names):
        raise InputError(
            f"val: expected the classes {list(detector.class_names)} in --data, "
            f"got {list(dataset.class_names)}"
        )
    detections = [detector.predict(dataset.read(i), score_threshold=0.05) for i in range(len(dataset))]
    values = dict(evaluate(dataset, detections))
    if loaded.kind == "voc":
        for form in ("voc07", "voc12"):
            values[f"ap50_{form}"] = voc_ap50(dataset, detections, form=form)
    return values


def predict_files(model: FilePath, images: Sequence[FilePath], out: FilePath, threshold: float) -> int:
    """Detect in every image, draw the boxes, and write all detections to `detections.json`; returns the
    number of images.

    Raises:
        InputError: not a detector, no image, a missing file or one that cannot be decoded, or `out` is a
            folder of the images (which the drawn ones would replace) or a file.
    """
    detector = Detector.load(model)
    files = _list_images(images)
    _check_out(out, files)
    out.mkdir(parents=True, exist_ok=True)
    found = {}
    for file, name in zip(files, _png_names(files), strict=True):
        image = read_image(file)
        detection = detector.predict(image, score_threshold=min(threshold, 0.05))
        write_png(out / name, draw_boxes(image, detection, detector.class_names, threshold=threshold))
        kept = detection.scores >= threshold
        found[str(file)] = [
            {
                "box_xyxy_px": [round(v, 2) for v in box],
                "score": round(score, 4),
                "class": detector.class_names[label],
            }
            for box, score, label in zip(
                detection.boxes[kept].tolist(),
                detection.scores[kept].tolist(),
                detection.labels[kept].tolist(),
                strict=True,
            )
        ]
    (out / "detections.json").write_text(json.dumps(found, indent=1) + "\n")
    return len(files)


def export_model(model: FilePath, out: FilePath) -> str:
    """Write the dense network as ONNX or torch.export program, run it again, and compare.

    Returns:
        One line that says what was written and how far it is from the original.

    Raises:
        InputError: an unknown suffix, a missing converter, or a result that differs by more than 1e-4.
    """
    detector = Detector.load(model)
    example = torch.rand(1, 3, *detector.canvas)
    dense = _Dense(detector).eval()
    with torch.no_grad():
        expected = dense(example)
    if out.suffix == ".pt2":
        torch.export.save(torch.export.export(dense, (example,)), str(out))
        with torch.no_grad():
            actual = torch.export.load(str(out)).module()(example)
    elif out.suffix == ".onnx":
        actual = _export_onnx(dense, example, out)
    else:
        raise InputError(f"export: expected a file name ending in .onnx or .pt2 for --out, got {str(out)!r}")
    difference = max(float((a - e).abs().max()) for a, e in zip(actual, expected, strict=True))
    if not difference <= _EXPORT_TOLERANCE:
        raise InputError(
            f"export: expected outputs equal to {_EXPORT_TOLERANCE:g}, got a difference of {difference:g}; "
            f"{out} is not usable"
        )
    height, width = detector.canvas
    return (
        f"{out}: input [1, 3, {height}, {width}], outputs logits, boxes (px), centerness; "
        f"differs by {difference:.1e} from the original"
    )


class _Dense(nn.Module):
    """Normalised canvas in; logits [1, L, K], boxes xyxy px [1, L, 4] and centerness logits [1, L] out."""

    def __init__(self, detector: Detector) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        output = self.detector.dense(images)
        return output.logits, output.boxes, output.centerness


def _export_onnx(dense: nn.Module, example: Tensor, out: FilePath) -> list[Tensor]:
    try:
        import onnxruntime  # pyright: ignore[reportMissingImports] - an optional extra
        import onnxscript  # noqa: F401 # pyright: ignore[reportMissingImports] - torch.onnx needs it
    except ImportError as error:
        raise InputError(
            f"export: expected the packages onnx, onnxscript and onnxruntime for a .onnx file, got: {error}"
        ) from error
    torch.onnx.export(
        dense,
        (example,),
        str(out),
        dynamo=True,
        input_names=["images"],
        output_names=["logits", "boxes", "centerness"],
    )
    session = onnxruntime.InferenceSession(str(out), providers=["CPUExecutionProvider"])
    return [torch.from_numpy(array) for array in session.run(None, {"images": example.numpy()})]


def _check_out(out: FilePath, files: Sequence[FilePath]) -> None:
    if out.exists() and not out.is_dir():
        raise InputError(f"predict: expected a folder for --out, got the file {str(out)!r}")
    if out.resolve() in {file.resolve().parent for file in files} | {file.parent.resolve() for file in files}:
        raise InputError(
            f"predict: expected another folder than the images' for --out, got {str(out)!r}, where drawn "
            "images could replace them"
        )


def _png_names(files: Sequence[FilePath]) -> list[str]:
    """One distinct name per file: x.png, and x-2.png, x-3.png, ... for further files of the stem x."""
    names: dict[str, None] = {}
    for file in files:
        name, count = f"{file.stem}.png", 1
        while name in names:
            count += 1
            name = f"{file.stem}-{count}.png"
        names[name] = None
    return list(names)


def _list_images(images: Sequence[FilePath]) -> list[FilePath]:
    files: list[FilePath] = []
    for item in images:
        if item.is_dir():
            files += sorted(file for file in item.iterdir() if file.suffix.lower() in _IMAGE_SUFFIXES)
        elif item.is_file():
            files.append(item)
        else:
            raise InputError(f"predict: expected an image file or folder for images, got {str(item)!r}")
    if not files:
        raise InputError(
            f"predict: expected at least one image in {[str(item) for item in images]}, got none"
        )
    return list(dict.fromkeys(files))
