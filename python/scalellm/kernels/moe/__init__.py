"""The experts of a sparse layer, each computing the tokens that were routed to it."""

from torch import Tensor

from scalellm.kernels.linear.fp8 import Fp8Matrix, Stacked
from scalellm.kernels.moe.cpu import experts
from scalellm.kernels.quantise import Activations, Fp8Rows, plain_rows, quantise_rows

__all__ = ["experts", "stacked_experts"]


def stacked_experts(
    x: Activations, logits: Tensor, gate_ups: Stacked, downs: Stacked, top: int, normalise: bool
) -> Tensor:
    """As `experts`, on a GPU: `gate_ups` [E, 2 * inner, hidden], `downs` [E, hidden, inner]."""
    from scalellm.kernels.moe import triton

    dtype = x.dtype
    if not isinstance(gate_ups, Fp8Matrix):
        x = plain_rows(x)
    elif not isinstance(x, Fp8Rows):
        x = quantise_rows(x)
    return triton.experts(x, logits, gate_ups, downs, top, normalise, dtype)
