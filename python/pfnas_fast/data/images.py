# SPDX-License-Identifier: Apache-2.0
"""Pixels: decode, fit to a canvas, normalise, and check files before a long job starts."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from pfnas_fast.data.datasets import ClassificationDataset, DetectionDataset, Record, Target
from pfnas_fast.errors import InputError

PAD_VALUE = 114  # the usual neutral grey of letterboxed detectors; near zero once normalised
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".gif")
_MEAN = (0.485, 0.456, 0.406)
_STD = (0.229, 0.224, 0.225)


def read_image(path: str | Path) -> Tensor:
    """Decode an image file to uint8 RGB, [3, H, W]; orientation tags are not applied.

    Raises:
        InputError: missing, truncated or otherwise undecodable, by file name.

    Example:
        >>> import tempfile; from PIL import Image
        >>> with tempfile.NamedTemporaryFile(suffix=".png") as file:
        ...     Image.new("RGB", (4, 3)).save(file.name)
        ...     read_image(file.name).shape
        torch.Size([3, 3, 4])
    """
    return _to_tensor(_decode(path))


def read_record(record: Record) -> Tensor:
    """Decode the file of a detection record and check its size against the annotation.

    An orientation tag is applied exactly if the annotated size is that of the turned image (annotation tools
    differ).

    Raises:
        InputError: undecodable, or neither orientation has the annotated size; by file name.
    """
    image = _decode(record.source)
    expected = (record.width, record.height)
    if image.size != expected:
        turned = ImageOps.exif_transpose(image)
        if turned.size != expected:
            raise InputError(
                f"read: expected {expected[0]}x{expected[1]} px, as annotated, for image {record.source}, "
                f"got {image.size[0]}x{image.size[1]}"
            )
        image = turned
    return _to_tensor(image)


def _decode(path: str | Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"read: expected a readable image for file {path}, got {_reason(error)}") from error


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "no such file"
    return " ".join(str(error).split()) or type(error).__name__


def _to_tensor(image: Image.Image) -> Tensor:
    return TF.pil_to_tensor(image)


def letterbox(image: Tensor, canvas: tuple[int, int]) -> tuple[Tensor, float]:
    """Resize with the aspect kept until the image just fits, anchor it top left, pad with grey.

    Args:
        image: uint8 RGB, [3, H, W].
        canvas: (height, width) of the result in px.

    Returns:
        uint8 [3, height, width] and the scale: a point x of the image lies at x * scale on the canvas.

    Example:
        >>> image, scale = letterbox(torch.zeros(3, 10, 40, dtype=torch.uint8), (20, 20))
        >>> image.shape, scale, int(image[0, 19, 0])
        (torch.Size([3, 20, 20]), 0.5, 114)
    """
    height, width = canvas
    scale = min(height / image.shape[1], width / image.shape[2])
    size = (
        min(height, max(1, round(image.shape[1] * scale))),
        min(width, max(1, round(image.shape[2] * scale))),
    )
    resized = resize(image, size)
    if size == (height, width):
        return resized, scale
    out = torch.full((3, height, width), PAD_VALUE, dtype=torch.uint8)
    out[:, : size[0], : size[1]] = resized
    return out, scale


def resize(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Antialiased bilinear resize of [..., 3, H, W] to (height, width); the dtype is kept."""
    if tuple(images.shape[-2:]) == tuple(size):
        return images
    return TF.resize(images, list(size), antialias=True)


def shrink_to(image: Tensor, canvas: tuple[int, int], factor: float) -> Tensor:
    """Shrink an image until it just fits a canvas `factor` times as large; a smaller one is kept as it is."""
    scale = factor * min(canvas[0] / image.shape[1], canvas[1] / image.shape[2])
    if scale >= 1:
        return image
    return resize(image, (max(1, round(image.shape[1] * scale)), max(1, round(image.shape[2] * scale))))


def normalize(images: Tensor, *, memory_format: torch.memory_format = torch.channels_last) -> Tensor:
    """Model input: float32, ImageNet mean and standard deviation.

    Args:
        images: uint8 RGB, [N, 3, H, W].
        memory_format: Layout of the result. Layers of torch want channels_last; what `prepare` compiles reads
            any, ``torch.contiguous_format`` fastest.

    Returns:
        float32 [N, 3, H, W], the same numbers in every layout.

    Raises:
        InputError: `images` is not uint8 [N, 3, H, W].

    Example:
        >>> normalize(torch.zeros(1, 3, 2, 2, dtype=torch.uint8))[0, :, 0, 0]
        tensor([-2.1179, -2.0357, -1.8044])
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise InputError(
            f"normalize: expected uint8 [N, 3, H, W] for images, got {images.dtype} {list(images.shape)}"
        )
    gain = torch.tensor([1 / (255 * s) for s in _STD], device=images.device).view(1, 3, 1, 1)
    offset = torch.tensor([-m / s for m, s in zip(_MEAN, _STD, strict=True)], device=images.device).view(
        1, 3, 1, 1
    )
    # Plane by plane, where torch works in vectors; over channels_last it goes number by number.
    out = images.to(torch.float32, memory_format=torch.contiguous_format)
    return out.mul_(gain).add_(offset).contiguous(memory_format=memory_format)


def resize_batch(
    images: Tensor, targets: list[Target], canvas: tuple[int, int]
) -> tuple[Tensor, list[Target]]:
    """The same batch on another canvas of the same aspect.

    Args:
        images: uint8 or float32, [N, 3, H, W]; memory format is kept.
        targets: N targets in px of `images`.
        canvas: (height, width) px.

    Returns:
        Images [N, 3, height, width] and the targets scaled alike; the very same objects if the canvas is
        theirs already.

    Raises:
        InputError: the canvas has another aspect (rounding to whole px allowed).

    Example:
        >>> images, targets = resize_batch(torch.zeros(1, 3, 48, 64), [Target.empty()], (24, 32))
        >>> images.shape
        torch.Size([1, 3, 24, 32])
    """
    height, width = images.shape[-2:]
    if (height, width) == tuple(canvas):
        return images, targets
    if abs(height * canvas[1] - width * canvas[0]) > max(height, width, *canvas):
        raise InputError(
            f"resize_batch: expected a canvas of aspect {width}:{height} for canvas, "
            f"got {canvas[1]}x{canvas[0]} px"
        )
    scale = torch.tensor([canvas[1] / width, canvas[0] / height] * 2)
    scaled = [Target(t.boxes * scale, t.labels, t.ignore_boxes * scale) for t in targets]
    return resize(images, canvas), scaled


def check_images(
    *datasets: DetectionDataset | ClassificationDataset, decode: bool = True, num_threads: int = 2
) -> int:
    """Find unreadable images before a long job starts.

    With `decode` every image is decoded as `read` does it, and recorded in the dataset's read log: right for
    the splits that the coming stages may read. `decode=False` is for splits whose stage has not come (select,
    test): it reads no pixels and leaves the log alone; it looks at the header (format, annotated size) and,
    for JPEG and PNG, at whether the file has its end. Only a file that fails this is decoded to be sure; the
    answer is yes or no, no pixel gets out.

    Args:
        datasets: Any number of datasets.
        decode: Decode every image (about 5 ms each for 640x480 px).
        num_threads: Files decoded at a time.

    Returns:
        Number of images checked.

    Raises:
        InputError: at least one image is unreadable; names the first five files and the reason of the first.
    """
    jobs = [(dataset, i) for dataset in datasets for i in range(len(dataset))]

    def problem(job: tuple[DetectionDataset | ClassificationDataset, int]) -> InputError | None:
        dataset, index = job
        try:
            if decode:
                dataset.read(index)
            else:
                _check_without_pixels(dataset, index)
        except InputError as error:
            return error
        return None

    with ThreadPoolExecutor(num_threads) as pool:
        problems = list(pool.map(problem, jobs))
    bad = [(job, error) for job, error in zip(jobs, problems, strict=True) if error is not None]
    if len(bad) == 1:
        raise bad[0][1]
    if bad:
        names = ", ".join(_source(dataset, i) for (dataset, i), _ in bad[:5]) + (
            ", ..." if len(bad) > 5 else ""
        )
        raise InputError(
            f"check_images: expected readable images for dataset, got {len(bad)} unreadable "
            f"({names}); first: {bad[0][1]}"
        )
    return len(jobs)


def _source(dataset: DetectionDataset | ClassificationDataset, index: int) -> str:
    return dataset.records[index].source if isinstance(dataset, DetectionDataset) else dataset.sources[index]


def _check_without_pixels(dataset: DetectionDataset | ClassificationDataset, index: int) -> None:
    path = Path(_source(dataset, index))
    if path.suffix.lower() not in IMAGE_SUFFIXES:
        return  # composed in memory, no file
    try:
        with Image.open(path) as image:
            size, kind = image.size, image.format
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"read: expected a readable image for file {path}, got {_reason(error)}") from error
    complete = _has_end(path.read_bytes(), kind)
    if isinstance(dataset, DetectionDataset):
        record = dataset.records[index]
        complete = complete and size == (record.width, record.height)
        if not complete:
            read_record(record)
    elif not complete:
        read_image(path)


def _has_end(content: bytes, kind: str | None) -> bool:
    """Whether a JPEG's last scan is followed by an end marker, a PNG ends in IEND; true for other formats."""
    if kind == "JPEG":
        return content.rfind(b"\xff\xd9") > content.rfind(b"\xff\xda") >= 0
    if kind == "PNG":
        return b"IEND" in content[-64:]
    return True
