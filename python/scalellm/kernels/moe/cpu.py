"""Experts by the kernels of crates/cpu-kernels, as a torch operator."""

from collections.abc import Sequence

import torch
from torch import Tensor

from scalellm import _core
from scalellm.kernels.linear import PackedMatrix
from scalellm.kernels.operator import define


def _experts(
    x: Tensor,
    logits: Tensor,
    gate_ups: list[Tensor],
    downs: list[Tensor],
    gate_up_layout: list[int],
    down_layout: list[int],
    top: int,
    normalise: bool,
    ranks: int,
    divides_experts: bool,
) -> Tensor:
    x, logits = x.contiguous(), logits.contiguous()
    out = torch.empty_like(x)
    _core.cpu_experts(
        (x.data_ptr(), x.shape[0]),
        logits.data_ptr(),
        [
            ((gate_up.data_ptr(), gate_up.numel()), (down.data_ptr(), down.numel()))
            for gate_up, down in zip(gate_ups, downs, strict=True)
        ],
        (gate_up_layout, down_layout),
        top,
        normalise,
        (ranks, divides_experts),
        out.data_ptr(),
    )
    return out


_OPERATOR = define(
    "experts(Tensor x, Tensor logits, Tensor[] gate_ups, Tensor[] downs, int[] gate_up_layout, "
    "int[] down_layout, int top, bool normalise, int ranks, bool divides_experts) -> Tensor",
    _experts,
)


def experts(
    x: Tensor,
    logits: Tensor,
    gate_ups: Sequence[PackedMatrix],
    downs: Sequence[PackedMatrix],
    top: int,
    normalise: bool,
    among: tuple[int, bool] = (0, False),
) -> Tensor:
    """Each token through the `top` experts that the router's `logits` [T, experts] like best.

    `x` [T, hidden] bf16; `gate_ups` [2 * inner, hidden] and `downs` [hidden, inner], one an expert,
    alike in layout. Weights are the softmax's in fp32, made to add up to one if `normalise`.
    `among`: the address of the ranks that divide the layer, 0 for none; and whether they divide the
    experts, of which these are a rank's, or each of them. Returns [T, hidden] bf16.
    """
    out: Tensor = _OPERATOR(
        x,
        logits,
        [matrix.data for matrix in gate_ups],
        [matrix.data for matrix in downs],
        gate_ups[0].layout.code,
        downs[0].layout.code,
        top,
        normalise,
        *among,
    )
    return out
