# SPDX-License-Identifier: Apache-2.0
"""Recognise what lies in a folder and load it."""

from __future__ import annotations

from pathlib import Path

from pfnas_fast.data.coco import find_coco_splits, read_coco, read_coco_categories
from pfnas_fast.data.datasets import DetectionDataset
from pfnas_fast.data.digits import digit_scenes
from pfnas_fast.data.roles import DetectionData, Roles, assign_roles
from pfnas_fast.data.voc import find_voc_years, read_voc
from pfnas_fast.errors import InputError

_NO_ROLES = Roles()


def load_detection(
    source: str | Path, *, roles: Roles = _NO_ROLES, seed: int = 0, fraction: float = 1.0
) -> DetectionData:
    """Load a detection set and divide its images by role.

    Only annotations are read here; pixels when they are needed.

    Args:
        source: A folder in COCO layout (`annotations/instances_{train,val,test}.json` with `images/{split}/`
            or `{split}/`), a Pascal VOC folder (`VOCdevkit/VOC2012/...`, several years are joined), or
            "digits" for the embedded set (a folder of that name is reached as "./digits").
        roles: Sizes of the roles.
        seed: Draws which images are carved, labelled and used for calibration.
        fraction: Share of the training images to keep, above 0 and at most 1.

    Returns:
        One dataset per role.

    Raises:
        InputError: unknown folder layout, unreadable annotations, a box outside its image, classes that
            differ between splits, missing image files, an empty split.

    Example:
        >>> data = load_detection("digits")
        >>> data.num_classes, len(data.fit), len(data.label), len(data.select), len(data.test)
        (10, 320, 80, 100, 100)
    """
    splits, kind = _read_splits(source)
    return assign_roles(splits, roles, seed=seed, fraction=fraction, kind=kind, source=str(source))


def _read_splits(source: str | Path) -> tuple[dict[str, DetectionDataset], str]:
    if source == "digits":
        return digit_scenes(), "digits"
    folder = Path(source)
    if not folder.is_dir():
        raise InputError(f"load_detection: expected a folder or 'digits' for source, got {str(source)!r}")
    coco = find_coco_splits(folder)
    if coco:
        first = coco.get("train", next(iter(coco.values())))
        names = read_coco_categories(first[0])
        return {split: read_coco(*paths, class_names=names) for split, paths in coco.items()}, "coco"
    years = find_voc_years(folder)
    if years:
        return read_voc(years), "voc"
    raise InputError(
        "load_detection: expected annotations/instances_train.json (COCO) or VOCdevkit/VOC*/Annotations "
        f"(Pascal VOC) in source, got {folder} with {_listing(folder)}"
    )


def _listing(folder: Path) -> str:
    names = sorted(p.name for p in folder.iterdir())
    return ", ".join(names[:6]) + (", ..." if len(names) > 6 else "") if names else "nothing in it"
