# SPDX-License-Identifier: Apache-2.0
"""Descriptions of spaces: round trips, files, and a clear refusal of every kind of mistake."""

from pathlib import Path as FilePath

import pytest
import yaml

from pfnas_fast.errors import InputError
from pfnas_fast.space import Space, load_space, preset_names


@pytest.mark.parametrize("name", preset_names())
def test_presets_round_trip_through_dict_and_file(name: str, tmp_path: FilePath) -> None:
    space = load_space(name)
    assert space.name == name
    assert Space.from_dict(space.to_dict()) == space
    file = tmp_path / "own.yaml"
    file.write_text(yaml.safe_dump(space.to_dict()))
    assert load_space(file) == load_space(str(file)) == space


def test_space_without_first_block_round_trips(small_description: dict) -> None:
    space = Space.from_dict(small_description)
    assert space.first_block is None
    assert space.to_dict() == small_description


def edited(description: dict, where: str, value: object) -> dict:
    """A description with one field set ("stages.1.depths"), or removed where `value` is Ellipsis."""
    *parents, last = [int(key) if key.isdigit() else key for key in where.split(".")]
    target = description
    for key in parents:
        target = target[key]
    if value is ...:
        del target[last]
    else:
        target[last] = value
    return description


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        (
            "stages.1.out_channels",
            [16, 24],
            "expected one static width (an elastic output width is not supported) for "
            "stages[1].out_channels, got [16, 24]",
        ),
        ("stages.0.out_channels", 0, "expected an int from 1 to 65536 for stages[0].out_channels, got 0"),
        (
            "stages.0.out_channels",
            True,
            "expected an int from 1 to 65536 for stages[0].out_channels, got True",
        ),
        ("stages.0.stride", 3, "expected one of [1, 2] for stages[0].stride, got 3"),
        ("stages.0.stride", True, "expected one of [1, 2] for stages[0].stride, got True"),
        (
            "stages.0.activation",
            "swish",
            "expected one of ['relu', 'hswish'] for stages[0].activation, got 'swish'",
        ),
        ("stages.0.se", "yes", "expected one of [False, True] for stages[0].se, got 'yes'"),
        (
            "stages.1.depths",
            [2, 1],
            "expected an ascending list of different ints from 1 to 64 for stages[1].depths, got [2, 1]",
        ),
        (
            "stages.1.depths",
            [1, 1],
            "expected an ascending list of different ints from 1 to 64 for stages[1].depths, got [1, 1]",
        ),
        ("stages.1.depths", [0, 1], "ints from 1 to 64 for stages[1].depths, got [0, 1]"),
        ("stages.1.depths", [], "ints from 1 to 64 for stages[1].depths, got []"),
        ("stages.1.depths", 2, "ints from 1 to 64 for stages[1].depths, got 2"),
        ("stages.0.expand_ratios", [2, 2.5], "ints from 1 to 64 for stages[0].expand_ratios, got [2, 2.5]"),
        (
            "stages.0.kernel_sizes",
            [3, 4],
            "expected sizes from [3, 5, 7] for stages[0].kernel_sizes, got [3, 4]",
        ),
        (
            "stages.0.kernel_sizes",
            [5, 3],
            "ascending list of different ints from 1 to 99 for stages[0].kernel_sizes",
        ),
        ("stages.0.width", 3, "expected no further keys in stages[0], got 'width'"),
        ("stages.0.se", ..., "expected a value for stages[0].se, got nothing"),
        ("stages", [], "expected a list of at least one stage for stages, got []"),
        ("stages.0", "wide", "expected a mapping for stages[0], got 'wide'"),
        ("tap", [1], "expected no further keys in the space, got 'tap'"),
        ("taps", [0], "expected stage indices from 0 that end with the last stage (1) for taps, got [0]"),
        (
            "taps",
            [1, 2],
            "expected stage indices from 0 that end with the last stage (1) for taps, got [1, 2]",
        ),
        ("taps", [-1, 1], "expected an ascending list of different ints from 0"),
        ("stages.1.stride", 1, "expected stages whose strides double from one to the next for taps"),
        ("stem", ..., "expected a value for stem, got nothing"),
        ("stem.channels", 8.0, "for stem.channels, got 8.0"),
        ("stem.kernel", 3, "expected no further keys in stem, got 'kernel'"),
        ("head.num_convs", -1, "expected an int from 0 to 16 for head.num_convs, got -1"),
        ("tail.dropout", 1.0, "expected a number, 0 <= x < 1, for tail.dropout, got 1.0"),
        (
            "resolutions",
            [48, 32],
            "expected an ascending list of different ints from 16 to 16384 for resolutions",
        ),
        ("aspect", [4], "expected [width, height], two positive ints for aspect, got [4]"),
        ("aspect", [4, 0], "expected [width, height], two positive ints for aspect, got [4, 0]"),
        ("name", "a/b", "expected letters, digits, '.', '_' or '-' for name, got 'a/b'"),
        (
            "first_block",
            {"out_channels": 8, "kernel_size": 4, "activation": "relu"},
            "expected one of [3, 5, 7] for first_block.kernel_size, got 4",
        ),
        (
            "first_block",
            {"out_channels": [8, 16], "kernel_size": 3, "activation": "relu"},
            "expected one static width (an elastic output width is not supported) for "
            "first_block.out_channels, got [8, 16]",
        ),
    ],
)
def test_mistakes_are_refused_by_name(
    small_description: dict, where: str, value: object, message: str
) -> None:
    with pytest.raises(InputError) as caught:
        Space.from_dict(edited(small_description, where, value))
    assert str(caught.value).startswith("from_dict: expected ")
    assert message in str(caught.value)


@pytest.mark.parametrize("description", [None, [], "tiny", 3])
def test_description_must_be_a_mapping(description: object) -> None:
    with pytest.raises(InputError, match="expected a mapping for the space"):
        Space.from_dict(description)  # type: ignore[arg-type]


def test_unknown_source_names_the_presets() -> None:
    with pytest.raises(InputError) as caught:
        load_space("tinny")
    assert str(caught.value) == (
        "load_space: expected a preset (ofa_mbv3_w1.0, tiny) or a YAML file for source, got 'tinny'"
    )


def test_source_of_another_type_is_refused() -> None:
    with pytest.raises(
        TypeError, match="load_space: expected a preset name or a YAML file for source, got int"
    ):
        load_space(3)  # type: ignore[arg-type]


def test_broken_yaml_is_refused_in_one_line(tmp_path: FilePath) -> None:
    file = tmp_path / "broken.yaml"
    file.write_text("stages: [1, 2\nname: x")
    with pytest.raises(InputError, match="load_space: expected YAML in") as caught:
        load_space(file)
    assert "\n" not in str(caught.value)


def test_mistakes_in_a_file_name_the_file(small_description: dict, tmp_path: FilePath) -> None:
    file = tmp_path / "own.yaml"
    file.write_text(yaml.safe_dump(edited(small_description, "stages.0.stride", 4)))
    with pytest.raises(InputError, match=r"for stages\[0\].stride, got 4 \(in .*own.yaml\)"):
        load_space(file)


def test_empty_file_is_refused(tmp_path: FilePath) -> None:
    file = tmp_path / "empty.yaml"
    file.write_text("")
    with pytest.raises(InputError, match="expected a mapping for the space, got None"):
        load_space(file)
