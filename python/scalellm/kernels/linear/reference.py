"""x W^T + b in torch; on a CPU oneDNN does it, in bf16 with fp32 accumulators."""

import torch.nn.functional as F
from torch import Tensor


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x` [T, k], `weight` [n, k], `bias` [n] or None, all of one type; returns [T, n]."""
    return F.linear(x, weight, bias)


def linear_silu_and_mul(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`weight` [2n, k]: gate rows, then up rows; returns [T, n]."""
    gate, up = F.linear(x, weight, bias).chunk(2, dim=-1)
    return F.silu(gate) * up
