"""RMSNorm in Triton: one program a row, which stays in registers from its first read on."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from scalellm.kernels.quantise.rows import FP8, Activations, Fp8Rows
from scalellm.kernels.quantise.triton import fp8_scale, warps_of_row


@triton.jit
def _rms_norm(
    x,
    delta,
    weight,
    total,
    out,
    quantised,
    scales,
    d,
    stride,
    delta_stride,
    eps,
    ADD: tl.constexpr,
    QUANTISE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < d
    wide = tl.load(x + row * stride + columns, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        more = tl.load(delta + row * delta_stride + columns, mask=inside, other=0.0)
        kept = (wide + more.to(tl.float32)).to(total.dtype.element_ty)
        tl.store(total + row * d + columns, kept, mask=inside)
        wide = kept.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide) / d + eps)
    learned = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    normal = wide * scale * learned
    tl.store(out + row * d + columns, normal.to(out.dtype.element_ty), mask=inside)
    if QUANTISE:
        fp8 = fp8_scale(normal)
        tl.store(quantised + row * d + columns, (normal / fp8).to(tl.float8e4nv), mask=inside)
        tl.store(scales + row, fp8)


def rms_norm(x: Tensor, weight: Tensor, eps: float, fp8: bool = False) -> Activations:
    """`x` [..., d] -> a new [..., d], rounded once, at the end; if `fp8` with a scale a row too."""
    rows = x.reshape(-1, x.shape[-1])
    _, out, quantised = _run(rows, None, weight, eps, fp8)
    return out.view(x.shape) if quantised is None else quantised


def add_rms_norm(
    x: Tensor, delta: Tensor, weight: Tensor, eps: float, fp8: bool = False
) -> tuple[Tensor, Activations]:
    """x + delta [T, d], and its norm."""
    total, out, quantised = _run(x, delta, weight, eps, fp8)
    return total, out if quantised is None else quantised


def _run(
    x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, quantise: bool
) -> tuple[Tensor, Tensor, Fp8Rows | None]:
    rows, d = x.shape
    out = x.new_empty(rows, d)
    total = x if delta is None else x.new_empty(rows, d)
    fp8: Fp8Rows | None = None
    if quantise:
        fp8 = Fp8Rows(
            torch.empty(rows, d, dtype=FP8, device=x.device),
            torch.empty(rows, 1, dtype=torch.float32, device=x.device),
            x.dtype,
            out,
        )
    if rows:
        block = triton.next_power_of_2(d)
        _rms_norm[(rows,)](
            x,
            x if delta is None else delta,
            weight,
            total,
            out,
            out if fp8 is None else fp8.data,
            out if fp8 is None else fp8.scales,
            d,
            x.stride(0),
            0 if delta is None else delta.stride(0),
            eps,
            ADD=delta is not None,
            QUANTISE=quantise,
            BLOCK=block,
            num_warps=warps_of_row(block),
        )
    return total, out, fp8
