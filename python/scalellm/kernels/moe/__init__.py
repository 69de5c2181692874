"""The experts of a sparse layer, each computing the tokens that were routed to it."""

from torch import Tensor

from scalellm.kernels.linear.fp8 import Fp8Matrix, Stacked
from scalellm.kernels.moe.cpu import experts
from scalellm.kernels.quantise import Activations, Fp8Rows, plain_rows, quantise_rows

__all__ = ["experts", "stacked_experts"]


def stacked_experts(
    x: Activations,
    logits: Tensor,
    gate_ups: Stacked,
    downs: Stacked,
    top: int,
    normalise: bool,
    first: int = 0,
    tally: Tensor | None = None,
    shares: int = 0,
) -> Tensor:
    """As `experts`, on a GPU: `gate_ups` [E, 2 * inner, hidden], `downs` [E, hidden, inner], of the
    E experts from `first` on, to whose output those of other ranks are to be added.

    `tally` int64 [3 + all experts]: a layer, the experts that were chosen, the choices of the
    busiest of `shares` ranks that divide the experts, or expert if 0, and those of each expert are
    added to it."""
    from scalellm.kernels.moe import triton

    dtype = x.dtype
    if not isinstance(gate_ups, Fp8Matrix):
        x = plain_rows(x)
    elif not isinstance(x, Fp8Rows):
        x = quantise_rows(x)
    return triton.experts(
        x, logits, gate_ups, downs, top, normalise, dtype, first, tally=tally, shares=shares
    )
