# SPDX-License-Identifier: Apache-2.0
"""Where the free paths of a training step come from.

A sampler is bound to a cost model once; after that `sample(rng, n)` depends on the generator and the bound
state alone, never on earlier calls, so a resumed training draws the same paths.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import numpy as np

from pfnas_fast.errors import InputError
from pfnas_fast.filter.exact import ExactSampler
from pfnas_fast.filter.thresholds import BudgetThresholds, PathScorer, score_tau

__all__ = ["Balanced", "BestUp", "Deferred", "Filtered", "RandomPrune", "Sampler", "Uniform"]

_STEP_STREAM = 0x5A3
_STEPS_PER_BLOCK = 64
_MAX_BLOCKS = 4  # kept at once: callers that draw again go back and forth between a few seeds
_MIN_POOL = 512  # paths BestUp compares at once, so that neighbours in MACs are within about 2 %
_MAX_ROUNDS = 64  # of draws until every slot is filled; a space that accepts 1 in 100 still needs only two


class Sampler(Protocol):
    """Draws paths for training."""

    def bind(self, cost: Any) -> Sampler:
        """Prepare for one cost model; returns a sampler that can draw."""
        ...

    def sample(self, rng: np.random.Generator, n: int) -> np.ndarray:
        """Draw a uint8 population [n, num_slots]."""
        ...

    def population_for_step(self, seed: int, step: int, n: int) -> np.ndarray:
        """The paths of one training step, a function of (seed, step) alone."""
        ...


Self = TypeVar("Self", bound="_Base")


class _Base:
    """What all samplers share: the binding and the per-step stream."""

    def __init__(self, space: Any) -> None:
        self.space = space
        self.cost: Any = None
        self._budgets: Any = None
        self._blocks: dict[tuple[int, int, int], np.ndarray] = {}

    def bind(self: Self, cost: Any) -> Self:
        """Prepare for one cost model.

        Args:
            cost: `CostModel` of the same space.

        Returns:
            self.

        Raises:
            InputError: the cost model is of another space.
        """
        if cost.space != self.space:
            raise InputError(
                f"{type(self).__name__}.bind: expected a cost model of space {self.space.name!r}, "
                f"got one of {cost.space.name!r}"
            )
        if self.cost is not cost:
            self.cost = cost
            self._blocks = {}
            self._prepare()
        return self

    def _prepare(self) -> None:
        pass

    def _require_bound(self) -> None:
        if self.cost is None:
            raise InputError(
                f"{type(self).__name__}.sample: expected a sampler bound to a cost model, call bind(cost)"
            )

    def sample(self, rng: np.random.Generator, n: int) -> np.ndarray:
        """Draw paths.

        Args:
            rng: The only source of randomness.
            n: Number of paths.

        Returns:
            uint8 [n, num_slots].
        """
        raise NotImplementedError

    def population_for_step(self, seed: int, step: int, n: int) -> np.ndarray:
        """The paths of one training step, a function of (seed, step, n) and the bound state alone.

        Steps are drawn in blocks, since a draw of two paths costs as much as one of a hundred.

        Args:
            seed: Of the run.
            step: Training step, >= 0.
            n: Number of paths.

        Returns:
            uint8 [n, num_slots].
        """
        block = step // _STEPS_PER_BLOCK
        key = (seed, block, n)
        if key not in self._blocks:
            rng = np.random.default_rng([seed, _STEP_STREAM, block, n])
            steps = np.repeat(block * _STEPS_PER_BLOCK + np.arange(_STEPS_PER_BLOCK), n)
            if len(self._blocks) >= _MAX_BLOCKS:
                del self._blocks[next(iter(self._blocks))]  # the oldest
            self._blocks[key] = self._sample_steps(rng, steps)
        first = (step - block * _STEPS_PER_BLOCK) * n
        return self._blocks[key][first : first + n].copy()

    def _sample_steps(self, rng: np.random.Generator, steps: np.ndarray) -> np.ndarray:
        """One path for each entry of `steps` (int64 [n], the step that will train it)."""
        return self.sample(rng, len(steps))


def _drift_rng() -> np.random.Generator:
    return np.random.default_rng([0, 0xD1])


class Uniform(_Base):
    """Once-for-All's gene measure: depth uniform, then each active gene, then the resolution."""

    def sample(self, rng: np.random.Generator, n: int) -> np.ndarray:
        """See `Sampler`."""
        from pfnas_fast.space import uniform_population

        return uniform_population(self.space, rng, n)


class Balanced(_Base):
    """Budgets log-uniform, then the resolution uniform among the feasible, then a path of that budget."""

    def __init__(self, space: Any, *, window: float = 0.02) -> None:
        super().__init__(space)
        self.window = window

    def _prepare(self) -> None:
        self._budgets = ExactSampler(self.cost, window=self.window)

    def sample(self, rng: np.random.Generator, n: int) -> np.ndarray:
        """See `Sampler`."""
        self._require_bound()
        return self._budgets.sample_log_uniform(rng, n)


class _Rejecting(Balanced):
    """Balanced draws of which only accepted paths count."""

    def _accept(self, population: np.ndarray) -> np.ndarray:
        raise NotImplementedError

    def _expected_acceptance(self) -> float:
        raise NotImplementedError

    def _explore(self, rng: np.random.Generator, n: int, epsilon: float | np.ndarray) -> np.ndarray:
        """n paths, each free of the filter with probability epsilon (a number, or one per path)."""
        self._require_bound()
        if n == 0:
            return np.zeros((0, self.space.num_slots), np.uint8)
        free = rng.random(n) < epsilon
        kept: list[np.ndarray] = [super().sample(rng, int(free.sum()))] if free.any() else []
        missing = n - int(free.sum())
        last = None
        for _ in range(_MAX_ROUNDS):
            if missing == 0:
                break
            # Enough draws that one round mostly suffices: mean + 3 standard deviations.
            wanted = missing / self._expected_acceptance()
            last = super().sample(rng, int(wanted + 3.0 * wanted**0.5) + 4)
            chosen = last[self._accept(last)][:missing]
            kept.append(chosen)
            missing -= len(chosen)
        if missing and last is not None:
            kept.append(last[:missing])  # nothing acceptable found: go on unfiltered, never loop for ever
        population = np.concatenate(kept)
        order = np.empty(n, np.int64)
        order[np.concatenate([np.flatnonzero(free), np.flatnonzero(~free)])] = np.arange(n)
        return population[order]


class Filtered(_Rejecting):
    """Balanced draws that the path filter accepts, f >= t(budget); a share epsilon explores without it.

    Args:
        space: The space.
        flt: A fitted filter.
        keep: Share of the paths kept at every budget.
        epsilon: Probability that a drawn path skips the filter.
        decay_steps: With `population_for_step`: epsilon falls linearly to zero at this step; None = constant.
        num_bins: Budget bins of the thresholds.
        per_bin: Paths drawn per bin for the thresholds.
        window: Relative width of the MACs window around a drawn budget.

    Raises:
        InputError: epsilon outside [0, 1] or keep outside (0, 1].
    """

    def __init__(
        self,
        space: Any,
        flt: PathScorer,
        *,
        keep: float = 0.3,
        epsilon: float = 0.1,
        decay_steps: int | None = None,
        num_bins: int = 8,
        per_bin: int = 10_000,
        window: float = 0.02,
    ) -> None:
        super().__init__(space, window=window)
        if not 0.0 <= epsilon <= 1.0:
            raise InputError(f"Filtered: expected 0 <= epsilon <= 1, got {epsilon}")
        if not 0.0 < keep <= 1.0:
            raise InputError(f"Filtered: expected 0 < keep <= 1, got {keep}")
        self.flt = flt
        self.keep = keep
        self.epsilon = epsilon
        self.decay_steps = decay_steps
        self.num_bins = num_bins
        self.per_bin = per_bin
        self.thresholds: BudgetThresholds | None = None

    def _prepare(self) -> None:
        super()._prepare()
        base = Balanced(self.space, window=self.window)
        base.cost, base._budgets = self.cost, self._budgets
        self.thresholds = BudgetThresholds(
            self.flt, self.cost, base, keep=self.keep, num_bins=self.num_bins, per_bin=self.per_bin
        )

    def refresh(self, flt: PathScorer) -> dict[str, float]:
        """Go on with a re-fitted filter.

        Args:
            flt: The new filter.

        Returns:
            The drift, see `BudgetThresholds.drift` (on 4,000 balanced draws).
        """
        self._require_bound()
        old = self.thresholds
        self.flt = flt
        self._blocks = {}
        self._prepare()
        if old is None or self.thresholds is None:
            raise RuntimeError("Filtered: bound without thresholds")
        return old.drift(self.thresholds, Balanced.sample(self, _drift_rng(), 4000))

    def _accept(self, population: np.ndarray) -> np.ndarray:
        if self.thresholds is None:
            raise RuntimeError("Filtered: bound without thresholds")
        return self.thresholds.accept(population)

    def _expected_acceptance(self) -> float:
        return self.keep

    def epsilon_at(self, step: int) -> float:
        """Exploration at a step."""
        if self.decay_steps is None:
            return self.epsilon
        return self.epsilon * max(0.0, 1.0 - step / max(self.decay_steps, 1))

    def sample(self, rng: np.random.Generator, n: int) -> np.ndarray:
        """See `Sampler`; explores with `epsilon`."""
        return self._explore(rng, n, self.epsilon)

    def _sample_steps(self, rng: np.random.Generator, steps: np.ndarray) -> np.ndarray:
        return self._explore(rng, len(steps), np.array([self.epsilon_at(int(step)) for step in steps]))


class RandomPrune(_Rejecting):
    """A baseline: a random subset of the space of the same size as the filter's.

    A path belongs to it iff a hash of its genes falls below `keep`; every path keeps its verdict.

    Args:
        space: The space.
        keep: Share of the paths that stay.
        seed: Chooses the subset.
        window: Relative width of the MACs window around a drawn budget.

    Raises:
        InputError: keep outside (0, 1].
    """

    def __init__(self, space: Any, keep: float = 0.3, seed: int = 0, *, window: float = 0.02) -> None:
        super().__init__(space, window=window)
        if not 0.0 < keep <= 1.0:
            raise InputError(f"RandomPrune: expected 0 < keep <= 1, got {keep}")
        self.keep = keep
        self.seed = seed

    def _prepare(self) -> None:
        super()._prepare()
        rng = np.random.default_rng([self.seed, 0x9A])
        self._keys = rng.integers(0, 2**64, (self.space.num_slots, 256), dtype=np.uint64)

    def _accept(self, population: np.ndarray) -> np.ndarray:
        # Zobrist hashing: the keys of a path's codes, xored; 53 bits make a uniform double.
        keys = self._keys[np.arange(self.space.num_slots), population]
        return (np.bitwise_xor.reduce(keys, axis=1) >> np.uint64(11)) * 2.0**-53 < self.keep

    def _expected_acceptance(self) -> float:
        return self.keep

    def sample(self, rng: np.random.Generator, n: int) -> np.ndarray:
        """See `Sampler`."""
        return self._explore(rng, n, 0.0)


class Deferred(Balanced):
    """Balanced draws until a filter is accepted, then those of the sampler that is made of it.

    Args:
        space: The space.
        make: Makes the later sampler of a filter.
        decay_steps: Given to the later sampler where it explores (`Filtered`).
        window: Relative width of the MACs window around a drawn budget.

    Attributes:
        successor: The later sampler; None before the first `refresh`.

    Example:
        >>> import numpy as np
        >>> from pfnas_fast.filter import BestUp, Deferred
        >>> from pfnas_fast.filter.rivals import MacsOnly
        >>> from pfnas_fast.space import CostModel, load_space
        >>> cost = CostModel(load_space("tiny"), num_classes=3)
        >>> sampler = Deferred(cost.space, lambda flt: BestUp(cost.space, flt)).bind(cost)
        >>> sampler.successor is None, sampler.refresh(MacsOnly()), type(sampler.successor).__name__
        (True, {}, 'BestUp')
    """

    def __init__(
        self,
        space: Any,
        make: Callable[[Any], Filtered | BestUp],
        *,
        decay_steps: int | None = None,
        window: float = 0.02,
    ) -> None:
        super().__init__(space, window=window)
        self.make = make
        self.decay_steps = decay_steps
        self.successor: Filtered | BestUp | None = None

    def refresh(self, flt: PathScorer) -> dict[str, float]:
        """Go on with an accepted filter.

        Args:
            flt: The filter.

        Returns:
            The drift, as the later sampler gives it; empty for the first filter, which has nothing before it.
        """
        self._require_bound()
        self._blocks = {}
        if self.successor is not None:
            return self.successor.refresh(flt)
        successor = self.make(flt)
        if isinstance(successor, Filtered):
            successor.decay_steps = self.decay_steps
        self.successor = successor.bind(self.cost)
        return {}

    def sample(self, rng: np.random.Generator, n: int) -> np.ndarray:
        """See `Sampler`."""
        return super().sample(rng, n) if self.successor is None else self.successor.sample(rng, n)

    def _sample_steps(self, rng: np.random.Generator, steps: np.ndarray) -> np.ndarray:
        if self.successor is None:
            return super()._sample_steps(rng, steps)
        return self.successor._sample_steps(rng, steps)


class BestUp(Balanced):
    """The best of `num_candidates` paths at the drawn budget, by predicted score.

    Args:
        space: The space.
        flt: A fitted filter.
        num_candidates: Paths compared per drawn budget, >= 1.
        window: Relative width of the MACs window around a drawn budget.

    Raises:
        InputError: num_candidates < 1.

    Source:
        AttentiveNAS (arXiv:2011.09011), sec. 3.2, BestUp-k.
    """

    def __init__(self, space: Any, flt: PathScorer, num_candidates: int = 3, *, window: float = 0.02) -> None:
        super().__init__(space, window=window)
        if num_candidates < 1:
            raise InputError(f"BestUp: expected num_candidates >= 1, got {num_candidates}")
        self.flt = flt
        self.num_candidates = num_candidates

    def sample(self, rng: np.random.Generator, n: int) -> np.ndarray:
        """See `Sampler`."""
        self._require_bound()
        k = self.num_candidates
        if k == 1 or n == 0:
            return super().sample(rng, n)
        num_groups = max(n, _MIN_POOL // k)
        pool = super().sample(rng, num_groups * k)
        macs_m = self.cost.macs_m(pool)
        # Sorted by MACs, k neighbours form a group: its members meet the same budget to a percent or two.
        groups = np.argsort(macs_m, kind="stable").reshape(num_groups, k)
        scores = self.flt.score(pool, macs_m)
        best = groups[np.arange(num_groups), np.argmax(scores[groups], axis=1)]
        return pool[rng.permutation(best)[:n]]

    def refresh(self, flt: PathScorer) -> dict[str, float]:
        """Go on with a re-fitted filter.

        Args:
            flt: The new filter.

        Returns:
            ``score_tau``: Kendall's tau of the two filters' scores (on 4,000 balanced draws).
        """
        self._require_bound()
        population = Balanced.sample(self, _drift_rng(), 4000)
        tau = score_tau(self.flt, flt, population, self.cost.macs_m(population))
        self.flt = flt
        self._blocks = {}
        return {"score_tau": tau}
