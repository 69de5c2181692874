"""What every layer of a step is given beside its input."""

from dataclasses import dataclass

from torch import Tensor

from scalellm.kernels.attention import AttentionStep, KVCache, PackedKVCache, PackedStep


@dataclass(frozen=True, slots=True)
class Step:
    """T tokens of several sequences, concatenated in the batch's order."""

    positions: Tensor  # [T] int64: each token's position in its sequence
    cache: KVCache | PackedKVCache
    attention: AttentionStep | PackedStep
    logit_rows: Tensor  # [n] int64: rows of the batch whose logits are asked for
