# SPDX-License-Identifier: Apache-2.0
"""Optimizers that leave unsampled layers alone, a learning-rate curve, and an average of the weights."""

from __future__ import annotations

import math

import torch
from torch import nn

from pfnas_fast.errors import InputError
from pfnas_fast.run.config import OPTIMIZERS

_MOMENTUM = 0.9
_RATE_WARMUP_FRACTION = 0.05
_RATE_HOLD_FRACTION = 0.5  # a cosine from the start decays before a short training has left its first plateau
_FINAL_RATE_FRACTION = 0.02


def make_optimizer(
    net: nn.Module, *, kind: str = "adamw", learning_rate: float, weight_decay: float
) -> torch.optim.Optimizer:
    """SGD with Nesterov momentum, or AdamW, in which only convolution and linear weights decay.

    BN, biases and the kernel matrices (whose rest is the identity) do not.

    A parameter whose `grad` is None is skipped, so a layer that no sampled path used does not move.

    Args:
        net: Whose parameters.
        kind: "sgd" (momentum 0.9, Nesterov) or "adamw".
        learning_rate: Of all parameters.
        weight_decay: For "sgd" added to the gradient (Once-for-All: 3e-5), for "adamw" decoupled.

    Raises:
        InputError: another `kind`.
    """
    if kind not in OPTIMIZERS:
        raise InputError(f"train: expected one of {', '.join(OPTIMIZERS)} for optimizer, got {kind!r}")
    decay, rest = [], []
    for name, parameter in net.named_parameters():
        is_weight = parameter.ndim >= 2 and "matrix" not in name
        (decay if is_weight else rest).append(parameter)
    groups = [{"params": decay, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
    if kind == "sgd":
        # Not fused: that kernel refuses a parameter whose first gradient comes after those of others.
        return torch.optim.SGD(groups, lr=learning_rate, momentum=_MOMENTUM, nesterov=True, foreach=True)
    return torch.optim.AdamW(groups, lr=learning_rate, fused=True)


def learning_rate_at(step: int, num_steps: int, peak: float) -> float:
    """Linear warm-up over 5 % of the steps, `peak` up to half of them, then a cosine down to 2 % of it."""
    warmup = max(1, round(_RATE_WARMUP_FRACTION * num_steps))
    if step < warmup:
        return peak * (step + 1) / warmup
    hold = max(warmup, round(_RATE_HOLD_FRACTION * num_steps))
    if step < hold:
        return peak
    progress = (step - hold) / max(1, num_steps - hold)
    return peak * (
        _FINAL_RATE_FRACTION + (1 - _FINAL_RATE_FRACTION) * 0.5 * (1 + math.cos(math.pi * progress))
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


class WeightAverage:
    """Exponential moving average of all parameters, with a shorter memory during the first steps.

    Buffers are not averaged: BatchNorm statistics are recalibrated for every path that is evaluated.
    """

    def __init__(self, net: nn.Module, *, decay: float) -> None:
        self.decay = decay
        self.names = [name for name, _ in net.named_parameters()]
        self.values = [parameter.detach().clone() for parameter in net.parameters()]

    @torch.no_grad()
    def update(self, net: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        now = [parameter.detach() for parameter in net.parameters()]
        torch._foreach_lerp_(self.values, now, 1 - decay)  # pyright: ignore[reportPrivateImportUsage]

    @torch.no_grad()
    def copy_to(self, net: nn.Module) -> None:
        for parameter, value in zip(net.parameters(), self.values, strict=True):
            parameter.copy_(value)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return dict(zip(self.names, self.values, strict=True))

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        for name, value in zip(self.names, self.values, strict=True):
            value.copy_(state[name])
