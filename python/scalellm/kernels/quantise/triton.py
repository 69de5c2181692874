"""Rows to fp8 in Triton."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from scalellm.kernels.quantise.rows import FP8, Fp8Rows


@triton.jit
def fp8_scale(x):
    """The scale of each row of `x` [rows, n] or of the one row [n], fp32."""
    return tl.maximum(tl.max(tl.abs(x), -1) / 448.0, 1e-12)


@triton.jit
def _quantise_rows(x, out, scales, k, stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < k
    wide = tl.load(x + row * stride + columns, mask=inside, other=0.0).to(tl.float32)
    scale = fp8_scale(wide)
    tl.store(out + row * k + columns, (wide / scale).to(tl.float8e4nv), mask=inside)
    tl.store(scales + row, scale)


def quantise_rows(x: Tensor) -> Fp8Rows:
    """As of reference.py."""
    if x.stride(-1) != 1:
        x = x.contiguous()
    rows, k = x.shape
    out = torch.empty(rows, k, dtype=FP8, device=x.device)
    scales = torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    if rows:
        block = triton.next_power_of_2(k)
        warps = warps_of_row(block)
        _quantise_rows[(rows,)](x, out, scales, k, x.stride(0), BLOCK=block, num_warps=warps)
    return Fp8Rows(out, scales, x.dtype)


def warps_of_row(block: int) -> int:
    """Warps for a program that holds one row of `block` numbers in registers."""
    return min(16, max(1, block // 512))
