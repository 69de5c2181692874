"""Small sums between the GPUs of a host in one kernel: each reads all parts over NVLink.

    rank 0   its part into memory that all map | wait for all | add all up | wait for all
    rank 1   likewise                          |              |            |

Every rank reads (ranks - 1) parts, where a ring would take 2 (ranks - 1) rounds; for the few
kilobytes of a decode step the rounds are what takes time. torch's kernel adds in the order of
ranks, so all get the same bits.
"""

import contextlib
import math
from typing import Self

import torch
import torch.distributed as dist
from torch import Tensor

MOST_BYTES = 512 << 10  # above, NCCL's ring moves less in all
_ALIGNED_BYTES = 16


class OneShot:
    """`make` it on all ranks, or on none."""

    def __init__(self, buffer: Tensor, group: str) -> None:
        """`buffer`: of `MOST_BYTES`, which the ranks of `group` map."""
        self._buffer, self._group = buffer, group

    @classmethod
    def make(
        cls, group: dist.ProcessGroup, device: torch.device, dtype: torch.dtype
    ) -> Self | None:
        """None where the GPUs cannot map each other's memory. Waits for the other ranks."""
        with contextlib.suppress(RuntimeError, ImportError):
            from torch.distributed import _symmetric_memory as symmetric

            count = MOST_BYTES // dtype.itemsize
            buffer = symmetric.empty(count, dtype=dtype, device=device)
            symmetric.rendezvous(buffer, group)
            return cls(buffer, group.group_name)
        return None

    def takes(self, x: Tensor) -> bool:
        return (
            x.dtype == self._buffer.dtype
            and 0 < x.nbytes <= self._buffer.nbytes
            and x.nbytes % _ALIGNED_BYTES == 0
        )

    def sum(self, x: Tensor) -> Tensor:
        """The ranks' contiguous `x`, added up in a new tensor."""
        part = self._buffer[: math.prod(x.shape)]
        part.copy_(x.view(-1))
        total: Tensor = torch.ops.symm_mem.one_shot_all_reduce(part, "sum", self._group)
        return total.view(x.shape)
