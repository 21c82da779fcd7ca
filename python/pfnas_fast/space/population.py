# SPDX-License-Identifier: Apache-2.0
"""Coding of whole populations as uint8 arrays, and uniform sampling of them.

Slot b < num_blocks holds 0 (block skipped) or 1 + kernel_index * num_expand + expand_index; the last slot
holds 1 + resolution_index. The code is canonical: equal subnets have equal rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pfnas_fast.errors import InputError
from pfnas_fast.space.path import Path

if TYPE_CHECKING:
    from pfnas_fast.space.space import Space


def gene_tables(space: Space) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Kernel size and expand ratio of each code: two arrays [num_blocks, max_code + 1], 0 at code 0."""
    shape = (space.num_blocks, max(space.slot_sizes[:-1]) + 1)
    kernels, expands = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    for block in space.blocks:
        codes = 1 + np.arange(space.slot_sizes[block.index])
        num_expand = len(block.expand_ratios)
        kernels[block.index, codes] = np.take(block.kernel_sizes, (codes - 1) // num_expand)
        expands[block.index, codes] = np.take(block.expand_ratios, (codes - 1) % num_expand)
    return kernels, expands


def encode(space: Space, paths: list[Path]) -> NDArray[np.uint8]:
    """See `Space.encode`."""
    population = np.zeros((len(paths), space.num_slots), np.uint8)
    if not paths:
        return population
    for row, path in enumerate(paths):
        if len(path.kernel_sizes) != space.num_blocks or len(path.depths) != len(space.stages):
            raise InputError(
                f"encode: expected paths of {space.name} ({space.num_blocks} blocks, {len(space.stages)} "
                f"stages), got {path} at index {row}"
            )
    kernels = np.array([p.kernel_sizes for p in paths])
    expands = np.array([p.expand_ratios for p in paths])
    table_k, table_e = gene_tables(space)
    for block in space.blocks:
        b = block.index
        # A code matches where both genes do; absent (0, 0) matches code 0.
        match = (kernels[:, b, None] == table_k[b]) & (expands[:, b, None] == table_e[b])
        match[:, space.slot_sizes[b] + 1 :] = False
        if not match.any(axis=1).all():
            row = int(np.argmin(match.any(axis=1)))
            raise InputError(
                f"encode: expected kernel size in {block.kernel_sizes} and expand ratio in "
                f"{block.expand_ratios} at block {b}, got {kernels[row, b]} and {expands[row, b]} "
                f"(path {row})"
            )
        population[:, b] = match.argmax(axis=1)
    resolutions = np.array([p.resolution for p in paths])[:, None] == np.array(space.resolutions)
    if not resolutions.any(axis=1).all():
        row = int(np.argmin(resolutions.any(axis=1)))
        raise InputError(
            f"encode: expected a resolution of {space.resolutions}, got {paths[row].resolution} (path {row})"
        )
    population[:, -1] = 1 + resolutions.argmax(axis=1)
    check(space, population)
    depths = np.array([p.depths for p in paths])
    if (wrong := (space.depths_of(population) != depths).any(axis=1)).any():
        row = int(np.argmax(wrong))
        raise InputError(
            f"encode: expected depths that agree with the skipped blocks, got {paths[row]} (path {row})"
        )
    return population


def decode(space: Space, population: NDArray[np.uint8]) -> list[Path]:
    """See `Space.decode`."""
    check(space, population)
    table_k, table_e = gene_tables(space)
    codes, blocks = population[:, :-1], np.arange(space.num_blocks)
    kernels, expands = table_k[blocks, codes].tolist(), table_e[blocks, codes].tolist()
    depths = space.depths_of(population).tolist()
    resolutions = np.take(space.resolutions, population[:, -1].astype(np.int64) - 1).tolist()
    return [
        Path(tuple(k), tuple(e), tuple(d), r)
        for k, e, d, r in zip(kernels, expands, depths, resolutions, strict=True)
    ]


def check(space: Space, population: NDArray[np.uint8]) -> None:
    """See `Space.check_population`."""
    if not isinstance(population, np.ndarray) or population.dtype != np.uint8:
        got = getattr(population, "dtype", type(population).__name__)
        raise TypeError(f"check_population: expected a uint8 numpy array for population, got {got}")
    if population.ndim != 2 or population.shape[1] != space.num_slots:
        raise InputError(
            f"check_population: expected shape [num_paths, {space.num_slots}] for population, "
            f"got {population.shape}"
        )
    if not len(population):
        return
    # Slot by slot on contiguous bytes; rows are looked for only once something is known to be wrong.
    slots = np.ascontiguousarray(population.T)
    if (slots.max(axis=1) > space.slot_sizes).any() or slots[-1].min() == 0:
        _refuse_codes(space, population)
    for index, (stage, where) in enumerate(zip(space.stages, space.stage_slices, strict=True)):
        present = slots[where] != 0
        depth = present.view(np.uint8).sum(axis=0, dtype=np.uint8)
        allowed = np.isin(np.arange(stage.depths[-1] + 1), stage.depths)
        bad = ~allowed[depth]
        for position in range(1, stage.depths[-1]):
            bad |= present[position] & ~present[position - 1]
        if bad.any():
            row = int(np.argmax(bad))
            raise InputError(
                f"check_population: expected the first d blocks of stage {index} to be present, d one of "
                f"{stage.depths}, got codes {population[row, where].tolist()} in row {row}"
            )


def _refuse_codes(space: Space, population: NDArray[np.uint8]) -> None:
    """Name the first code that is out of range."""
    wrong = population > np.array(space.slot_sizes)
    wrong[:, -1] |= population[:, -1] == 0
    row, slot = (int(i) for i in np.argwhere(wrong)[0])
    where, low = ("the resolution slot", 1) if slot == space.num_blocks else (f"block {slot}", 0)
    raise InputError(
        f"check_population: expected codes {low} to {space.slot_sizes[slot]} at {where}, "
        f"got {population[row, slot]} in row {row}"
    )


def uniform_population(
    space: Space, rng: np.random.Generator, n: int, *, resolution: int | None = None
) -> NDArray[np.uint8]:
    """Draw paths under Once-for-All's gene measure.

    Each stage's depth is uniform over its choices, then each active block's kernel size and expand ratio are,
    and the resolution is. (Uniform over *paths* instead would put depth 4 of 2, 3, 4 at 89 %.)

    Args:
        space: The space.
        rng: Source of randomness; the result depends on its state alone.
        n: Number of paths, >= 0.
        resolution: Fixed longest side, px, or None to draw it.

    Returns:
        [n, num_slots] uint8.

    Raises:
        ValueError: `resolution` is not one of the space's.

    Source:
        Once-for-All (arXiv:1908.09791), `sample_active_subnet`.

    Example:
        >>> import numpy as np
        >>> from pfnas_fast.space import load_space, uniform_population
        >>> uniform_population(load_space("tiny"), np.random.default_rng(0), 5).shape
        (5, 13)
    """
    population = np.empty((n, space.num_slots), np.uint8)
    for block in space.blocks:
        population[:, block.index] = rng.integers(1, space.slot_sizes[block.index] + 1, n, dtype=np.uint8)
    for stage, slots in zip(space.stages, space.stage_slices, strict=True):
        depth = rng.choice(np.array(stage.depths), n)
        population[:, slots] *= np.arange(stage.depths[-1]) < depth[:, None]
    if resolution is None:
        population[:, -1] = rng.integers(1, len(space.resolutions) + 1, n, dtype=np.uint8)
    else:
        population[:, -1] = 1 + resolution_index(space, resolution, "uniform_population")
    return population


def resolution_index(space: Space, resolution: int, function: str) -> int:
    """Index of a resolution among the space's.

    Raises:
        ValueError: It is not one of them; the text starts with `function`.
    """
    if resolution not in space.resolutions:
        raise InputError(
            f"{function}: expected one of {space.resolutions} for resolution, got {resolution!r}"
        )
    return space.resolutions.index(resolution)
