"""Ranks that exchange by torch.distributed: NCCL between GPUs, gloo between processes of CPUs.

NCCL's operations are recorded into CUDA graphs with the step that they belong to.
"""

import contextlib
from collections.abc import Sequence
from datetime import timedelta
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import TCPStore

from scalellm.kernels.exchange.one_shot import OneShot

_LIMIT = timedelta(seconds=300)  # for ranks that are there to join, and for any exchange
LOOPBACK = "127.0.0.1"


def open_meeting(ranks: int, host: str = LOOPBACK) -> TCPStore:
    """Where ranks find each other: rank 0's; the others go to its `port` of `host`."""
    return TCPStore(host, 0, ranks, is_master=True, timeout=_LIMIT, wait_for_workers=False)


def find_meeting(port: int, ranks: int, host: str = LOOPBACK) -> TCPStore:
    return TCPStore(host, port, ranks, is_master=False, timeout=_LIMIT)


class TorchExchange:
    """An Exchange of tensors on `device`."""

    def __init__(
        self,
        store: TCPStore,
        rank: int,
        ranks: int,
        device: torch.device,
        dtype: torch.dtype,
        own_host: str = LOOPBACK,
        hosts: int = 1,
    ) -> None:
        """Wait for the other ranks, on `hosts`. `dtype`: what most sums are of; `own_host`: the
        address of this host that those of other hosts reach. Raises RuntimeError."""
        self._ranks, self._device = ranks, device
        self._one_shot: OneShot | None = None
        self._group: Any  # torch's stubs lack what backends take
        if device.type == "cuda":
            # Symmetric memory knows groups by their names, so this one has to be torch's own.
            dist.init_process_group(
                "nccl", store=store, rank=rank, world_size=ranks, timeout=_LIMIT, device_id=device
            )
            self._group = _world()
            one_shot = OneShot.make(self._group, device, dtype) if hosts == 1 else None
            if self.least(one_shot is not None):
                self._one_shot = one_shot
        else:
            gloo: Any = dist.ProcessGroupGloo
            options = gloo._Options()
            options._devices = [gloo.create_device(hostname=own_host)]
            options._timeout = _LIMIT
            self._group = gloo(store, rank, ranks, options)

    def sum(self, x: Tensor) -> Tensor:
        if self._one_shot is not None and self._one_shot.takes(x):
            return self._one_shot.sum(x)
        self._group.allreduce([x]).wait()
        return x

    def columns(self, x: Tensor, bounds: Sequence[int]) -> Tensor:
        widths = [end - first for first, end in pairwise(bounds)]
        mine = x.new_zeros(len(x), max(widths))
        mine[:, : x.shape[1]] = x
        parts = x.new_empty(self._ranks * len(x), mine.shape[1])
        self._group._allgather_base(parts, mine).wait()
        each = zip(parts.split(len(x)), widths, strict=True)
        return torch.cat([part[:, :width] for part, width in each], dim=1)

    def least(self, number: int) -> int:
        found = torch.tensor([number], device=self._device)
        options = dist.AllreduceOptions()
        options.reduceOp = dist.ReduceOp.MIN
        self._group.allreduce([found], options).wait()
        return int(found.item())

    def give_up(self) -> None:
        if self._device.type == "cuda":
            with contextlib.suppress(RuntimeError):
                self._group.abort()

    def close(self) -> None:
        if self._device.type == "cuda":
            dist.destroy_process_group()


def _world() -> dist.ProcessGroup:
    group = dist.group.WORLD
    if group is None:
        raise RuntimeError("torch.distributed has no group of all ranks")
    return group
