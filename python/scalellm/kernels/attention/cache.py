"""The paged KV cache's memory.

One layer's keys (values are the same with their own width) are one tensor
[num_blocks, num_kv_heads, block_size, head_dim]:

    block 0                          block 1                     ...
    +--------+--------+     +--------+--------+
    | head 0 | head 1 | ... | head 0 | head 1 |
    +--------+--------+     +--------+--------+
       |
       +-- [block_size, head_dim]: token 0, token 1, ... each head_dim numbers in a row

so that what one head attends to inside a block is one run of block_size * head_dim numbers, and a
sequence's keys of one head are gathered by whole runs. A sequence's position p lives in block
block_table[p // block_size] at row p % block_size.

Rows of a block that were not written yet are zero or belong to nobody, and are finite: `write_kv`
clears the rest of a block when a sequence begins it, so that masked rows can never carry a NaN.
"""

import mmap
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class KVGeometry:
    """What one token needs in the cache, the same in every layer."""

    num_layers: int
    num_kv_heads: int
    key_dim: int
    value_dim: int
    windows: tuple[int | None, ...]  # per layer: sliding window in tokens, None for all of the past

    def bytes_per_token(self, dtype: torch.dtype) -> int:
        numbers = self.num_layers * self.num_kv_heads * (self.key_dim + self.value_dim)
        return numbers * dtype.itemsize


@dataclass(frozen=True, slots=True)
class LayerCache:
    """One layer's share: keys [blocks, kv heads, block size, key_dim], values alike."""

    keys: Tensor
    values: Tensor


@dataclass(frozen=True, slots=True)
class KVCache:
    """All layers' keys and values."""

    layers: tuple[LayerCache, ...]
    block_size: int
    num_blocks: int

    @classmethod
    def allocate(
        cls,
        geometry: KVGeometry,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> Self:
        """Reserve zeroed memory; on a CPU the pages are committed as they are first written."""
        shape = (num_blocks, geometry.num_kv_heads, block_size)
        return cls(
            tuple(
                LayerCache(
                    zeros((*shape, geometry.key_dim), dtype, device),
                    zeros((*shape, geometry.value_dim), dtype, device),
                )
                for _ in range(geometry.num_layers)
            ),
            block_size,
            num_blocks,
        )


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros; on a CPU of pages that are committed as they are first written.

    Of small pages: a prompt's first step waits for the huge ones that its blocks are the first of,
    and reading keys and values from huge ones is no faster (docs/log.md)."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    size = prod(shape) * dtype.itemsize
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(AttributeError, OSError):  # a system without huge pages
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)
