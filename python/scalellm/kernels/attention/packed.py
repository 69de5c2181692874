"""The KV cache and the plan of a step as the CPU's kernels want them.

One layer is one run of bytes, a block after the other; crates/cpu-kernels/src/attention draws what
is in a block.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from scalellm import _core
from scalellm.kernels.attention.cache import KVGeometry, zeros

KV_TYPES = ("bfloat16", "int8")


@dataclass(frozen=True, slots=True)
class PackedLayerCache:
    """`data` uint8 [num_blocks * bytes of a block]; `code` is the layout as operators take it."""

    data: Tensor
    code: tuple[int, ...]  # type, tokens of a block, kv heads, head_dim


@dataclass(frozen=True, slots=True)
class PackedKVCache:
    """All layers' keys and values."""

    layers: tuple[PackedLayerCache, ...]
    block_size: int
    num_blocks: int

    @staticmethod
    def block_bytes(geometry: KVGeometry, block_size: int, kv_type: str) -> int:
        """Bytes of one block in all layers. Raises ValueError for what the kernels cannot do."""
        return geometry.num_layers * _core.cpu_kv_block_bytes(_code(geometry, block_size, kv_type))

    @classmethod
    def allocate(cls, geometry: KVGeometry, num_blocks: int, block_size: int, kv_type: str) -> Self:
        """Reserve zeroed memory whose pages are committed as they are first written."""
        code = _code(geometry, block_size, kv_type)
        layer_bytes = num_blocks * _core.cpu_kv_block_bytes(code)
        layers = tuple(
            PackedLayerCache(zeros((layer_bytes,), torch.uint8, torch.device("cpu")), tuple(code))
            for _ in range(geometry.num_layers)
        )
        return cls(layers, block_size, num_blocks)


def _code(geometry: KVGeometry, block_size: int, kv_type: str) -> list[int]:
    if geometry.key_dim != geometry.value_dim:
        raise ValueError("keys and values of different widths")
    return [KV_TYPES.index(kv_type), block_size, geometry.num_kv_heads, geometry.key_dim]


@dataclass(frozen=True, slots=True)
class PackedStep:
    """Which rows belong to which sequences."""

    spans: Tensor  # [spans, 4] int64: first row, start, count, where its blocks begin in `tables`
    tables: Tensor  # int32: all block tables, one after the other
