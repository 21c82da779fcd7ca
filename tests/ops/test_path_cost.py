# SPDX-License-Identifier: Apache-2.0
"""path_cost against its float64 twin: every tier, both memory layouts, whole and fractional costs."""

import numpy as np
import pytest
import torch

from pfnas_fast.errors import InputError
from pfnas_fast.ops import CostTable, path_cost, reference

SIZES = [0, 1, 63, 64, 65, 1000, 4097]


def problem(n, num_resolutions=3, num_blocks=20, num_codes=10, whole=True, seed=0):
    rng = np.random.default_rng([seed, n, num_resolutions, num_blocks, num_codes])
    table = rng.integers(1, 3000, (num_resolutions, num_blocks, num_codes)) * 1000.0
    constant = rng.integers(1, 3000, num_resolutions) * 1000.0
    if not whole:
        table, constant = table * 1.1, constant * 1.1
    table[..., 0] = 0.0
    codes = rng.integers(0, num_codes, (n, num_blocks + 1)).astype(np.uint8)
    codes[:, -1] = rng.integers(1, num_resolutions + 1, n)
    return codes, table, constant


def expected(codes, table, constant):
    return reference.path_cost(torch.from_numpy(codes), torch.from_numpy(table), torch.from_numpy(constant))


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("num_resolutions", [1, 2, 3, 4])
@pytest.mark.parametrize("n", SIZES)
def test_equals_the_twin(tier, n, num_resolutions, whole):
    codes, table, constant = problem(n, num_resolutions, whole=whole)
    want = expected(codes, table, constant)
    packed = CostTable(table, constant)
    assert packed.exact_words == whole
    rows = np.asfortranarray(codes)  # structure of arrays
    for layout in (codes, rows, np.ascontiguousarray(codes)[:, ::1]):
        got = path_cost(layout, packed)
        assert torch.allclose(got, want, rtol=0.0 if whole else 1e-14, atol=0.0)
        single = path_cost(layout, packed, dtype=torch.float32)
        assert torch.allclose(single.double(), want, rtol=2e-7, atol=0.0)


def test_unit_divides_exactly(tier):
    codes, table, constant = problem(300)
    want = expected(codes, table, constant).numpy() / 1e6
    for layout in (codes, np.asfortranarray(codes)):
        assert (path_cost(layout, CostTable(table, constant, 1e6)).numpy() == want).all()


@pytest.mark.parametrize("num_codes", [2, 16, 17, 30])
def test_any_number_of_choices(tier, num_codes):
    codes, table, constant = problem(200, num_codes=num_codes)
    packed = CostTable(table, constant)
    assert packed.exact_words == (num_codes <= 16)
    assert torch.equal(path_cost(np.asfortranarray(codes), packed), expected(codes, table, constant))


@pytest.mark.parametrize("largest", [2**11 - 1, 2**22 - 1, 2**22, 2**26])
@pytest.mark.parametrize("num_blocks", [1, 31, 32, 33])
@pytest.mark.parametrize("num_resolutions", [1, 3])
def test_steps_of_any_size_and_many_blocks(tier, largest, num_blocks, num_resolutions):
    """Where two digits of a step no longer hold it, or their sums not 16 bits, another way is taken."""
    codes, table, constant = problem(150, num_blocks=num_blocks, num_resolutions=num_resolutions)
    table[..., 1] = largest
    table[0, 0, 2] = 1.0
    codes[:60, :-1] = 1  # the largest sum
    packed = CostTable(table, constant)
    assert packed.exact_words == (packed.step > 0)
    assert torch.equal(path_cost(np.asfortranarray(codes), packed), expected(codes, table, constant))


def test_sums_beyond_32_bits_stay_exact(tier):
    codes, table, constant = problem(200)
    table[0, 0, 1], table[0, 0, 2] = 2**40 + 1, 2**40 + 3
    packed = CostTable(table, constant)
    assert not packed.exact_words
    assert torch.equal(path_cost(codes, packed), expected(codes, table, constant))


def test_one_block_and_one_choice(tier):
    codes = np.array([[1, 1], [0, 1]], np.uint8)
    packed = CostTable(np.array([[[0.0, 5.0]]]), np.array([0.0]))
    assert path_cost(codes, packed).tolist() == [5.0, 0.0]


def test_same_bits_for_any_number_of_threads(tier, num_threads):
    codes, table, constant = problem(20000, whole=False)
    packed, results = CostTable(table, constant), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(path_cost(np.asfortranarray(codes), packed))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda c: c[:, :-1], r"path_cost: expected shape \[n, 21\] for codes, got \[5, 20\]"),
        (lambda c: c + np.uint8(10), r"path_cost: expected codes below 10 for blocks and 1 to 3"),
        (lambda c: c * np.uint8(0), r"path_cost: expected codes below 10 .* 0 to 0"),
    ],
)
def test_wrong_codes_are_refused(change, text):
    codes, table, constant = problem(5)
    with pytest.raises(InputError, match=text):
        path_cost(change(codes), CostTable(table, constant))


def test_wrong_types_are_refused():
    codes, table, constant = problem(5)
    with pytest.raises(TypeError, match="path_cost: expected uint8 for codes, got int64"):
        path_cost(codes.astype(np.int64), CostTable(table, constant))
    with pytest.raises(TypeError, match="path_cost: expected float64 or float32 for dtype"):
        path_cost(codes, CostTable(table, constant), dtype=torch.int64)
    with pytest.raises(InputError, match="expected finite values >= 0"):
        CostTable(table * np.nan, constant)
    with pytest.raises(InputError, match="expected shapes"):
        CostTable(table, constant[:-1])


@pytest.mark.parametrize("num_blocks", [1, 2, 3, 4, 5, 20, 21])
@pytest.mark.parametrize("largest", [200, 3000, 2**16 - 1, 2**16, 2**24 - 1, 2**24])
def test_byte_by_byte_gives_the_same_sums(tier, largest, num_blocks):
    """Two or three bytes a step, or too large for three; groups of one resolution and of several."""
    n = 64 * 9 + 5
    codes, table, constant = problem(n, num_blocks=num_blocks, num_codes=16)
    table = np.round(table / table.max() * largest)
    table[0, 0, 1], table[..., 0] = 1.0, 0.0
    table[0, -1, 15] = largest
    codes[: 3 * 64, -1], codes[3 * 64 : 6 * 64, -1] = 2, 1
    packed, layout = CostTable(table, constant), np.asfortranarray(codes)
    assert packed.exact_words
    for dtype in (torch.float64, torch.float32):
        got, words = (path_cost(layout, packed, dtype=dtype, allow_vnni=allow) for allow in (True, False))
        assert torch.equal(got, words)
        assert torch.equal(got, expected(codes, table, constant).to(dtype))
