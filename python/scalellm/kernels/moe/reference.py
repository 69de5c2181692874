"""The experts of a sparse layer in torch, one after the other."""

import torch
import torch.nn.functional as F
from torch import Tensor


def route(logits: Tensor, top: int, normalise: bool) -> tuple[Tensor, Tensor]:
    """Each token's experts [T, top] int64, best first, and their weights [T, top] fp32."""
    weights, chosen = torch.softmax(logits.float(), dim=-1).topk(top, dim=-1)
    if normalise:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights, chosen


def experts(
    x: Tensor, logits: Tensor, gate_ups: Tensor, downs: Tensor, top: int, normalise: bool
) -> Tensor:
    """`x` [T, hidden], `logits` [T, E], `gate_ups` [E, 2 * inner, hidden], `downs` [E, hidden,
    inner]; returns [T, hidden] fp32."""
    weights, chosen = route(logits, top, normalise)
    out = torch.zeros(x.shape, device=x.device)
    for token, (row, best) in enumerate(zip(x.float(), chosen.tolist(), strict=True)):
        for weight, expert in zip(weights[token], best, strict=True):
            gate, up = F.linear(row, gate_ups[expert].float()).chunk(2)
            out[token] += weight * F.linear(F.silu(gate) * up, downs[expert].float())
    return out
