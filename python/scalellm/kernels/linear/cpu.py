"""Matrix products by the kernels of crates/cpu-kernels, as torch operators on bf16 activations.

An operator's `layout` is MatrixLayout.code.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from scalellm import _core
from scalellm.kernels.linear.packed import MatrixLayout, PackedMatrix, aligned_bytes
from scalellm.kernels.operator import define


def _run(mode: int, x: Tensor, weight: Tensor, layout: list[int], bias: Tensor | None) -> Tensor:
    x = x if x.stride(-1) == 1 else x.contiguous()
    n = layout[2] // 2 if mode == 1 else layout[2]
    out = x.new_empty(x.shape[0], n, dtype=torch.float32 if mode == 2 else torch.bfloat16)
    _core.cpu_linear(
        layout,
        mode,
        (x.data_ptr(), x.shape[0], x.stride(0)),
        (weight.data_ptr(), weight.numel()),
        0 if bias is None else bias.data_ptr(),
        out.data_ptr(),
    )
    return out


def _linear(x: Tensor, weight: Tensor, layout: list[int], bias: Tensor | None) -> Tensor:
    return _run(0, x, weight, layout, bias)


def _linear_silu_and_mul(
    x: Tensor, weight: Tensor, layout: list[int], bias: Tensor | None
) -> Tensor:
    return _run(1, x, weight, layout, bias)


def _logits(x: Tensor, weight: Tensor, layout: list[int], bias: Tensor | None) -> Tensor:
    return _run(2, x, weight, layout, bias)


def _linear_reduced(
    x: Tensor, weight: Tensor, layout: list[int], bias: Tensor | None, ranks: int
) -> Tensor:
    x = x if x.stride(-1) == 1 else x.contiguous()
    out = x.new_empty(x.shape[0], layout[2])
    _core.cpu_linear_reduced(
        layout,
        (x.data_ptr(), x.shape[0], x.stride(0)),
        (weight.data_ptr(), weight.numel()),
        0 if bias is None else bias.data_ptr(),
        ranks,
        out.data_ptr(),
    )
    return out


def _logits_among(
    x: Tensor, weight: Tensor, layout: list[int], bounds: list[int], _rank: int, ranks: int
) -> Tensor:
    x = x.contiguous()
    out = x.new_empty(x.shape[0], bounds[-1], dtype=torch.float32)
    _core.cpu_logits_among(
        layout,
        (x.data_ptr(), x.shape[0], x.stride(0)),
        (weight.data_ptr(), weight.numel()),
        bounds,
        ranks,
        out.data_ptr(),
    )
    return out


_SCHEMA = "(Tensor x, Tensor weight, int[] layout, Tensor? bias) -> Tensor"
_linear_op = define(f"linear{_SCHEMA}", _linear)
_silu_and_mul_op = define(f"linear_silu_and_mul{_SCHEMA}", _linear_silu_and_mul)
_logits_op = define(f"logits{_SCHEMA}", _logits)
_reduced_op = define(
    "linear_reduced(Tensor x, Tensor weight, int[] layout, Tensor? bias, int ranks) -> Tensor",
    _linear_reduced,
)
_logits_among_op = define(
    "logits_among(Tensor x, Tensor weight, int[] layout, int[] bounds, int rank, int ranks) -> "
    "Tensor",
    _logits_among,
)


def linear(x: Tensor, weight: PackedMatrix, bias: Tensor | None) -> Tensor:
    """[T, k] -> [T, n] bf16."""
    out: Tensor = _linear_op(x, weight.data, weight.layout.code, bias)
    return out


def linear_silu_and_mul(x: Tensor, weight: PackedMatrix, bias: Tensor | None) -> Tensor:
    """[T, k] -> [T, n / 2] bf16; the layout is gated."""
    out: Tensor = _silu_and_mul_op(x, weight.data, weight.layout.code, bias)
    return out


def logits(x: Tensor, weight: PackedMatrix, bias: Tensor | None) -> Tensor:
    """[n, k] -> [n, vocab_size] fp32."""
    out: Tensor = _logits_op(x, weight.data, weight.layout.code, bias)
    return out


def linear_reduced(x: Tensor, weight: PackedMatrix, bias: Tensor | None, ranks: int) -> Tensor:
    """[T, k] -> [T, n] bf16, a rank's groups along k each."""
    out: Tensor = _reduced_op(x, weight.data, weight.layout.code, bias, ranks)
    return out


def logits_among(
    x: Tensor, weight: PackedMatrix, bounds: Sequence[int], rank: int, ranks: int
) -> Tensor:
    """[n, k] -> [n, vocab_size] fp32, a rank's ids each."""
    out: Tensor = _logits_among_op(x, weight.data, weight.layout.code, list(bounds), rank, ranks)
    return out


def pack(weight: Tensor, layout: MatrixLayout) -> PackedMatrix:
    """Lay `weight` [n, k] bf16 out, quantising it where the format asks for it."""
    data = aligned_bytes(layout.num_bytes)
    weight = weight.contiguous()
    if weight.dtype != torch.bfloat16 or tuple(weight.shape) != (layout.n, layout.k):
        raise ValueError(
            f"{weight.dtype} {list(weight.shape)} is not bf16 [{layout.n}, {layout.k}]"
        )
    _core.cpu_matrix_pack(layout.code, weight.data_ptr(), data.data_ptr(), data.numel())
    return PackedMatrix(layout, data)


def pack_int4(numbers: Tensor, scales: Tensor, zeros: Tensor, layout: MatrixLayout) -> PackedMatrix:
    """Lay (numbers - zeros) * scales out as they are: `numbers` uint8 [n, k], of 0 to 15; `scales`
    float32, of 20 bits of precision, and `zeros` uint8, of 0 to 15, for each of a channel's scale
    groups: [n, k / layout.scale_group], rounded up."""
    groups = -(-layout.k // layout.scale_group)
    found = [(part.dtype, tuple(part.shape)) for part in (numbers, scales, zeros)]
    of_groups = (layout.n, groups)
    wanted = [
        (torch.uint8, (layout.n, layout.k)),
        (torch.float32, of_groups),
        (torch.uint8, of_groups),
    ]
    if found != wanted:
        raise ValueError(f"{found} are not {layout}")
    numbers, scales, zeros = numbers.contiguous(), scales.contiguous(), zeros.contiguous()
    data = aligned_bytes(layout.num_bytes)
    places = (numbers.data_ptr(), scales.data_ptr(), zeros.data_ptr())
    _core.cpu_matrix_pack_int4(layout.code, places, groups, (data.data_ptr(), data.numel()))
    return PackedMatrix(layout, data)


def pack_int8(weight: Tensor, scales: Tensor, layout: MatrixLayout) -> PackedMatrix:
    """Lay `weight` [n, k] int8, from -127 on, with `scales` [n] float32 out as they are.

    The bytes are those of `pack` for the numbers they stand for, where these are bf16 and the
    largest of each channel is 127 of its scale. crates/cpu-kernels/src/linear/layout.rs draws them.
    """
    if layout.format != "int8" or tuple(weight.shape) != (layout.n, layout.k):
        raise ValueError(f"int8 {list(weight.shape)} is not {layout}")
    channels = 32
    lanes = torch.arange(channels)
    if layout.gated:  # a panel has 16 of the gate, then the 16 of the up projection
        half, run = layout.n // 2, channels // 2
        first = torch.arange(0, half, run).unsqueeze(1) + lanes % run
        rows, there = first + lanes // run * half, first < half
    else:
        rows = torch.arange(0, layout.n, channels).unsqueeze(1) + lanes
        there = rows < layout.n
    rows = rows.where(there, 0)
    group_k = layout.k // layout.groups
    steps = -(-group_k // 4)
    values = torch.zeros(len(rows), channels, layout.groups, 4 * steps, dtype=torch.int8)
    values[..., :group_k] = weight[rows].unflatten(-1, (layout.groups, group_k))
    values[~there] = 0
    values = values.unflatten(-1, (steps, 4)).permute(2, 0, 3, 1, 4)  # [groups, panels, steps, ..]
    of_lanes = scales[rows].where(there, 0.0).contiguous().view(torch.uint8)
    blocks = torch.cat(
        (
            of_lanes.expand(layout.groups, -1, -1),
            (values.contiguous().view(torch.uint8) ^ 0x80).flatten(2),
        ),
        dim=-1,
    )
    data = aligned_bytes(layout.num_bytes)
    data.copy_(blocks.flatten())
    return PackedMatrix(layout, data)
