# SPDX-License-Identifier: Apache-2.0
"""Mutation, crossing and budget repair of whole populations; codes stay canonical: one row per subnet."""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["GeneOperators", "unique_rows"]


def unique_rows(population: np.ndarray) -> np.ndarray:
    """Indices of the first of each distinct row, ascending."""
    return np.sort(np.unique(population, axis=0, return_index=True)[1])


class GeneOperators:
    """Vectorised operators on populations of one space.

    Args:
        cost: `CostModel` of the space.

    Attributes:
        slot_sizes: int64 [num_slots].
    """

    def __init__(self, cost: Any) -> None:
        space = cost.space
        self.cost = cost
        self.slot_sizes = np.asarray(space.slot_sizes, np.int64)
        self.num_blocks = space.num_blocks
        self._stages = []
        start = 0
        for stage in space.stages:
            depths = np.asarray(stage.depths, np.int64)
            self._stages.append((start, start + int(depths[-1]), depths))
            start += int(depths[-1])

    def _apply_depths(
        self,
        rng: np.random.Generator,
        population: np.ndarray,
        stage: tuple[int, int, np.ndarray],
        depth: np.ndarray,
    ) -> None:
        """Set one stage's depth per row, in place: blocks that appear get random genes, the others go."""
        start, stop, _ = stage
        part = population[:, start:stop]
        present = np.arange(stop - start) < depth[:, None]
        fresh = 1 + (rng.random(part.shape) * self.slot_sizes[start:stop]).astype(np.uint8)
        part[...] = np.where(present, np.where(part == 0, fresh, part), 0)

    def mutate(self, rng: np.random.Generator, population: np.ndarray, probability: float) -> np.ndarray:
        """Redraw each gene with some probability.

        Args:
            rng: Source of randomness.
            population: uint8 [n, num_slots].
            probability: Per gene: the kernel-and-expand choice of a block, the depth of a stage, the
                resolution.

        Returns:
            uint8 [n, num_slots], a new array.
        """
        child = population.copy()
        fresh = 1 + (rng.random(child.shape) * self.slot_sizes).astype(np.uint8)
        redraw = (rng.random(child.shape) < probability) & (child != 0)
        child[redraw] = fresh[redraw]
        for stage in self._stages:
            start, stop, depths = stage
            depth = np.count_nonzero(child[:, start:stop], axis=1)
            redraw_depth = rng.random(len(child)) < probability
            depth = np.where(redraw_depth, rng.choice(depths, len(child)), depth)
            self._apply_depths(rng, child, stage, depth)
        return child

    def cross(self, rng: np.random.Generator, mothers: np.ndarray, fathers: np.ndarray) -> np.ndarray:
        """Take each stage's depth, each block's choice and the resolution from either parent.

        Args:
            rng: Source of randomness.
            mothers: uint8 [n, num_slots].
            fathers: uint8 [n, num_slots].

        Returns:
            uint8 [n, num_slots]; a block present in one parent only keeps that parent's genes.
        """
        pick = rng.random(mothers.shape) < 0.5
        child = np.where(pick, mothers, fathers)
        # Where the picked parent lacks the block, the other parent's genes serve if the depth calls for it.
        child = np.where(child == 0, np.maximum(mothers, fathers), child).astype(np.uint8)
        for stage in self._stages:
            start, stop, _ = stage
            donor = np.where(
                (rng.random(len(child)) < 0.5)[:, None], mothers[:, start:stop], fathers[:, start:stop]
            )
            self._apply_depths(rng, child, stage, np.count_nonzero(donor, axis=1))
        return child

    def repair(
        self,
        rng: np.random.Generator,
        population: np.ndarray,
        low_m: float,
        high_m: float,
        *,
        attempts: int = 24,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Bring paths into a MACs window by single random gene changes that lead towards it.

        Args:
            rng: Source of randomness.
            population: uint8 [n, num_slots].
            low_m: Lower bound, millions of MACs.
            high_m: Upper bound.
            attempts: Proposals per path.

        Returns:
            (uint8 [n, num_slots], float64 [n] MACs in millions); rows may still lie outside after all
            attempts.
        """
        population = population.copy()
        macs_m = self.cost.macs_m(population)
        probability = 2.0 / len(self.slot_sizes)
        for _ in range(attempts):
            gap = np.maximum(np.maximum(macs_m - high_m, low_m - macs_m), 0.0)
            rows = np.flatnonzero(gap > 0)
            if len(rows) == 0:
                break
            proposal = self.mutate(rng, population[rows], probability)
            cost = self.cost.macs_m(proposal)
            closer = np.maximum(np.maximum(cost - high_m, low_m - cost), 0.0) < gap[rows]
            population[rows[closer]] = proposal[closer]
            macs_m[rows[closer]] = cost[closer]
        return population, macs_m
