# SPDX-License-Identifier: Apache-2.0
"""Budget-conditioned sampling against full enumeration, and its behaviour on spaces too large for that."""

from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats

from pfnas_fast.errors import InputError
from pfnas_fast.space import AdditiveCost, BudgetSampler, CostModel, Space, load_space, preset_names


def float_cost(space: Space) -> AdditiveCost:
    """A cost without any common step."""
    rng = np.random.default_rng(5)
    shape = CostModel(space, num_classes=1).macs_table.shape
    table = rng.lognormal(0.0, 1.0, shape)
    table[:, :, 0] = 0.0
    return AdditiveCost(space, table, rng.uniform(1.0, 2.0, shape[0]), name="ms")


def windows(values: np.ndarray) -> list[tuple[float, float]]:
    """The lower and the upper quarter, the middle, everything, and the cheapest path alone."""
    q = np.quantile(values, [0.25, 0.4, 0.6, 0.75])
    low, high = values.min(), values.max()
    return [(low, q[0]), (q[1], q[2]), (q[3], high), (low, high), (low, low)]


@pytest.mark.parametrize("kind", ["macs", "float"])
@pytest.mark.parametrize("measure", ["genes", "paths"])
@pytest.mark.parametrize("num_buckets", [16, 8192])
def test_draws_follow_the_measure(
    small_space: Space, all_paths: Callable, gene_measure: Callable, kind: str, measure: str, num_buckets: int
) -> None:
    """Chi-square of 20,000 draws a window against all 120 paths; p > 1e-3 for each of five fixed seeds."""
    cost = CostModel(small_space, num_classes=3) if kind == "macs" else float_cost(small_space)
    sampler = BudgetSampler(cost, num_buckets, measure=measure)
    paths = all_paths(small_space, 48)
    population = small_space.encode(paths)
    values = sampler.cost.of(population)
    chance = gene_measure(small_space, paths) if measure == "genes" else np.ones(len(paths))
    for seed, (low, high) in enumerate(windows(values)):
        draws = sampler.sample(np.random.default_rng(seed), 20000, low, high, 48)
        inside = (values >= low) & (values <= high)
        order = {row.tobytes(): i for i, row in enumerate(population)}
        counts = np.bincount([order[row.tobytes()] for row in draws], minlength=len(paths))
        assert counts[~inside].sum() == 0
        expected = chance[inside] / chance[inside].sum() * 20000
        if inside.sum() > 1:
            assert stats.chisquare(counts[inside], expected).pvalue > 1e-3


@pytest.mark.parametrize("resolution", [32, 48])
def test_window_sizes_equal_enumeration(
    small_space: Space, all_paths: Callable, gene_measure: Callable, resolution: int
) -> None:
    cost = CostModel(small_space, num_classes=3)
    sampler = BudgetSampler(cost)
    paths = all_paths(small_space, resolution)
    values, chance = cost.macs_m(paths), gene_measure(small_space, paths)
    ends = np.sort(values)
    for low, high in [*windows(values), (ends[10], ends[10]), (ends[10] + 1e-9, ends[50] - 1e-9)]:
        inside = (values >= low) & (values <= high)
        lower, upper = sampler.bracket(low, high, resolution)
        assert lower == upper
        assert sampler.probability(low, high, resolution) == pytest.approx(chance[inside].sum(), rel=1e-12)
        assert sampler.num_paths(low, high, resolution) == inside.sum()


def test_float_costs_are_bracketed(small_space: Space, all_paths: Callable, gene_measure: Callable) -> None:
    sampler = BudgetSampler(float_cost(small_space))
    paths = all_paths(small_space, 32)
    values, chance = sampler.cost.of(small_space.encode(paths)), gene_measure(small_space, paths)
    ends = np.sort(values)
    for low, high in windows(values)[:4]:
        exact = chance[(values >= low) & (values <= high)].sum()
        lower, upper = sampler.bracket(low, high, 32)
        assert lower - 1e-12 <= exact <= upper + 1e-12
    # Between the costs of two paths no bucket straddles an end, so the bracket closes.
    low, high = (ends[10] + ends[11]) / 2, (ends[80] + ends[81]) / 2
    exact = chance[(values >= low) & (values <= high)].sum()
    assert sampler.bracket(low, high, 32) == pytest.approx((exact, exact), rel=1e-12)
    assert sampler.probability(low, high, 32) == pytest.approx(exact, rel=1e-12)


def test_probability_and_count_over_all_resolutions(small_space: Space) -> None:
    cost = CostModel(small_space, num_classes=3)
    sampler = BudgetSampler(cost)
    low, high = cost.range_m()
    assert sampler.num_paths(low, high) == 240
    assert sampler.probability(low, high) == pytest.approx(1.0, rel=1e-12)
    middle = cost.range_m(48)[0]
    each = [sampler.probability(low, middle, r) for r in small_space.resolutions]
    assert sampler.probability(low, middle) == pytest.approx(np.mean(each), rel=1e-12)


def test_whole_of_tiny_is_counted_exactly() -> None:
    space = load_space("tiny")
    cost = CostModel(space, num_classes=3)
    sampler = BudgetSampler(cost)
    assert sampler.num_paths(*cost.range_m(128), 128) == space.num_paths
    assert sampler.num_paths(cost.range_m(128)[0], cost.range_m(128)[0], 128) == 1


@pytest.mark.parametrize("name", preset_names())
@pytest.mark.parametrize("place", [0.0, 0.3, 1.0])
def test_narrow_windows_anywhere(name: str, place: float) -> None:
    """1 % windows, at the ends of probability down to 1e-19: valid paths, all inside, most draws kept."""
    space = load_space(name)
    cost = CostModel(space, num_classes=20)
    sampler = BudgetSampler(cost)
    low, high = cost.range_m(space.resolutions[0])
    middle = low * (high / low) ** place
    window = (max(low, middle * 0.995), min(high, middle * 1.005))
    population = sampler.sample(np.random.default_rng(0), 500, *window, space.resolutions[0])
    macs = cost.macs_m(population)
    assert macs.min() >= window[0]
    assert macs.max() <= window[1]
    assert (population[:, -1] == 1).all()
    assert sampler.acceptance > 0.5
    assert sampler.num_accepted == 500


def test_tails_follow_the_exact_probability() -> None:
    """In the dearest 2 % of tiny, the share of a sub-window is what the counts say."""
    space = load_space("tiny")
    cost = CostModel(space, num_classes=3)
    sampler = BudgetSampler(cost)
    high = cost.range_m(160)[1]
    draws = cost.macs_m(sampler.sample(np.random.default_rng(0), 20000, 0.98 * high, high, 160))
    share = sampler.probability(0.985 * high, high, 160) / sampler.probability(0.98 * high, high, 160)
    assert stats.binomtest(int((draws >= 0.985 * high).sum()), 20000, share).pvalue > 1e-3


def test_resolution_is_uniform_among_the_feasible() -> None:
    space = load_space("tiny")
    cost = CostModel(space, num_classes=3)
    sampler = BudgetSampler(cost)
    assert sampler.feasible(8.8, 9.0) == [128, 160, 192]
    assert sampler.feasible(7.0, 7.2) == [128, 160]
    assert sampler.feasible(30.0, 31.0) == [160, 192]
    assert sampler.feasible(3.0, 3.5) == []
    codes = sampler.sample(np.random.default_rng(0), 6000, 8.8, 9.0)[:, -1]
    assert stats.chisquare(np.bincount(codes)[1:]).pvalue > 1e-3


def test_gaps_between_paths_are_not_feasible(small_space: Space, all_paths: Callable) -> None:
    cost = CostModel(small_space, num_classes=3)
    values = np.unique(cost.macs_m(all_paths(small_space, 32) + all_paths(small_space, 48)))
    wide = int(np.diff(values).argmax())
    low, high = values[wide] + 1e-6, values[wide + 1] - 1e-6
    assert BudgetSampler(cost).feasible(low, high) == []
    with pytest.raises(InputError, match="expected a window that holds a path, within"):
        BudgetSampler(cost).sample(np.random.default_rng(0), 1, low, high)
    with pytest.raises(InputError, match="expected a window that holds a path, within"):
        BudgetSampler(cost).sample_log_uniform(np.random.default_rng(0), 1, low, high)


@pytest.mark.parametrize("name", preset_names())
def test_log_uniform_covers_budgets_and_resolutions(name: str) -> None:
    space = load_space(name)
    cost = CostModel(space, num_classes=3)
    population = BudgetSampler(cost).sample_log_uniform(np.random.default_rng(0), 8000)
    macs = cost.macs_m(population)
    low, high = cost.range_m()
    counts, _ = np.histogram(np.log(macs), 8, (np.log(low), np.log(high)))
    # Windows are clipped at the ends, which moves at most window / 2 of log range into or out of a bin.
    assert counts.min() > 850
    assert counts.max() < 1150
    # Only the first resolution is that cheap; where all resolutions fit, each is as likely.
    second, last = cost.range_m(space.resolutions[1])[0], cost.range_m(space.resolutions[-1])[0]
    assert set(population[macs < second, -1]) == {1}
    shared = (macs > 1.02 * last) & (macs < 0.98 * cost.range_m(space.resolutions[0])[1])
    shares = np.bincount(population[shared, -1], minlength=len(space.resolutions) + 1)[1:]
    assert stats.chisquare(shares).pvalue > 1e-3


def test_log_uniform_stays_between_its_ends() -> None:
    cost = CostModel(load_space("tiny"), num_classes=3)
    sampler = BudgetSampler(cost)
    macs = cost.macs_m(sampler.sample_log_uniform(np.random.default_rng(0), 2000, 11.0, 13.0, window=0.1))
    assert macs.min() >= 11.0
    assert macs.max() <= 13.0
    below = cost.macs_m(sampler.sample_log_uniform(np.random.default_rng(0), 50, 1.0, 4.0))
    assert below.max() <= 4.0


def test_log_uniform_skips_gaps_of_small_spaces(small_space: Space) -> None:
    cost = CostModel(small_space, num_classes=3)
    population = BudgetSampler(cost).sample_log_uniform(np.random.default_rng(0), 500, window=0.001)
    small_space.check_population(population)
    assert len(np.unique(population, axis=0)) > 100


def test_draws_depend_on_the_generator_alone() -> None:
    cost = CostModel(load_space("tiny"), num_classes=3)
    first, second = BudgetSampler(cost), BudgetSampler(cost)
    first.sample(np.random.default_rng(9), 100, 5.0, 30.0)  # history must not matter
    for _ in range(2):
        a = first.sample_log_uniform(np.random.default_rng(1), 300)
        b = second.sample_log_uniform(np.random.default_rng(1), 300)
        assert (a == b).all()
        a = first.sample(np.random.default_rng(2), 300, 9.0, 9.2)
        b = second.sample(np.random.default_rng(2), 300, 9.0, 9.2)
        assert (a == b).all()


def test_no_draws() -> None:
    sampler = BudgetSampler(CostModel(load_space("tiny"), num_classes=3))
    assert sampler.sample(np.random.default_rng(0), 0, 9.0, 9.2).shape == (0, 13)
    assert sampler.sample_log_uniform(np.random.default_rng(0), 0).shape == (0, 13)
    assert sampler.acceptance == 1.0


def test_space_with_one_path(small_description: dict) -> None:
    for stage in small_description["stages"]:
        stage.update(depths=[1], expand_ratios=[2], kernel_sizes=[3])
    small_description["resolutions"] = [32]
    space = Space.from_dict(small_description)
    cost = CostModel(space, num_classes=1)
    low, high = cost.range_m()
    sampler = BudgetSampler(cost)
    assert low == high
    assert sampler.num_paths(low, high) == 1
    assert (sampler.sample(np.random.default_rng(0), 7, low, high) == space.encode([space.max_path()])).all()
    assert len(sampler.sample_log_uniform(np.random.default_rng(0), 7)) == 7


def test_any_additive_cost() -> None:
    """A latency table on a grid of 0.01 ms, with a constant of its own per resolution."""
    space = load_space("tiny")
    macs = CostModel(space, num_classes=3)
    latency = AdditiveCost(
        space, np.round(macs.macs_table / 2e4), np.array([90.0, 120.0, 160.0]), 100.0, "ms"
    )
    sampler = BudgetSampler(latency)
    low, high = latency.range(160)
    middle = (low + high) / 2
    population = sampler.sample(np.random.default_rng(0), 300, middle, middle + 0.01, 160)
    assert set(np.round(latency.of(population), 6)) <= {
        np.round(v, 2) for v in (middle, middle + 0.005, middle + 0.01)
    }
    assert sampler.num_paths(low, high, 160) == space.num_paths


@pytest.mark.parametrize(
    ("low", "high", "resolution", "message"),
    [
        (
            1.0,
            2.0,
            None,
            "tiny: expected a window that holds a path, within 3.89907 to 49.6534 million MACs, got 1 to 2",
        ),
        (4.0, 5.0, 192, "within 8.79978 to 49.6534 million MACs at 192 px, got 4 to 5"),
        (9.0, 8.0, None, "BudgetSampler: expected finite low_m <= high_m, got 9.0 and 8.0"),
        (float("nan"), 8.0, None, "BudgetSampler: expected finite low_m <= high_m, got nan and 8.0"),
        (9.0, 10.0, 100, "BudgetSampler: expected one of (128, 160, 192) for resolution, got 100"),
    ],
)
def test_impossible_windows_are_refused(
    low: float, high: float, resolution: int | None, message: str
) -> None:
    sampler = BudgetSampler(CostModel(load_space("tiny"), num_classes=3))
    with pytest.raises(InputError) as caught:
        sampler.sample(np.random.default_rng(0), 1, low, high, resolution)
    assert message in str(caught.value)


def test_bad_arguments_are_refused() -> None:
    space = load_space("tiny")
    cost = CostModel(space, num_classes=3)
    with pytest.raises(
        InputError, match=r"BudgetSampler: expected one of .'genes', 'paths'. for measure, got 'x'"
    ):
        BudgetSampler(cost, measure="x")
    with pytest.raises(InputError, match="expected at least 16 for num_buckets, got 4"):
        BudgetSampler(cost, 4)
    with pytest.raises(InputError, match="expected 0 < window < 1, got 0"):
        BudgetSampler(cost).sample_log_uniform(np.random.default_rng(0), 1, window=0)
    with pytest.raises(InputError, match=r"within 3.89907 to 49.6534 million MACs, got 60 to 70"):
        BudgetSampler(cost).sample_log_uniform(np.random.default_rng(0), 1, 60.0, 70.0)
    with pytest.raises(InputError, match="expected shapes"):
        AdditiveCost(space, cost.macs_table[:1], cost.macs_constant)
    with pytest.raises(InputError, match="expected finite costs >= 0, and 0 at code 0, for table"):
        AdditiveCost(space, cost.macs_table - 1, cost.macs_constant)
    with pytest.raises(InputError, match="expected finite costs for constant"):
        AdditiveCost(space, cost.macs_table, cost.macs_constant * np.nan)
