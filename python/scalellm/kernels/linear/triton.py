"""x W^T in Triton, in bf16 or fp8, and what is done with it before it leaves registers.

    out = bias + x W^T  [, silu(gate) * up]  [, to fp8 with a scale per GROUP outputs]

A program computes a tile of rows by outputs. Where fp8 numbers have several scales along k, each
step of k is scaled as it is added: that also keeps sums in full fp32, which Hopper's fp8 products
alone do not. Numbers of rows are not what a kernel is compiled for, here and elsewhere: the next
batch would wait for the compiler.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from scalellm.kernels.linear.fp8 import Fp8Matrix
from scalellm.kernels.quantise.rows import FP8, GROUP, Fp8Rows
from scalellm.kernels.quantise.triton import fp8_scale
from scalellm.kernels.tuning import Tile, tile_for


@triton.jit
def product(
    x,
    x_scales,
    row,
    row_there,
    weight,
    weight_scales,
    output,
    output_there,
    second,
    k,
    x_stride,
    FP8: tl.constexpr,
    X_GROUPED: tl.constexpr,
    W_BLOCKED: tl.constexpr,
    GATED: tl.constexpr,
    WHOLE_K: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    K: tl.constexpr,
):
    """Rows `row` [ROWS] of x times outputs `output` [OUTPUTS] of W, and if GATED times outputs
    `output + second`: two [ROWS, OUTPUTS] fp32, the second one of no meaning otherwise."""
    steps = tl.cdiv(k, K)
    groups = tl.cdiv(k, 128)
    sums = tl.zeros([ROWS, OUTPUTS], tl.float32)
    more = tl.zeros([ROWS, OUTPUTS], tl.float32)
    for step in range(steps):
        column = step * K + tl.arange(0, K)
        a_there, b_there = row_there[:, None], output_there[:, None]
        if not WHOLE_K:
            a_there = a_there & (column < k)[None, :]
            b_there = b_there & (column < k)[None, :]
        a = tl.load(x + row[:, None] * x_stride + column[None, :], mask=a_there, other=0.0)
        place = output.to(tl.int64)[:, None] * k + column[None, :]
        b = tl.load(weight + place, mask=b_there, other=0.0)
        part = tl.dot(a, tl.trans(b), input_precision="ieee")
        scale = tl.full([ROWS], 1.0, tl.float32)
        if X_GROUPED:
            group = step * K // 128
            scale = tl.load(x_scales + row * groups + group, mask=row_there, other=0.0)
            part *= scale[:, None]
        if W_BLOCKED:
            block = (output // 128) * groups + step * K // 128
            part *= tl.load(weight_scales + block, mask=output_there, other=0.0)[None, :]
        sums += part
        if GATED:
            b = tl.load(weight + second.to(tl.int64) * k + place, mask=b_there, other=0.0)
            part = tl.dot(a, tl.trans(b), input_precision="ieee")
            if X_GROUPED:
                part *= scale[:, None]
            if W_BLOCKED:
                block = ((output + second) // 128) * groups + step * K // 128
                part *= tl.load(weight_scales + block, mask=output_there, other=0.0)[None, :]
            more += part
    if FP8:
        if not X_GROUPED:
            scale = tl.load(x_scales + row, mask=row_there, other=0.0)
            sums *= scale[:, None]
            more *= scale[:, None]
        if not W_BLOCKED:
            sums *= tl.load(weight_scales + output, mask=output_there, other=0.0)[None, :]
            if GATED:
                both = weight_scales + output + second
                more *= tl.load(both, mask=output_there, other=0.0)[None, :]
    return sums, more


@triton.jit
def silu_and_mul(gate, up):
    return gate / (1.0 + tl.exp(-gate)) * up


@triton.jit(do_not_specialize=["rows"])
def _linear(
    x,
    x_scales,
    weight,
    weight_scales,
    bias,
    out,
    out_scales,
    rows,
    n,
    k,
    x_stride,
    FP8: tl.constexpr,
    X_GROUPED: tl.constexpr,
    W_BLOCKED: tl.constexpr,
    GATED: tl.constexpr,
    BIAS: tl.constexpr,
    TO_FP8: tl.constexpr,
    WHOLE_K: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    K: tl.constexpr,
):
    row_tiles = tl.cdiv(rows, ROWS)
    program = tl.program_id(0)
    row = ((program % row_tiles) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    tile = program // row_tiles
    output = tile * OUTPUTS + tl.arange(0, OUTPUTS)
    row_there, output_there = row < rows, output < n
    sums, more = product(
        x, x_scales, row, row_there, weight, weight_scales, output, output_there, n, k, x_stride,
        FP8, X_GROUPED, W_BLOCKED, GATED, WHOLE_K, ROWS, OUTPUTS, K,
    )  # fmt: skip
    if BIAS:
        sums += tl.load(bias + output, mask=output_there, other=0.0).to(tl.float32)[None, :]
    if GATED:
        if BIAS:
            up = tl.load(bias + n + output, mask=output_there, other=0.0)
            more += up.to(tl.float32)[None, :]
        sums = silu_and_mul(sums, more)
    there = row_there[:, None] & output_there[None, :]
    place = row[:, None] * n + output[None, :]
    if TO_FP8:
        scale = fp8_scale(tl.where(output_there[None, :], sums, 0.0))
        tl.store(out_scales + row * tl.cdiv(n, OUTPUTS) + tile, scale, mask=row_there)
        sums /= scale[:, None]
    tl.store(out + place, sums.to(out.dtype.element_ty), mask=there)


def linear(
    x: Tensor | Fp8Rows,
    weight: Tensor | Fp8Matrix,
    bias: Tensor | None = None,
    *,
    out: Tensor,
    gated: bool = False,
    tile: Tile | None = None,
) -> Tensor:
    """x W^T into `out` [T, n], or [T, n / 2] if `gated`, of any float type; fp8 with fp8.

    `tile`: the one that is tuned for the shape if None.
    """
    _run(x, weight, bias, out, None, gated, tile)
    return out


def linear_silu_and_mul_fp8(
    x: Fp8Rows, weight: Fp8Matrix, bias: Tensor | None = None, tile: Tile | None = None
) -> Fp8Rows:
    """silu(gate) * up of x W^T, in fp8 with a scale for each GROUP of a row."""
    rows, n = len(x.data), weight.data.shape[0] // 2
    data = torch.empty(rows, n, dtype=FP8, device=x.data.device)
    groups = triton.cdiv(n, GROUP)
    scales = torch.empty(rows, groups, dtype=torch.float32, device=data.device)
    _run(x, weight, bias, data, scales, True, tile)
    return Fp8Rows(data, scales, x.dtype)


def _run(
    x: Tensor | Fp8Rows,
    weight: Tensor | Fp8Matrix,
    bias: Tensor | None,
    out: Tensor,
    out_scales: Tensor | None,
    gated: bool,
    tile: Tile | None,
) -> None:
    a, x_scales = (x.data, x.scales) if isinstance(x, Fp8Rows) else (x, x)
    w, w_scales = (
        (weight.data, weight.scales) if isinstance(weight, Fp8Matrix) else (weight, weight)
    )
    if a.stride(-1) != 1:
        a = a.contiguous()
    rows, k = a.shape
    n = out.shape[1]
    if not rows:
        return
    fp8 = isinstance(weight, Fp8Matrix)
    if tile is None:
        tile = tile_for("linear fp8" if fp8 else "linear bf16", rows, w.shape[0], k, a.device)
    outputs = GROUP if out_scales is not None else tile.outputs
    grouped = isinstance(x, Fp8Rows) and x.grouped
    blocked = isinstance(weight, Fp8Matrix) and weight.blocked
    step = min(tile.k, GROUP) if grouped or blocked else tile.k
    _linear[(triton.cdiv(rows, tile.rows) * triton.cdiv(n, outputs),)](
        a,
        x_scales,
        w,
        w_scales,
        a if bias is None else bias,
        out,
        out if out_scales is None else out_scales,
        rows,
        n,
        k,
        a.stride(0),
        FP8=fp8,
        X_GROUPED=grouped,
        W_BLOCKED=blocked,
        GATED=gated,
        BIAS=bias is not None,
        TO_FP8=out_scales is not None,
        WHOLE_K=k % step == 0,
        ROWS=tile.rows,
        OUTPUTS=outputs,
        K=step,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
