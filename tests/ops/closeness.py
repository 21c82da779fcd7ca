# SPDX-License-Identifier: Apache-2.0
"""How close a float32 kernel must come to its float64 reference."""

import torch
from torch import Tensor

EPS = float(torch.finfo(torch.float32).eps)


def tolerance(reduction_length: int) -> float:
    """Allowed error, relative to the largest value: rounding of a sum of `reduction_length` random terms."""
    return 4 * EPS * (1 + reduction_length**0.5 / 4)


def assert_close_to_reference(
    actual: Tensor, expected: Tensor, reduction_length: int, what: str = ""
) -> None:
    """Bound the elementwise error, the direction (cosine) and the systematic bias (signed mean).

    Args:
        actual: float32 result of the kernel.
        expected: float64 result of the reference, same shape.
        reduction_length: Number of products that are summed into one element.
        what: Name of the tensor, for the message.
    """
    assert actual.dtype == torch.float32
    assert actual.shape == expected.shape, what
    if expected.numel() == 0:
        return
    actual, expected = actual.detach(), expected.detach()
    error = actual.double() - expected
    scale = float(expected.abs().max())
    allowed = tolerance(reduction_length)
    if scale == 0:
        assert float(error.abs().max()) == 0, what
        return
    assert float(error.abs().max()) <= allowed * scale, (
        f"{what}: error {float(error.abs().max()) / scale:.2e}"
    )
    # An elementwise bound lets every element be off in the same direction; random rounding averages out.
    bias_allowed = 4 * allowed / expected.numel() ** 0.5 + EPS / 4
    assert abs(float(error.mean())) <= bias_allowed * scale, f"{what}: bias {float(error.mean()) / scale:.2e}"
    cosine = torch.nn.functional.cosine_similarity(actual.double().flatten(), expected.flatten(), dim=0)
    assert 1 - float(cosine) <= allowed**2 + 1e-13, f"{what}: cosine off by {1 - float(cosine):.2e}"
