"""Where layers get their weights from.

A layer asks for its tensors by their checkpoint name while it is made. What answers decides what
happens: the loader's checkpoint copies from files, its dummy draws random numbers, and its
inventory only takes notes, on torch's meta device, to know a model's tensors and size before memory
is spent.
"""

from typing import Protocol

import torch
from torch import Tensor


class WeightSource(Protocol):
    """Gives tensors of one dtype on one device."""

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device: ...

    def fill(self, out: Tensor, name: str) -> None:
        """Write the tensor `name`, of exactly out's shape, into `out`."""


def take(source: WeightSource, name: str, *shape: int) -> Tensor:
    """The tensor `name` in memory of its own."""
    out = torch.empty(shape, dtype=source.dtype, device=source.device)
    source.fill(out, name)
    return out
