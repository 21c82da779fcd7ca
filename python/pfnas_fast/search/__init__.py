# SPDX-License-Identifier: Apache-2.0
"""Search for paths under budgets, and the arithmetic of fronts."""

from pfnas_fast.search.evolution import EvolutionConfig, evolve, search_candidates
from pfnas_fast.search.front import Front, FrontMember, search
from pfnas_fast.search.pareto import hypervolume, macs_saved_at_equal_ap, pareto_front

__all__ = [
    "EvolutionConfig",
    "Front",
    "FrontMember",
    "evolve",
    "hypervolume",
    "macs_saved_at_equal_ap",
    "pareto_front",
    "search",
    "search_candidates",
]
