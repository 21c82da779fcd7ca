# SPDX-License-Identifier: Apache-2.0
"""Search for paths under budgets, and the arithmetic of fronts."""

from pfnas_fast.search.evolution import EvolutionConfig, evolve, search_candidates
from pfnas_fast.search.front import Front, FrontMember, search
from pfnas_fast.search.objectives import ObjectiveFront, non_dominated_ranks, search_objectives
from pfnas_fast.search.pareto import hypervolume, macs_saved_at_equal_ap, pareto_front

__all__ = [
    "EvolutionConfig",
    "Front",
    "FrontMember",
    "ObjectiveFront",
    "evolve",
    "hypervolume",
    "macs_saved_at_equal_ap",
    "non_dominated_ranks",
    "pareto_front",
    "search",
    "search_candidates",
    "search_objectives",
]
