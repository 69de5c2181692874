"""The KV cache's memory on a CPU: zero, and committed as it is written and no earlier."""

from pathlib import Path

import torch
from torch import Tensor

from scalellm.kernels.attention.cache import KVGeometry, zeros
from scalellm.kernels.attention.packed import PackedKVCache

MIB = 1 << 20


def resident_bytes(tensor: Tensor) -> int:
    """Of the mapping that holds its first byte."""
    address, found = tensor.data_ptr(), False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head = line.split()[0]
        if not head.endswith(":"):
            first, end = (int(part, 16) for part in head.split("-"))
            found = first <= address < end
        elif found and head == "Rss:":
            return int(line.split()[1]) << 10
    raise AssertionError(f"no mapping at {address:#x}")


def test_pages_are_committed_as_they_are_written() -> None:
    memory = zeros((64, MIB), torch.uint8, torch.device("cpu"))
    assert resident_bytes(memory) == 0
    memory[8, :4097] = 1
    assert 0 < resident_bytes(memory) <= 4 * 4096
    assert memory[8].sum() == 4097 and not memory[9].any()


def test_layers_begin_where_kernels_want_them() -> None:
    geometry = KVGeometry(3, 2, 64, 64, (None,) * 3)
    cache = PackedKVCache.allocate(geometry, 5, 16, "bfloat16")
    assert [layer.data.numel() for layer in cache.layers] == [5 * 2 * 16 * 64 * 2 * 2] * 3
    assert all(layer.data.data_ptr() % 64 == 0 for layer in cache.layers)
