# SPDX-License-Identifier: Apache-2.0
"""Derivatives of ops with many arguments, and calls of them that cost little.

`torch.library.register_autograd` looks up the default of every argument in every call, a tenth of a
millisecond for an op with 25; ours have no defaults. A call through the dispatcher converts all arguments
four times (dispatcher, autograd, dispatcher, implementation); where nobody can look in between, `Op` calls
the implementation itself.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pfnas_fast.ops._library import LIBRARY

__all__ = ["Op"]

_torch: Any = torch._C
_AFTER_AUTOGRAD, _BelowAutograd = _torch._after_autograd_keyset, _torch._AutoDispatchBelowAutograd
_PLAIN_TYPES = (Tensor, nn.Parameter)


def _is_plain(arguments: tuple[Any, ...]) -> bool:
    """No witness: ordinary CPU tensors, no mode, transform, tracing, autocast or profiler."""
    if (
        torch.compiler.is_compiling()
        or torch.is_autocast_enabled("cpu")
        or _torch._autograd._profiler_enabled()
        or _torch._len_torch_dispatch_stack()
        or _torch._len_torch_function_stack()
        or _torch._get_tracing_state() is not None
        or _torch._functorch.maybe_current_level() is not None
    ):
        return False
    # Negated views and zero tensors hold other numbers than their memory, which only the dispatcher knows.
    return all(
        type(a) in _PLAIN_TYPES and a.is_cpu and not (a.is_neg() or a._is_zerotensor())
        for a in arguments
        if isinstance(a, Tensor)
    )


class Op:
    """An op of this package with its derivative; calling it runs it.

    Args:
        name: Of an op whose schema has neither defaults nor keyword-only arguments nor lists of tensors.
            `name`_backward is an op as well.
        forward: CPU implementation.
        backward: CPU implementation of `name`_backward.
        arguments_of_backward: (ctx, whether each argument wants its gradient, one gradient per output) -> the
            arguments of `name`_backward, or None where all gradients are None.
        gradients: (ctx, whether each argument wants its gradient, result of `name`_backward) -> one gradient
            or None per argument.
        setup_context: (ctx, arguments, result); run after each call that takes part in autograd.

    Raises:
        ValueError: The schema has one of those.
    """

    def __init__(
        self,
        name: str,
        *,
        forward: Callable[..., Any],
        backward: Callable[..., Any],
        arguments_of_backward: Callable[..., tuple[Any, ...] | None],
        gradients: Callable[..., tuple[Tensor | None, ...]],
        setup_context: Callable[[Any, tuple[Any, ...], Any], None],
    ) -> None:
        op, op_backward = (getattr(torch.ops.pfnas_fast, n).default for n in (name, f"{name}_backward"))
        for argument in op._schema.arguments:
            if (
                argument.kwarg_only
                or argument.default_value is not None
                or "List[Tensor]" in str(argument.type)
            ):
                raise ValueError(f"Op: {name} has a default, a keyword or a list of tensors: {argument.name}")

        def run_forward(ctx: Any, keyset: Any, *arguments: Any) -> Any:
            if keyset is None:
                result = forward(*arguments)
            else:
                with _BelowAutograd():
                    result = op.redispatch(keyset & _AFTER_AUTOGRAD, *arguments)
            setup_context(ctx, arguments, result)
            return result

        def run_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
            needed = ctx.needs_input_grad[1:]
            arguments = arguments_of_backward(ctx, needed, *grads)
            if arguments is None:
                return (None,) * (1 + len(needed))
            plain = not torch.is_grad_enabled() and _is_plain(arguments)
            result = backward(*arguments) if plain else op_backward(*arguments)
            return None, *gradients(ctx, needed, result)

        methods = {"forward": staticmethod(run_forward), "backward": staticmethod(run_backward)}
        derivative: Any = type(
            f"{name}_derivative", (torch.autograd.Function,), methods
        )  # a profiler shows it

        self._forward, self._op, self._derivative = forward, op, derivative
        LIBRARY.impl(name, forward, "CPU")
        LIBRARY.impl(f"{name}_backward", backward, "CPU")
        LIBRARY.impl(name, self._differentiate, "Autograd", with_keyset=True)

    def _differentiate(self, keyset: Any, *arguments: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in arguments):
            return self._derivative.apply(keyset, *arguments)
        with _BelowAutograd():
            return self._op.redispatch(keyset & _AFTER_AUTOGRAD, *arguments)

    def __call__(self, *arguments: Any) -> Any:
        if not _is_plain(arguments):
            return self._op(*arguments)
        if torch.is_grad_enabled():
            return self._derivative.apply(None, *arguments)
        return self._forward(*arguments)
