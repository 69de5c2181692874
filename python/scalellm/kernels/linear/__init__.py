"""Matrix product with a weight, the work that fills most of a step."""

from collections.abc import Sequence
from typing import TypeGuard

import torch
from torch import Tensor

from scalellm.kernels import device
from scalellm.kernels.linear import cpu, reference
from scalellm.kernels.linear.fp8 import Fp8Matrix
from scalellm.kernels.linear.packed import MatrixLayout, PackedMatrix
from scalellm.kernels.quantise import Activations, Fp8Rows, plain_rows, quantise_rows

# A weight [n, k]: as it is, in fp8, or laid out and perhaps quantised for the CPU's kernels.
Matrix = Tensor | Fp8Matrix | PackedMatrix

__all__ = [
    "Fp8Matrix",
    "Matrix",
    "MatrixLayout",
    "PackedMatrix",
    "all_packed",
    "linear",
    "linear_silu_and_mul",
    "logits",
    "logits_among",
]

# With more rows a product is bound by arithmetic: cuBLAS does it in bf16.
_TRITON_ROWS = 64


def all_packed(weights: Sequence[Matrix]) -> TypeGuard[Sequence[PackedMatrix]]:
    """Whether the CPU's kernels are to use every one of them."""
    return all(isinstance(weight, PackedMatrix) for weight in weights)


def linear(x: Activations, weight: Matrix, bias: Tensor | None = None, ranks: int = 0) -> Tensor:
    """x W^T + b: `x` [T, k], `weight` [n, k], `bias` [n] or None; returns [T, n] of x's type.

    `ranks`: the address of `_core.Ranks` whose ranks have a part of x and weight each, along k;
    all get the whole sum."""
    if ranks:
        return cpu.linear_reduced(plain_rows(x), _packed(weight), bias, ranks)
    if isinstance(weight, PackedMatrix):
        return cpu.linear(plain_rows(x), weight, bias)
    if isinstance(weight, Fp8Matrix):
        return _linear_fp8(x, weight, bias)
    x = plain_rows(x)
    if _few_rows_on_gpu(x):
        from scalellm.kernels.linear import triton

        return triton.linear(x, weight, bias, out=x.new_empty(len(x), len(weight)))
    return reference.linear(x, weight, bias)


def linear_silu_and_mul(x: Activations, weight: Matrix, bias: Tensor | None = None) -> Activations:
    """silu(first half) * second half of x W^T + b: [T, k] to [T, n / 2] (Shazeer, 2020).

    In fp8 where a GPU multiplies fp8."""
    if isinstance(weight, PackedMatrix):
        return cpu.linear_silu_and_mul(plain_rows(x), weight, bias)
    if isinstance(weight, Fp8Matrix):
        if not device.on_gpu(weight.data):
            x = plain_rows(x)
            return reference.linear_silu_and_mul(x, weight.dequantised(x.dtype), bias)
        from scalellm.kernels.linear import triton

        rows = x if isinstance(x, Fp8Rows) else quantise_rows(x)
        return triton.linear_silu_and_mul_fp8(rows, weight, bias)
    x = plain_rows(x)
    if _few_rows_on_gpu(x):
        from scalellm.kernels.linear import triton

        out = x.new_empty(len(x), len(weight) // 2)
        return triton.linear(x, weight, bias, out=out, gated=True)
    return reference.linear_silu_and_mul(x, weight, bias)


def logits(x: Activations, weight: Matrix, bias: Tensor | None = None) -> Tensor:
    """x W^T + b in fp32: [n, k] to [n, vocab_size]."""
    if isinstance(weight, PackedMatrix):
        return cpu.logits(plain_rows(x), weight, bias)
    if isinstance(weight, Fp8Matrix):
        return _linear_fp8(x, weight, bias).float()
    x = plain_rows(x)
    if _few_rows_on_gpu(x):
        from scalellm.kernels.linear import triton

        out = x.new_empty(len(x), len(weight), dtype=torch.float32)
        return triton.linear(x, weight, bias, out=out)
    return reference.linear(x, weight, bias).float()


def logits_among(
    x: Activations, weight: Matrix, bounds: Sequence[int], rank: int, ranks: int
) -> Tensor:
    """As `logits`, where the weight has the ids from `bounds[rank]` to `bounds[rank + 1]`, and the
    ranks at the address `ranks` have the others: [n, k] to [n, vocab_size]."""
    return cpu.logits_among(plain_rows(x), _packed(weight), bounds, rank, ranks)


def _packed(weight: Matrix) -> PackedMatrix:
    if isinstance(weight, PackedMatrix):
        return weight
    raise TypeError("several ranks divide packed weights alone")


def _few_rows_on_gpu(x: Tensor) -> bool:
    return device.on_gpu(x) and len(x) <= _TRITON_ROWS


def _linear_fp8(x: Activations, weight: Fp8Matrix, bias: Tensor | None) -> Tensor:
    if not device.on_gpu(weight.data):
        x = plain_rows(x)
        return reference.linear(x, weight.dequantised(x.dtype), bias)
    from scalellm.kernels.linear import triton

    rows = x if isinstance(x, Fp8Rows) else quantise_rows(x)
    out = torch.empty(len(rows.data), len(weight.data), dtype=rows.dtype, device=rows.data.device)
    return triton.linear(rows, weight, bias, out=out)
