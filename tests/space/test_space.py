# SPDX-License-Identifier: Apache-2.0
"""Spaces, their geometry and their paths."""

import dataclasses
import pickle
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pfnas_fast.errors import InputError
from pfnas_fast.space import Path, Space, load_space, make_divisible, preset_names, se_channels


def test_presets_are_the_two_documented_ones() -> None:
    assert preset_names() == ("ofa_mbv3_w1.0", "tiny")


def test_number_of_paths() -> None:
    assert load_space("ofa_mbv3_w1.0").num_paths == (9**2 + 9**3 + 9**4) ** 5
    assert load_space("tiny").num_paths == (9 + 9**2 + 9**3) ** 3 * (6 + 6**2 + 6**3)


def test_number_of_paths_equals_enumeration(small_space: Space, all_paths: Callable) -> None:
    assert small_space.num_paths == len(all_paths(small_space, 32)) == 120


@pytest.mark.parametrize(
    ("value", "expected"), [(8, 8), (12, 16), (18, 24), (72, 72), (3, 8), (11, 16), (100, 104)]
)
def test_make_divisible(value: int, expected: int) -> None:
    assert make_divisible(value) == expected


def test_se_channels_round_a_quarter() -> None:
    assert [se_channels(c) for c in (72, 120, 240, 672, 960)] == [24, 32, 64, 168, 240]


def test_geometry_of_tiny() -> None:
    space = load_space("tiny")
    assert space.canvas(192) == (144, 192)
    assert space.canvas(160) == (120, 160)
    assert space.stem_size(192) == (72, 96)
    assert space.stage_sizes(192) == ((36, 48), (18, 24), (9, 12), (5, 6))  # odd sizes round up
    assert space.tap_sizes(192) == ((18, 24), (9, 12), (5, 6))
    assert space.tap_channels == (24, 40, 64)
    assert space.tap_strides == (8, 16, 32)


def test_geometry_of_ofa() -> None:
    space = load_space("ofa_mbv3_w1.0")
    assert space.canvas(320) == (320, 320)
    assert space.stage_sizes(320) == ((80, 80), (40, 40), (20, 20), (20, 20), (10, 10))
    assert space.tap_channels == (40, 112, 160)
    assert space.tap_strides == (8, 16, 32)
    assert space.num_blocks == 20
    assert space.slot_sizes == (9,) * 20 + (4,)


def test_portrait_canvas() -> None:
    space = dataclasses.replace(load_space("tiny"), aspect=(3, 4))
    assert space.canvas(160) == (160, 120)


def test_blocks_of_a_stage() -> None:
    space = load_space("ofa_mbv3_w1.0")
    first, second = space.blocks[12], space.blocks[13]
    assert (first.stage, first.position, first.in_channels, first.out_channels) == (3, 0, 80, 112)
    assert not first.has_residual
    assert second.has_residual
    assert [second.mid_channels(e) for e in (3, 4, 6)] == [336, 448, 672]
    assert space.blocks[4].stride == 2
    assert not space.blocks[4].has_residual
    assert space.first_block is not None
    assert space.first_block.has_residual


def test_last_stage_of_tiny_has_a_5x5_bank() -> None:
    space = load_space("tiny")
    assert [b.max_kernel_size for b in space.blocks] == [7] * 9 + [5] * 3


def test_classification_space() -> None:
    space = load_space("tiny").for_classification()
    assert space.resolutions == (64, 80, 96)
    assert space.canvas(96) == (96, 96)
    assert space.for_classification() == space


def test_path_broadcasts_and_clears_dead_genes(small_space: Space) -> None:
    path = small_space.path(ks=5, e=[2, 3, 2, 2], d=[1, 2], resolution=32)
    assert path == Path((5, 0, 5, 5), (2, 0, 2, 2), (1, 2), 32)
    assert path == small_space.path(ks=[5, 3, 5, 5], e=[2, 2, 2, 2], d=[1, 2], resolution=32)
    assert len({path, small_space.path(ks=[5, 0, 5, 5], e=[2, 0, 2, 2], d=[1, 2], resolution=32)}) == 1


def test_path_takes_numpy_integers(small_space: Space) -> None:
    path = small_space.path(
        ks=np.int64(3), e=np.array([2, 2, 2, 2]), d=np.array([1, 1]), resolution=np.int32(32)
    )
    assert path == small_space.path(ks=3, e=2, d=1, resolution=32)
    assert all(
        type(v) is int for v in (*path.kernel_sizes, *path.expand_ratios, *path.depths, path.resolution)
    )


def test_extreme_paths() -> None:
    space = load_space("tiny")
    assert space.max_path() == space.path(ks=[7] * 9 + [5] * 3, e=4, d=3, resolution=192)
    assert space.min_path() == space.path(ks=3, e=2, d=1, resolution=128)
    assert space.max_path(128).resolution == 128
    assert space.min_path(192).resolution == 192


@pytest.mark.parametrize(
    ("genes", "message"),
    [
        ({"ks": 7}, "path: expected one of (3, 5) for ks at block 0 (stage 0), got 7"),
        ({"ks": [3, 3, 9, 3]}, "path: expected one of (3, 5) for ks at block 2 (stage 1), got 9"),
        ({"e": [2, 3, 3, 2]}, "path: expected one of (2,) for e at block 2 (stage 1), got 3"),
        ({"ks": [0, 3, 3, 3]}, "path: expected one of (3, 5) for ks at block 0 (stage 0), got 0"),
        ({"ks": [3, 4, 3, 3], "d": 1}, "path: expected one of (3, 5) for ks at block 1 (stage 0), got 4"),
        ({"d": [1, 3]}, "path: expected one of (1, 2) for d at stage 1, got 3"),
        ({"d": 0}, "path: expected one of (1, 2) for d at stage 0, got 0"),
        ({"ks": [3, 3]}, "path: expected 4 values for ks (the space has 4 blocks), got 2"),
        ({"d": [1, 1, 1]}, "path: expected 2 values for d (the space has 2 stages), got 3"),
        ({"resolution": 40}, "path: expected one of (32, 48) for resolution, got 40"),
    ],
)
def test_bad_paths_are_refused(small_space: Space, genes: dict, message: str) -> None:
    with pytest.raises(InputError) as caught:
        small_space.path(**{"ks": 3, "e": 2, "d": 2, **genes})
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("genes", "message"),
    [
        ({"ks": 3.0}, "path: expected an int for ks, got 3.0"),
        ({"ks": True}, "path: expected an int for ks, got True"),
        ({"e": "2222"}, "path: expected an int or a list of 4 ints for e, got '2222'"),
        ({"d": [1, None]}, "path: expected an int for d, got None"),
        ({"resolution": 32.0}, "path: expected an int for resolution, got 32.0"),
    ],
)
def test_wrong_types_are_refused(small_space: Space, genes: dict, message: str) -> None:
    with pytest.raises(TypeError) as caught:
        small_space.path(**{"ks": 3, "e": 2, "d": 2, **genes})
    assert str(caught.value) == message


def test_path_constructor_checks_its_form() -> None:
    with pytest.raises(TypeError, match="expected a tuple of ints for depths"):
        Path((3,), (2,), [1], 32)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="expected an int for resolution"):
        Path((3,), (2,), (1,), 32.0)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="0 at the same blocks"):
        Path((3, 0), (2, 2), (2,), 32)
    with pytest.raises(InputError, match="of one length"):
        Path((3,), (2, 2), (2,), 32)


def test_path_is_frozen_and_pickles(small_space: Space) -> None:
    path = small_space.max_path()
    with pytest.raises(dataclasses.FrozenInstanceError):
        path.resolution = 32  # type: ignore[misc]
    assert pickle.loads(pickle.dumps(path)) == path
    assert pickle.loads(pickle.dumps(small_space)) == small_space


def test_json_round_trip(small_space: Space) -> None:
    path = small_space.path(ks=[3, 5, 3, 5], e=[3, 2, 2, 2], d=[2, 1], resolution=32)
    assert path.to_json() == {"ks": [3, 5, 3, 0], "e": [3, 2, 2, 0], "d": [2, 1], "r": 32}
    assert small_space.path_from_json(path.to_json()) == path


def test_json_without_resolution_means_the_largest(small_space: Space) -> None:
    assert small_space.path_from_json({"ks": 3, "e": 2, "d": 1}).resolution == 48


@pytest.mark.parametrize("obj", [{"ks": 3, "e": 2}, {"ks": 3, "e": 2, "d": 1, "x": 1}, [3, 2, 1], None])
def test_bad_json_is_refused(small_space: Space, obj: object) -> None:
    with pytest.raises(InputError, match="path_from_json: expected an object with keys ks, e, d and r"):
        small_space.path_from_json(obj)  # type: ignore[arg-type]


def test_ofa_ids() -> None:
    ofa, tiny = load_space("ofa_mbv3_w1.0"), load_space("tiny")
    assert ofa.ofa_id == "ofa_mbv3_d234_e346_k357_w1.0"
    assert tiny.ofa_id == "tiny_d123_e234_k357"
    path = ofa.path(ks=5, e=4, d=[2, 3, 4, 2, 2], resolution=320)
    assert path.ofa_id(ofa) == "ofa_mbv3_d23422_e44004440444444004400_k55005550555555005500_w1.0_r320"


def test_ofa_ids_are_unique(small_space: Space, all_paths: Callable) -> None:
    paths = all_paths(small_space, 32) + all_paths(small_space, 48)
    assert len({p.ofa_id(small_space) for p in paths}) == len(paths) == 240


def test_ofa_id_separates_genes_of_two_digits(small_space: Space) -> None:
    assert "_e10-2-0-2_" in Path((3, 3, 0, 3), (10, 2, 0, 2), (2, 1), 32).ofa_id(small_space)


def test_population_round_trip_over_the_whole_space(small_space: Space, all_paths: Callable) -> None:
    paths = all_paths(small_space, 32) + all_paths(small_space, 48)
    population = small_space.encode(paths)
    assert population.dtype == np.uint8
    assert population.shape == (240, 5)
    assert len(np.unique(population, axis=0)) == 240
    assert small_space.decode(population) == paths


def test_codes_are_kernel_major(small_space: Space) -> None:
    path = small_space.path(ks=[5, 3, 5, 3], e=[2, 3, 2, 2], d=[2, 1], resolution=48)
    assert small_space.encode([path]).tolist() == [[3, 2, 2, 0, 2]]


def test_empty_population(small_space: Space) -> None:
    population = small_space.encode([])
    assert population.shape == (0, 5)
    assert small_space.decode(population) == []


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([1, 5, 1, 0, 1], "expected codes 0 to 4 at block 1, got 5 in row 1"),
        ([1, 1, 1, 0, 0], "expected codes 1 to 2 at the resolution slot, got 0 in row 1"),
        ([1, 1, 1, 0, 3], "expected codes 1 to 2 at the resolution slot, got 3 in row 1"),
        (
            [0, 1, 1, 0, 1],
            "expected the first d blocks of stage 0 to be present, d one of (1, 2), "
            "got codes [0, 1] in row 1",
        ),
        (
            [1, 1, 0, 0, 1],
            "expected the first d blocks of stage 1 to be present, d one of (1, 2), "
            "got codes [0, 0] in row 1",
        ),
    ],
)
def test_bad_populations_are_refused(small_space: Space, row: list[int], message: str) -> None:
    population = np.array([[1, 1, 1, 0, 1], row], np.uint8)
    for function in (small_space.check_population, small_space.decode):
        with pytest.raises(InputError) as caught:
            function(population)
        assert str(caught.value) == f"check_population: {message}"


def test_populations_of_other_shapes_and_types_are_refused(small_space: Space) -> None:
    with pytest.raises(InputError, match=r"expected shape \[num_paths, 5\] for population, got \(2, 4\)"):
        small_space.check_population(np.ones((2, 4), np.uint8))
    with pytest.raises(TypeError, match="expected a uint8 numpy array for population, got int64"):
        small_space.check_population(np.ones((2, 5), np.int64))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="got list"):
        small_space.check_population([[1, 1, 1, 1, 1]])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (Path((7, 0, 3, 0), (2, 0, 2, 0), (1, 1), 32), "at block 0, got 7 and 2 (path 1)"),
        (Path((3, 0, 3, 0), (2, 0, 2, 0), (1, 1), 40), "got 40 (path 1)"),
        (Path((3, 0, 3, 0), (2, 0, 2, 0), (2, 1), 32), "expected depths that agree with the skipped blocks"),
        (Path((3, 0), (2, 0), (1,), 32), "expected paths of small (4 blocks, 2 stages)"),
    ],
)
def test_paths_of_another_space_are_refused(small_space: Space, path: Path, message: str) -> None:
    with pytest.raises(InputError) as caught:
        small_space.encode([small_space.max_path(), path])
    assert message in str(caught.value)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_any_path_of_tiny_survives_all_forms(data: st.DataObject) -> None:
    space = load_space("tiny")
    path = space.path(
        ks=[data.draw(st.sampled_from(b.kernel_sizes)) for b in space.blocks],
        e=[data.draw(st.sampled_from(b.expand_ratios)) for b in space.blocks],
        d=[data.draw(st.sampled_from(s.depths)) for s in space.stages],
        resolution=data.draw(st.sampled_from(space.resolutions)),
    )
    assert space.path_from_json(path.to_json()) == path
    assert space.decode(space.encode([path])) == [path]
    assert [d > 0 for d in path.kernel_sizes] == [b.position < path.depths[b.stage] for b in space.blocks]
