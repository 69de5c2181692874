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


# ------------------------------------------------------------ what torch and GPUs divide


def joined(parts, spec):
    """Ranks' parts of a matrix as one again: rows of each of its layers, or columns."""
    if spec.use is Use.ROUTER:
        return parts[0]
    if spec.use is Use.ROW:
        return torch.cat(parts, dim=1)
    widths = [[len(rows) for rows in spec.rows_of(Shard(r, len(parts)))] for r in range(len(parts))]
    pieces = [part.split(width) for part, width in zip(parts, widths, strict=True)]
    return torch.cat([rank[layer] for layer in range(len(widths[0])) for rank in pieces])


@pytest.mark.parametrize("ranks", [1, 2])  # with more, some would have the same key-value head
def test_parts_of_plain_matrices_make_the_whole(ranks):
    whole = DummySource(0, torch.float32, CPU)
    sources = [DummySource(0, torch.float32, CPU, Shard(rank, ranks)) for rank in range(ranks)]
    for spec in SPECS:
        found = joined([source.matrix(spec) for source in sources], spec)
        assert torch.equal(found, whole.matrix(spec))
    tables = [source.table("t.weight", 300, 8) for source in sources]
    assert torch.equal(torch.cat(tables), whole.table("t.weight", 300, 8))


def test_an_undivided_matrix_is_whole_on_every_rank():
    spec = MatrixSpec((("gate", 8), ("up", 8)), 16, Use.GATED, divided=False)
    found = DummySource(0, torch.float32, CPU, Shard(1, 2, expert_parallel=True)).matrix(spec)
    assert torch.equal(found, DummySource(0, torch.float32, CPU).matrix(spec))


def test_two_ranks_have_the_same_key_value_head():
    spec = MatrixSpec((("q", 64), ("k", 16)), 8, Use.COLUMN, (4, 1))
    whole = DummySource(0, torch.float32, CPU).matrix(spec)
    for rank in range(4):
        found = DummySource(0, torch.float32, CPU, Shard(rank, 4)).matrix(spec)
        rows = [*range(rank * 16, rank * 16 + 16), *range(64, 80)]
        assert torch.equal(found, whole[rows])
