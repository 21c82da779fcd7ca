# SPDX-License-Identifier: Apache-2.0
"""Costs of whole networks from per-choice tables: a population is one gather and a sum."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pfnas_fast.errors import InputError
from pfnas_fast.space import cost_terms
from pfnas_fast.space.cost_terms import Cost
from pfnas_fast.space.path import Path
from pfnas_fast.space.population import gene_tables, resolution_index
from pfnas_fast.space.space import Space

TASKS = ("detection", "classification", "backbone")
_ROWS_PER_CHUNK = 8192  # keeps the temporaries of a gather in the second-level cache


class CostModel:
    """MACs, parameters and saved bytes of every path of a space, exact and additive per resolution.

    The tables hold whole numbers (in float64, exact below 2^53), so sums are exact in any order. "detection"
    counts the whole detector (backbone, neck, head), "classification" backbone and tail, "backbone" the
    stages alone.

    `saved_bytes` is the memory, per image in float32, that autograd keeps for backward after a training
    forward of the reference backend: every distinct storage with a batch dimension that
    `torch.autograd.graph.saved_tensors_hooks` sees. Counted: the input image; inputs of convolutions, linear
    layers and BN; outputs of ReLU; inputs of h-swish and h-sigmoid; both factors of the SE product; in the
    tail the dropout mask; in the head the raw predictions (the box scale keeps its columns of them) and the
    inputs of the box softplus. Not counted: parameters, kernels derived from them, per-channel vectors, and
    the loss.

    Args:
        space: The space; `space.for_classification()` for square classification inputs.
        num_classes: Number of classes; may be None for "backbone".
        task: "detection", "classification" or "backbone".

    Attributes:
        macs_table, params_table, saved_bytes_table: [num_resolutions, num_slots - 1, max_code + 1] float64; 0
            at code 0.
        macs_constant, params_constant, saved_bytes_constant: [num_resolutions] float64; stem, first block,
            neck, head.

    Raises:
        ValueError: Unknown task or impossible number of classes.

    Example:
        >>> from pfnas_fast.space import CostModel, load_space
        >>> space = load_space("ofa_mbv3_w1.0").for_classification()
        >>> cost = CostModel(space, num_classes=1000, task="classification")
        >>> round(cost.path_macs_m(space.max_path()), 1)
        566.2
    """

    def __init__(self, space: Space, *, num_classes: int | None = None, task: str = "detection") -> None:
        if task not in TASKS:
            raise InputError(f"CostModel: expected one of {TASKS} for task, got {task!r}")
        if task != "backbone" and (
            isinstance(num_classes, bool) or not isinstance(num_classes, (int, np.integer)) or num_classes < 1
        ):
            raise InputError(f"CostModel: expected an int >= 1 for num_classes, got {num_classes!r}")
        self.space = space
        self.num_classes = num_classes
        self.task = task
        tables = [_table(space, r) for r in space.resolutions]
        constants = [_constant(space, r, task, num_classes or 0) for r in space.resolutions]
        self.macs_table, self.macs_constant = _stack(tables, constants, "macs", 1)
        self.params_table, self.params_constant = _stack(tables, constants, "params", 1)
        self.saved_bytes_table, self.saved_bytes_constant = _stack(tables, constants, "saved", 4)

    def macs_m(self, paths: NDArray[np.uint8] | Sequence[Path]) -> NDArray[np.float64]:
        """MACs in millions.

        Args:
            paths: [num_paths, num_slots] uint8 population, or a list of paths.

        Returns:
            [num_paths] float64.

        Raises:
            ValueError: Not paths of this space.
        """
        return self._sum(paths, self.macs_table, self.macs_constant) / 1e6

    def params_m(self, paths: NDArray[np.uint8] | Sequence[Path]) -> NDArray[np.float64]:
        """Parameters in millions of the stand-alone subnets; arguments and result as `macs_m`."""
        return self._sum(paths, self.params_table, self.params_constant) / 1e6

    def saved_bytes(self, paths: NDArray[np.uint8] | Sequence[Path]) -> NDArray[np.float64]:
        """Bytes per image that autograd keeps for backward (see the class); arguments as `macs_m`."""
        return self._sum(paths, self.saved_bytes_table, self.saved_bytes_constant)

    def path_macs_m(self, path: Path) -> float:
        """MACs of one path, in millions."""
        return float(self.macs_m([path])[0])

    def range_m(self, resolution: int | None = None) -> tuple[float, float]:
        """Smallest and largest MACs, in millions, at one resolution or (None) over all; exact.

        Raises:
            ValueError: `resolution` is not one of the space's.
        """
        rows: Any = range(len(self.space.resolutions))
        if resolution is not None:
            rows = [resolution_index(self.space, resolution, "range_m")]
        bounds = [additive_range(self.space, self.macs_table[r], float(self.macs_constant[r])) for r in rows]
        return min(low for low, _ in bounds) / 1e6, max(high for _, high in bounds) / 1e6

    def check_budget_m(self, macs_m: float, argument: str = "max_macs_m") -> None:
        """Refuse a budget outside the space.

        Args:
            macs_m: Budget in millions of MACs.
            argument: What the user calls it.

        Raises:
            ValueError: Not between the smallest and the largest path; the text gives the feasible range.
        """
        low, high = self.range_m()
        if not low <= macs_m <= high:
            # Rounded inwards, so that the printed numbers are themselves accepted.
            raise InputError(
                f"{self.space.name}: expected {math.ceil(low * 100) / 100:.2f} to "
                f"{math.floor(high * 100) / 100:.2f} million MACs for {argument}, got {macs_m:g}"
            )

    def _sum(
        self,
        paths: NDArray[np.uint8] | Sequence[Path],
        table: NDArray[np.float64],
        constant: NDArray[np.float64],
    ) -> NDArray[np.float64]:
        if isinstance(paths, np.ndarray):
            self.space.check_population(paths)
        else:
            paths = self.space.encode(paths)
        return gather_sum(paths, table, constant)


def gather_sum(
    population: NDArray[np.uint8], table: NDArray[np.float64], constant: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Additive cost of each row of a valid population.

    Args:
        population: [num_paths, num_slots] uint8.
        table: [num_resolutions, num_slots - 1, num_codes] float64.
        constant: [num_resolutions] float64.

    Returns:
        [num_paths] float64.
    """
    num_resolutions, num_blocks, num_codes = table.shape
    columns = np.ascontiguousarray(table.transpose(1, 0, 2)).reshape(num_blocks, num_resolutions * num_codes)
    total = np.empty(len(population), np.float64)
    for start in range(0, len(population), _ROWS_PER_CHUNK):
        genes = np.ascontiguousarray(population[start : start + _ROWS_PER_CHUNK].T).astype(np.intp)
        resolution = genes[-1] - 1
        part = constant[resolution]
        offset = resolution * num_codes
        for block in range(num_blocks):
            part += columns[block].take(genes[block] + offset)
        total[start : start + _ROWS_PER_CHUNK] = part
    return total


def additive_range(space: Space, table: NDArray[np.float64], constant: float) -> tuple[float, float]:
    """Smallest and largest additive cost at one resolution.

    Args:
        space: The space.
        table: [num_blocks, num_codes], cost of each choice; code 0 is not read.
        constant: Added to both.

    Returns:
        (smallest, largest), in the table's unit.
    """
    codes = np.zeros((2, space.num_slots), np.uint8)
    codes[:, -1] = 1
    for stage, slots in zip(space.stages, space.stage_slices, strict=True):
        depths = np.array(stage.depths)
        for row, sign in enumerate((1.0, -1.0)):
            choices = [sign * table[b, 1 : space.slot_sizes[b] + 1] for b in range(slots.start, slots.stop)]
            total = np.cumsum([c.min() for c in choices])[depths - 1]
            depth = depths[total.argmin()]
            codes[row, slots][:depth] = [1 + c.argmin() for c in choices[:depth]]
    # Summed like any population, so that the ends are what these two paths cost to the last bit.
    low, high = gather_sum(codes, table[None], np.array([constant]))
    return float(low), float(high)


def _table(space: Space, resolution: int) -> list[list[Cost]]:
    """Cost of each (block, code) at a resolution."""
    kernels, expands = (t.tolist() for t in gene_tables(space))
    sizes = (space.stem_size(resolution), *space.stage_sizes(resolution))
    rows = []
    for block in space.blocks:
        out_size = sizes[block.stage + 1]
        in_size = sizes[block.stage] if block.position == 0 else out_size
        genes = zip(kernels[block.index], expands[block.index], strict=True)
        rows.append(
            [cost_terms.block_cost(block, k, e, in_size, out_size) if k else Cost() for k, e in genes]
        )
    return rows


def _constant(space: Space, resolution: int, task: str, num_classes: int) -> Cost:
    """Everything that no gene but the resolution changes."""
    stem_size, last_size = space.stem_size(resolution), space.stage_sizes(resolution)[-1]
    last_channels = space.stages[-1].out_channels
    cost = cost_terms.stem_cost(
        space.stem_channels, space.stem_activation, space.canvas(resolution), stem_size
    )
    if space.first_block is not None:
        cost += cost_terms.static_block_cost(space.first_block, stem_size)
    if task == "detection":
        return cost + cost_terms.neck_head_cost(
            space.head, space.tap_channels, space.tap_sizes(resolution), num_classes
        )
    if task == "classification":
        return cost + cost_terms.tail_cost(space.tail, last_channels, last_size, num_classes)
    # Nothing follows the last stage's output, so nothing saves it.
    return cost + Cost(saved=-last_channels * last_size[0] * last_size[1])


def _stack(
    tables: list[list[list[Cost]]], constants: list[Cost], field: str, unit: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    table = [[[unit * getattr(c, field) for c in row] for row in rows] for rows in tables]
    constant = [unit * getattr(c, field) for c in constants]
    return np.array(table, np.float64), np.array(constant, np.float64)
