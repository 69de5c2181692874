"""Parts of layers: every number is somebody's, and the same from a file as from memory."""

from contextlib import nullcontext
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from scalellm.layers.shard import GROUPS, Shard
from scalellm.layers.weights import MatrixSpec, Use
from scalellm.loader.packed_cache import PackedCache
from scalellm.loader.packing import Packing, PackingSource
from scalellm.loader.sharding import SIZES, ShardSource
from scalellm.loader.sources import DummySource, InventorySource

BF16, CPU = torch.bfloat16, torch.device("cpu")
K = 512
SPECS = (
    MatrixSpec((("q", 256), ("k", 64), ("v", 64)), K, Use.COLUMN, (8, 2, 2)),
    MatrixSpec((("gate", 256), ("up", 256)), K, Use.GATED),
    MatrixSpec((("narrow gate", 72), ("narrow up", 72)), K, Use.GATED),
    MatrixSpec((("down", 96),), K, Use.ROW),
    MatrixSpec((("router", 8),), K, Use.ROUTER),
    MatrixSpec((("head", 300),), K, Use.OUTPUT),
)


@given(vocab_size=st.integers(256, 200_000), ranks=st.sampled_from(SIZES))
def test_every_id_is_one_ranks(vocab_size, ranks):
    bounds = Shard(ranks=ranks).id_bounds(vocab_size)
    assert (len(bounds), bounds[0], bounds[-1]) == (ranks + 1, 0, vocab_size)
    assert all(first < end and first % 32 == 0 for first, end in pairwise(bounds))


@pytest.mark.parametrize("ranks", SIZES)
def test_key_value_heads_are_those_of_the_ranks_queries(ranks):
    for heads, kv_heads in ((8, 8), (8, 2), (16, 4), (8, 1)):
        for rank in range(ranks):
            shard = Shard(rank, ranks)
            queries, keys = shard.heads(heads), shard.heads(kv_heads)
            assert {query * kv_heads // heads for query in queries} == set(keys)


@pytest.mark.parametrize("quantization", ["none", "int8", "int4"])
@pytest.mark.parametrize("ranks", SIZES[1:])
def test_parts_of_a_file_are_those_of_weights_in_memory(tmp_path, quantization, ranks):
    packing = Packing(quantization)
    inventory = InventorySource(BF16, packing)
    for spec in SPECS:
        inventory.matrix(spec)
    source = PackingSource(DummySource(0, BF16, CPU), packing)
    cache = PackedCache(tmp_path, 1 << 30)
    mapped, _, _ = cache.weights("m", [1], inventory.plan, BF16, lambda: nullcontext(source))
    for rank in range(ranks):
        shard = Shard(rank, ranks)
        from_file = ShardSource(mapped, shard, keep_views=True)
        in_memory = ShardSource(source, shard, keep_views=False)
        for spec in SPECS:
            found, expected = from_file.matrix(spec), in_memory.matrix(spec)
            assert found.layout == expected.layout
            assert torch.equal(found.data, expected.data)
            assert found.data.data_ptr() % 64 == 0
            assert found.layout.groups == (GROUPS // ranks if spec.use is Use.ROW else 1)


def test_a_file_that_was_checked_by_another_process_is_not_read_again(tmp_path):
    packing = Packing("int8")
    inventory = InventorySource(BF16, packing)
    inventory.matrix(SPECS[0])
    source = PackingSource(DummySource(0, BF16, CPU), packing)
    cache = PackedCache(tmp_path, 1 << 30)

    def weights(checked):
        return cache.weights(
            "m", [1], inventory.plan, BF16, lambda: nullcontext(source), checked=checked
        )

    _, path, _ = weights(checked=False)
    with path.open("r+b") as file:
        file.seek(5000)
        byte = file.read(1)[0]
        file.seek(5000)
        file.write(bytes([byte ^ 1]))
    assert not weights(checked=True)[2], "taken as it is"
    assert weights(checked=False)[2], "found damaged, and written anew"
