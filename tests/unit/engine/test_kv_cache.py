"""Blocks, hashes and events of the paged KV cache."""

import hashlib
import struct
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    precondition,
    rule,
)

from scalellm.engine.kv_cache import KVCache, extend_hashes


def hashes_of(ids: list[int], block_size: int = 4, salt: bytes = b"") -> list[bytes]:
    hashes: list[bytes] = []
    extend_hashes(hashes, ids, block_size, salt)
    return hashes


def store_all(kv: KVCache, blocks: list[int], hashes: list[bytes]) -> None:
    for i, (block, digest) in enumerate(zip(blocks, hashes, strict=True)):
        kv.store(block, digest, hashes[i - 1] if i else b"")


def test_the_hash_is_the_protocols() -> None:
    """engine.proto: BLAKE2b-128 over parent, salt length, salt, ids as little-endian 32 bit."""
    ids = [1, 70_000, 2**31 + 5, 4, 9, 9, 9, 9, 5]
    parent = bytes(16)
    expected = []
    for block in (ids[:4], ids[4:8]):
        content = parent + b"\x03abc" + struct.pack("<4I", *block)
        parent = hashlib.blake2b(content, digest_size=16).digest()
        expected.append(parent)
    assert hashes_of(ids, salt=b"abc") == expected
    assert hashes_of([1, 2, 3, 4])[0].hex() == "9a82433579cc235d3ccd793f3de850bb"


def test_hashes_grow_with_the_sequence_and_never_cover_a_partial_block() -> None:
    hashes: list[bytes] = []
    ids: list[int] = []
    for token in range(11):
        ids.append(token)
        extend_hashes(hashes, ids, 4, b"")
        assert len(hashes) == len(ids) // 4
    assert hashes == hashes_of(ids)


def test_equal_blocks_after_different_beginnings_have_different_hashes() -> None:
    assert hashes_of([1, 2, 3, 4, 7, 7, 7, 7])[1] != hashes_of([1, 2, 3, 5, 7, 7, 7, 7])[1]
    assert hashes_of([1, 2, 3, 4]) != hashes_of([1, 2, 3, 4], salt=b"a")


def test_blocks_without_content_are_taken_before_cached_ones() -> None:
    kv = KVCache(4, 4)
    cached = kv.allocate(2)
    store_all(kv, cached, hashes_of([1] * 8))
    kv.free(cached)
    assert set(kv.allocate(2)).isdisjoint(cached)
    assert kv.match(hashes_of([1] * 8), 2) == cached


def test_the_least_recently_used_end_is_evicted_first() -> None:
    kv = KVCache(4, 4)
    old, new = hashes_of([1] * 8), hashes_of([2] * 8)
    for hashes in (old, new):
        blocks = kv.allocate(2)
        store_all(kv, blocks, hashes)
        kv.free(blocks)
    kv.allocate(1)
    assert (len(kv.match(old, 2)), len(kv.match(new, 2))) == (1, 2)
    used = kv.match(old, 2)
    kv.acquire(used)
    kv.free(used)
    kv.allocate(2)
    assert (len(kv.match(old, 2)), len(kv.match(new, 2))) == (1, 0)


def test_events_are_net_changes_in_an_order_that_replays() -> None:
    kv = KVCache(2, 4)
    first, second = hashes_of([1] * 4), hashes_of([2] * 8)
    blocks = kv.allocate(1)
    store_all(kv, blocks, first)
    assert kv.take_events() == ([(b"", first[0])], [])
    kv.free(blocks)
    blocks = kv.allocate(2)
    store_all(kv, blocks, second)
    assert kv.take_events() == ([(b"", second[0]), (second[0], second[1])], [first[0]])
    assert kv.take_events() == ([], [])
    assert kv.snapshot() == [(b"", second[0]), (second[0], second[1])]


def test_without_prefix_caching_nothing_is_found() -> None:
    kv = KVCache(2, 4, prefix_caching=False)
    store_all(kv, kv.allocate(1), hashes_of([1] * 4))
    assert kv.match(hashes_of([1] * 4), 1) == [] and kv.take_events() == ([], [])


def test_misuse_is_an_error() -> None:
    kv = KVCache(2, 4)
    with pytest.raises(ValueError, match="3 KV blocks asked for, 2 free"):
        kv.allocate(3)
    blocks = kv.allocate(1)
    kv.free(blocks)
    with pytest.raises(ValueError, match="freed more often"):
        kv.free(blocks)
    with pytest.raises(ValueError, match="at least 1"):
        KVCache(0, 4)


@pytest.mark.parametrize("damage", ["leak", "twice", "hash"])
def test_the_integrity_check_finds_damage(damage: str) -> None:
    kv = KVCache(4, 4)
    blocks = kv.allocate(2)
    store_all(kv, blocks, hashes_of([1] * 8))
    tables = [blocks]
    kv.check_integrity(tables)
    if damage == "leak":
        tables = [blocks[:1]]
    elif damage == "twice":
        kv._plain.append(blocks[0])
    else:
        kv._hash_of[blocks[0]] = None
    with pytest.raises(AssertionError):
        kv.check_integrity(tables)


class Machine(RuleBasedStateMachine):
    """Sequences come, grow, share beginnings and go; events rebuild the prefix cache."""

    sequences: Bundle[Any] = Bundle("sequences")

    @initialize(blocks=st.integers(1, 12))
    def start(self, blocks: int) -> None:
        self.kv = KVCache(blocks, 2)
        self.live: list[list[int]] = []
        self.mirror: dict[bytes, bytes] = {}

    @rule(target=sequences, ids=st.lists(st.integers(0, 2), min_size=1, max_size=12))
    def admit(self, ids: list[int]) -> list[int] | None:
        hashes = hashes_of(ids, 2)
        matched = self.kv.match(hashes, (len(ids) - 1) // 2)
        new = -(-len(ids) // 2) - len(matched)
        if new + self.kv.num_idle(matched) > self.kv.num_free:
            return None
        self.kv.acquire(matched)
        table = [*matched, *self.kv.allocate(new)]
        for i in range(len(matched), len(ids) // 2):
            self.kv.store(table[i], hashes[i], hashes[i - 1] if i else b"")
        self.live.append(table)
        return table

    @rule(table=consumes(sequences))
    def leave(self, table: list[int] | None) -> None:
        if table is not None:
            self.kv.free(table)
            self.live = [other for other in self.live if other is not table]

    @precondition(lambda self: hasattr(self, "kv"))
    @rule()
    def replay_events(self) -> None:
        stored, removed = self.kv.take_events()
        for digest in removed:
            del self.mirror[digest]
        for parent, digest in stored:
            assert digest not in self.mirror
            self.mirror[digest] = parent
        assert self.mirror == {digest: parent for parent, digest in self.kv.snapshot()}

    @invariant()
    def everything_is_accounted_for(self) -> None:
        if hasattr(self, "kv"):
            self.kv.check_integrity(self.live)


TestKVCacheUnderRandomUse = Machine.TestCase
TestKVCacheUnderRandomUse.settings = settings(max_examples=60, deadline=None)
