"""Matrix product with a weight, the work that fills most of a step."""

from collections.abc import Sequence
from typing import TypeGuard

from torch import Tensor

from scalellm.kernels.linear import cpu, reference
from scalellm.kernels.linear.packed import MatrixLayout, PackedMatrix

# A weight [n, k]: as it is, or laid out and perhaps quantised for the CPU's kernels.
Matrix = Tensor | PackedMatrix

__all__ = [
    "Matrix",
    "MatrixLayout",
    "PackedMatrix",
    "all_packed",
    "linear",
    "linear_silu_and_mul",
    "logits",
]


def all_packed(weights: Sequence[Matrix]) -> TypeGuard[Sequence[PackedMatrix]]:
    """Whether the CPU's kernels are to use every one of them."""
    return all(isinstance(weight, PackedMatrix) for weight in weights)


def linear(x: Tensor, weight: Matrix, bias: Tensor | None = None) -> Tensor:
    """x W^T + b: `x` [T, k], `weight` [n, k], `bias` [n] or None; returns [T, n] of x's type."""
    if isinstance(weight, PackedMatrix):
        return cpu.linear(x, weight, bias)
    return reference.linear(x, weight, bias)


def linear_silu_and_mul(x: Tensor, weight: Matrix, bias: Tensor | None = None) -> Tensor:
    """silu(first half) * second half of x W^T + b: [T, k] to [T, n / 2] (Shazeer, 2020)."""
    if isinstance(weight, PackedMatrix):
        return cpu.linear_silu_and_mul(x, weight, bias)
    return reference.linear_silu_and_mul(x, weight, bias)


def logits(x: Tensor, weight: Matrix, bias: Tensor | None = None) -> Tensor:
    """x W^T + b in fp32: [n, k] to [n, vocab_size]."""
    if isinstance(weight, PackedMatrix):
        return cpu.logits(x, weight, bias)
    return reference.linear(x, weight, bias).float()
