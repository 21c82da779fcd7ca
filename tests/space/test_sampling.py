# SPDX-License-Identifier: Apache-2.0
"""Uniform sampling under the gene measure, and the examples in the docstrings."""

import doctest
import importlib

import numpy as np
import pytest
from scipy import stats

from pfnas_fast.errors import InputError
from pfnas_fast.space import Space, load_space, preset_names, uniform_population


def test_genes_are_uniform() -> None:
    space = load_space("tiny")
    population = uniform_population(space, np.random.default_rng(0), 30000)
    space.check_population(population)
    depths = space.depths_of(population)
    for stage in range(4):
        assert stats.chisquare(np.bincount(depths[:, stage])[1:]).pvalue > 1e-3
    for block in range(space.num_blocks):
        active = population[population[:, block] != 0, block]
        assert stats.chisquare(np.bincount(active)[1:]).pvalue > 1e-3
    assert stats.chisquare(np.bincount(population[:, -1])[1:]).pvalue > 1e-3


def test_depths_are_independent_across_stages() -> None:
    space = load_space("tiny")
    depths = space.depths_of(uniform_population(space, np.random.default_rng(1), 30000))
    table = np.histogram2d(depths[:, 0], depths[:, 1], bins=3)[0]
    assert float(stats.chi2_contingency(table)[1]) > 1e-3  # type: ignore[arg-type]


@pytest.mark.parametrize("name", preset_names())
def test_fixed_resolution(name: str) -> None:
    space = load_space(name)
    population = uniform_population(space, np.random.default_rng(0), 50, resolution=space.resolutions[1])
    assert {p.resolution for p in space.decode(population)} == {space.resolutions[1]}


def test_same_generator_same_population(small_space: Space) -> None:
    a, b = (uniform_population(small_space, np.random.default_rng([7, 1, 2]), 64) for _ in range(2))
    assert (a == b).all()
    assert (a != uniform_population(small_space, np.random.default_rng([7, 1, 3]), 64)).any()


def test_no_paths(small_space: Space) -> None:
    assert uniform_population(small_space, np.random.default_rng(0), 0).shape == (0, 5)


def test_unknown_resolution_is_refused(small_space: Space) -> None:
    with pytest.raises(
        InputError, match=r"uniform_population: expected one of \(32, 48\) for resolution, got 64"
    ):
        uniform_population(small_space, np.random.default_rng(0), 1, resolution=64)


@pytest.mark.parametrize(
    "module", ["additive", "budget", "costs", "description", "path", "population", "space", "specs"]
)
def test_docstring_examples(module: str) -> None:
    results = doctest.testmod(importlib.import_module(f"pfnas_fast.space.{module}"))
    assert results.failed == 0
    assert results.attempted > 0
