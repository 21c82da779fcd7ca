# SPDX-License-Identifier: Apache-2.0
"""The filter's folded parts as one ranker of the compiled engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pfnas_fast.filter.kernel import KernelScorer
from pfnas_fast.filter.network import LookupScorer
from pfnas_fast.ops import KernelTables, NetworkTables, PackedRanker, RankerTables

__all__ = ["PackedFilter", "pack_filter"]

# A process's own curve of the budget is tabulated: knots 0.003 apart keep the error of linear interpolation
# below 2e-6 of its height at the shortest length scale that the prior allows in practice (0.5).
_CURVE_RANGE = (-12.0, 12.0)
_CURVE_KNOTS = 8193


@dataclass(frozen=True)
class PackedFilter:
    """A filter ready for the engine.

    Attributes:
        ranker: Networks and processes with their weights.
        curves: float32 [num_members, num_knots], the budget's own curve of each member, which `ranker` adds
            to the score but not to the members; None where the budget is no input.
    """

    ranker: PackedRanker
    curves: Tensor | None

    def member_curves(self, z: Tensor) -> Tensor:
        """The curves at some budgets: float32 [num_members, n]."""
        assert self.curves is not None
        knots = np.linspace(*_CURVE_RANGE, _CURVE_KNOTS)
        return torch.from_numpy(
            np.stack([np.interp(z.numpy(), knots, curve.numpy()) for curve in self.curves])
        ).float()


def _network_tables(networks: LookupScorer) -> tuple[NetworkTables, Tensor, Tensor, Tensor | None]:
    """(tables, linear [rows, E], its offset [E], its budget [E])."""
    members, first, _ = networks.weight_2.shape
    split = members * first
    tables = NetworkTables(
        table=networks.table[:, :split].reshape(-1, members, first),
        offset=networks.offset[:split].view(members, first),
        budget=None if networks.budget is None else networks.budget[:split].view(members, first),
        dense=((networks.weight_2, networks.bias_2.squeeze(1)),),
        head=networks.weight_3.squeeze(2),
    )
    linear_budget = None if networks.budget is None else networks.budget[split:]
    return tables, networks.table[:, split:], networks.offset[split:], linear_budget


def _kernel_tables(kernels: Sequence[KernelScorer], has_budget: bool) -> KernelTables:
    """exp(rows - s (z - c)^2), the square written out: its terms in z and z^2 are columns of their own."""
    centres = torch.stack([k.centres for k in kernels]).double()
    scale = torch.tensor([k.scales[0] for k in kernels], dtype=torch.float64).unsqueeze(1)
    offset = torch.stack([k.offset[:-1] for k in kernels]).double()
    budget = budget_square = None
    if has_budget:
        offset = offset - scale * centres**2
        budget = (2.0 * scale * centres).float()
        budget_square = (-scale).expand_as(centres).float().contiguous()
    return KernelTables(
        table=torch.stack([k.table[:, :-1] for k in kernels], dim=1),
        offset=offset.float(),
        budget=budget,
        budget_square=budget_square,
        head=torch.stack([k.alpha for k in kernels]),
    )


def _curves(kernels: Sequence[KernelScorer], num_networks: int) -> Tensor:
    z = torch.linspace(*_CURVE_RANGE, _CURVE_KNOTS, dtype=torch.float64).unsqueeze(1)
    rows = [torch.zeros(_CURVE_KNOTS, dtype=torch.float64)] * num_networks
    rows += [torch.exp(-k.scales[1] * (z - k.centres.double()) ** 2) @ k.curve.double() for k in kernels]
    return torch.stack(rows).float()


def pack_filter(
    networks: LookupScorer | None,
    kernels: Sequence[KernelScorer],
    weights: Tensor,
    *,
    num_slots: int,
    has_budget: bool,
) -> PackedFilter:
    """Join the folded parts.

    Args:
        networks: Folded ensemble, or None.
        kernels: Folded processes over the same labelled paths.
        weights: float32 [num_members], networks first.
        num_slots: Gene slots of a path.
        has_budget: Whether the budget is an input.

    Returns:
        The packed filter; it scores ``weights @ members`` up to rounding.
    """
    linear, offsets, budgets = [], [], []
    network_tables = kernel_tables = None
    num_networks = 0
    if networks is not None:
        network_tables, part, offset, budget = _network_tables(networks)
        num_networks = len(offset)
        linear.append(part)
        offsets.append(offset)
        budgets.append(torch.zeros(num_networks) if budget is None else budget)
    if kernels:
        kernel_tables = _kernel_tables(kernels, has_budget)
        linear.append(torch.stack([k.table[:, -1] for k in kernels], dim=1))
        constant = torch.zeros(len(kernels)) if has_budget else torch.stack([k.curve.sum() for k in kernels])
        offsets.append(torch.stack([k.offset[-1] for k in kernels]) + constant)
        budgets.append(torch.tensor([k.scales[2] for k in kernels]))
    table = torch.cat(linear, dim=1)
    curves = _curves(kernels, num_networks) if kernels and has_budget else None
    tables = RankerTables(
        num_slots=num_slots,
        num_codes=len(table) // num_slots,
        weights=weights,
        networks=network_tables,
        kernels=kernel_tables,
        linear=table,
        linear_offset=torch.cat(offsets),
        linear_budget=torch.cat(budgets).float() if has_budget else None,
        curve=None if curves is None else weights @ curves,
        curve_range=_CURVE_RANGE,
    )
    return PackedFilter(PackedRanker(tables), curves)
