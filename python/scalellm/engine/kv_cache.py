"""Paged KV cache: which block holds what. No tensors, block numbers only.

Each block is in exactly one place:

    free, unknown      never written, or its content is not worth finding   `_plain` (a stack)
    free, cached       content can be found by hash until it is evicted     `_cached_free` (LRU)
    used               reference count >= 1, cached or not

A block enters the prefix cache when it is full and computed, so a partial block is never found.
Its hash chains over everything before it, so equal hashes mean equal beginnings.
"""

import hashlib
import sys
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet

HASH_BYTES = 16
_NO_PARENT = bytes(HASH_BYTES)


def extend_hashes(
    hashes: list[bytes], token_ids: Sequence[int], block_size: int, salt: bytes
) -> None:
    """Append the hashes of full blocks that `hashes` lacks.

    BLAKE2b-128 over parent hash (16 zero bytes for the first), one length byte of the salt, the
    salt, and the block's ids as little-endian 32 bit: engine.proto's KvEvents.
    """
    first = len(hashes)
    full = len(token_ids) // block_size
    if first >= full:
        return
    ids = array("I", token_ids[first * block_size : full * block_size])
    if sys.byteorder == "big":
        ids.byteswap()
    content = memoryview(ids).cast("B")
    salted = bytes((len(salt),)) + salt
    stride = 4 * block_size
    parent = hashes[-1] if hashes else _NO_PARENT
    for offset in range(0, len(content), stride):
        digest = hashlib.blake2b(parent + salted, digest_size=HASH_BYTES)
        digest.update(content[offset : offset + stride])
        parent = digest.digest()
        hashes.append(parent)


class KVCache:
    """Blocks 0 .. num_blocks - 1, their reference counts and the prefix cache. All O(1) a block."""

    def __init__(self, num_blocks: int, block_size: int, prefix_caching: bool = True) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(
                f"got {num_blocks} blocks of {block_size} tokens; need at least 1 of 1"
            )
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.prefix_caching = prefix_caching
        self._references = [0] * num_blocks
        self._hash_of: list[bytes | None] = [None] * num_blocks
        self._parent_of: list[bytes] = [b""] * num_blocks
        self._block_of: dict[bytes, int] = {}
        self._plain = list(range(num_blocks - 1, -1, -1))
        self._cached_free: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._stored: dict[bytes, bytes] = {}  # hash -> parent, net of `_removed`
        self._removed: dict[bytes, None] = {}

    @property
    def num_free(self) -> int:
        return len(self._plain) + len(self._cached_free)

    @property
    def num_used(self) -> int:
        return self.num_blocks - self.num_free

    def match(self, hashes: Sequence[bytes], limit: int) -> list[int]:
        """Blocks of the longest cached beginning, at most `limit`. Takes no reference."""
        blocks: list[int] = []
        if self.prefix_caching:
            for digest in hashes[:limit]:
                block = self._block_of.get(digest)
                if block is None:
                    break
                blocks.append(block)
        return blocks

    def num_idle(self, blocks: Sequence[int]) -> int:
        """How many of `blocks` nobody uses: acquiring them takes from the free ones."""
        references = self._references
        return sum(1 for block in blocks if references[block] == 0)

    def num_sole(self, blocks: Sequence[int], without: AbstractSet[int]) -> int:
        """How many of `blocks` have one user only and are not in `without`."""
        references = self._references
        return sum(1 for block in blocks if references[block] == 1 and block not in without)

    def acquire(self, blocks: Sequence[int]) -> None:
        """Take a reference on matched blocks."""
        for block in blocks:
            if self._references[block] == 0:
                del self._cached_free[block]
            self._references[block] += 1

    def allocate(self, count: int) -> list[int]:
        """Blocks without content for one owner. The caller has checked `num_free`.

        Unknown blocks go first, then the least recently used cached ones lose their content.
        """
        if count > self.num_free:
            raise ValueError(f"{count} KV blocks asked for, {self.num_free} free")
        blocks: list[int] = []
        for _ in range(count):
            if self._plain:
                block = self._plain.pop()
            else:
                block, _ = self._cached_free.popitem(last=False)
                self._forget(block)
            self._references[block] = 1
            blocks.append(block)
        return blocks

    def free(self, blocks: Sequence[int]) -> None:
        """Give back one reference on each. A sequence's end is evicted before its beginning."""
        for block in reversed(blocks):
            left = self._references[block] - 1
            if left < 0:
                raise ValueError(f"KV block {block} was freed more often than it was taken")
            self._references[block] = left
            if left == 0:
                if self._hash_of[block] is None:
                    self._plain.append(block)
                else:
                    self._cached_free[block] = None

    def store(self, block: int, digest: bytes, parent: bytes) -> None:
        """Make a full, computed block findable. `parent` is b"" for a first block.

        Where another block already holds the same content, that one stays the findable one.
        """
        if not self.prefix_caching or digest in self._block_of or self._hash_of[block] is not None:
            return
        self._hash_of[block] = digest
        self._parent_of[block] = parent
        self._block_of[digest] = block
        if digest in self._removed:
            del self._removed[digest]
        else:
            self._stored[digest] = parent

    def _forget(self, block: int) -> None:
        digest = self._hash_of[block]
        if digest is None:
            return
        self._hash_of[block] = None
        del self._block_of[digest]
        if digest in self._stored:
            del self._stored[digest]
        else:
            self._removed[digest] = None

    def take_events(self) -> tuple[list[tuple[bytes, bytes]], list[bytes]]:
        """Net changes of the prefix cache since the last call: stored (parent, hash), removed."""
        if not self._stored and not self._removed:
            return [], []
        stored = [(parent, digest) for digest, parent in self._stored.items()]
        removed = list(self._removed)
        self._stored = {}
        self._removed = {}
        return stored, removed

    def snapshot(self) -> list[tuple[bytes, bytes]]:
        """Everything findable, as (parent, hash)."""
        return [(self._parent_of[block], digest) for digest, block in self._block_of.items()]

    def check_integrity(self, tables: Iterable[Sequence[int]]) -> None:
        """Raise AssertionError unless the state is exactly what `tables`, all users', explain."""
        expected = [0] * self.num_blocks
        for table in tables:
            if len(set(table)) != len(table):
                raise AssertionError(f"a table holds a block twice: {table}")
            for block in table:
                expected[block] += 1
        if expected != self._references:
            wrong = [b for b in range(self.num_blocks) if expected[b] != self._references[b]]
            raise AssertionError(f"reference counts of blocks {wrong} do not fit their users")
        plain = set(self._plain)
        if len(plain) != len(self._plain) or plain & self._cached_free.keys():
            raise AssertionError("a block is free twice")
        for block in range(self.num_blocks):
            free = block in plain or block in self._cached_free
            if free != (expected[block] == 0):
                raise AssertionError(f"block {block} is free and used, or neither")
            digest = self._hash_of[block]
            if digest is None and block in self._cached_free:
                raise AssertionError(f"block {block} is kept for its content but has no hash")
            if digest is not None and (block in plain or self._block_of.get(digest) != block):
                raise AssertionError(f"block {block} has a hash but cannot be found by it")
        if len(self._block_of) != sum(digest is not None for digest in self._hash_of):
            raise AssertionError("the prefix cache names blocks that do not hold its content")
