"""What the ranks of a replica give each other within a step that torch or Triton computes.

distributed.py does it by torch.distributed, one_shot.py what is small between GPUs of one host. The
CPU's own kernels meet in crates/cpu-kernels/src/ranks instead, where the order of sums is theirs.
"""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

__all__ = ["Exchange"]


class Exchange(Protocol):
    """One rank's side of it. All ranks call the same in the same order, and get the same bits."""

    def sum(self, x: Tensor) -> Tensor:
        """The ranks' contiguous `x` added up, which may be written to `x`."""

    def columns(self, x: Tensor, bounds: Sequence[int]) -> Tensor:
        """All columns [n, bounds[-1]], of which rank r has `x` [n, those from bounds[r] on]."""

    def least(self, number: int) -> int:
        """The least of the ranks' numbers; waits for all of them."""

    def give_up(self) -> None:
        """End whatever waits for a rank that is gone, as far as that can be. From any thread."""

    def close(self) -> None:
        """Leave the others; of no use afterwards."""
