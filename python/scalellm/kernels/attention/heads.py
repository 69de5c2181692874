"""What one layer's attention is, beside its input."""

import math
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class HeadNorm:
    """RMSNorm of each head of queries and keys before they are turned."""

    query_weight: Tensor  # [head_dim]
    key_weight: Tensor  # [head_dim]
    eps: float


@dataclass(frozen=True, slots=True)
class Heads:
    """The heads of a projected row: [query heads | key heads | value heads] * head_dim numbers."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    window: int | None  # a query sees itself and the window - 1 positions before it
    norm: HeadNorm | None

    @property
    def scale(self) -> float:
        return 1.0 / math.sqrt(self.head_dim)
