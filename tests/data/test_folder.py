# SPDX-License-Identifier: Apache-2.0
"""ImageFolder: classes from folders, splits carved by seed, clear errors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pfnas_fast.data import load_classification
from pfnas_fast.errors import InputError


def fill(folder: Path, **counts: int) -> Path:
    """Write `counts[class]` small images per class folder."""
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (6, 5)).save(folder / name / f"{i}.png")
    return folder


def test_train_and_val_folders(tmp_path):
    fill(tmp_path / "train", bolt=3, nut=2)
    fill(tmp_path / "val", bolt=1, nut=1)
    fill(tmp_path / "test", bolt=1, nut=1)
    data = load_classification(tmp_path)
    assert data.class_names == ("bolt", "nut")
    assert data.train.labels.tolist() == [0, 0, 0, 1, 1]
    assert data.train.read(4).shape == (3, 5, 6)
    assert len(data.val) == 2
    assert all("/test/" not in s for s in (*data.train.sources, *data.val.sources))


def test_single_folder_is_split_by_seed_within_each_class(tmp_path):
    fill(tmp_path, bolt=20, nut=10, rare=1)
    data, again, other = (load_classification(tmp_path, val=0.2, seed=s) for s in (0, 0, 1))
    assert np.bincount(data.val.labels, minlength=3).tolist() == [4, 2, 0]  # a class of one stays in train
    assert not set(data.val.sources) & set(data.train.sources)
    assert len(data.val) + len(data.train) == 31
    assert data.val.sources == again.val.sources
    assert data.val.sources != other.val.sources


def test_clear_errors(tmp_path):
    with pytest.raises(InputError, match="a folder or 'digits' for source, got 'nowhere'"):
        load_classification("nowhere")
    fill(tmp_path / "train", bolt=3)
    with pytest.raises(InputError, match=r"two or more class folders in .*train, got \['bolt'\]"):
        load_classification(tmp_path)
    fill(tmp_path / "train", nut=3)
    fill(tmp_path / "val", bolt=3, screw=1)
    with pytest.raises(InputError, match=r"got no \['nut'\] and also \['screw'\]"):
        load_classification(tmp_path)
    (tmp_path / "val" / "nut").mkdir()
    with pytest.raises(InputError, match=r"images in class folder .*nut, got none"):
        load_classification(tmp_path)
    with pytest.raises(InputError, match="for val, got 1"):
        load_classification(tmp_path, val=1)


def test_unreadable_image_is_refused_by_name(tmp_path):
    fill(tmp_path, bolt=3, nut=3)
    data = load_classification(tmp_path)
    Path(data.train.sources[0]).write_bytes(b"oops")
    with pytest.raises(InputError, match=data.train.sources[0]):
        data.train.read(0)


def test_real_folder_loads(shared_data):
    data = load_classification(shared_data / "clothing10")
    assert (len(data.train), len(data.val), data.num_classes) == (3068, 341, 10)
    assert data.class_names[-1] == "t-shirt"
    assert max(data.train.read(0).shape) == 112
