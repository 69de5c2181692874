"""What every layer of a step is given beside its input."""

from dataclasses import dataclass

from torch import Tensor

from scalellm.kernels.attention import (
    AttentionStep,
    KVCache,
    PackedKVCache,
    PackedStep,
    PagedStep,
)


@dataclass(frozen=True, slots=True)
class Step:
    """T tokens of several sequences, concatenated in the batch's order."""

    positions: Tensor  # [T] int64, on a GPU int32: each token's position in its sequence
    cache: KVCache | PackedKVCache
    attention: AttentionStep | PackedStep | PagedStep
    logit_rows: Tensor  # [n] alike: rows of the batch whose logits are asked for
    # int64 [3 + experts], to which sparse layers add: layers, experts that were chosen, choices of
    # the busiest part, choices of each expert. The CPU's kernels count for themselves.
    tally: Tensor | None = None


def chosen(x: Tensor, rows: Tensor | None) -> Tensor:
    """[T, n] -> [len(rows), n]; None are all of them."""
    return x if rows is None else x.index_select(0, rows)
