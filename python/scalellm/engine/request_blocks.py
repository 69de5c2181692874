"""Which of the KV cache's blocks requests have, are promised, and are about to compute."""

from array import array
from collections.abc import Iterable, Sequence

from scalellm.engine.kv_cache import KVCache, extend_hashes
from scalellm.engine.request import Request
from scalellm.engine.step import Limits

_HEADROOM_SHARE = 16  # admission leaves a block per running request to grow, at most this fraction


class RequestBlocks:
    """Keeps the block tables of requests; who is to have blocks is the scheduler's decision."""

    def __init__(self, kv: KVCache, limits: Limits, max_model_len: int) -> None:
        self.kv = kv
        self.reserved = 0  # promised to protected running requests, not yet taken
        self._max_preemptions = limits.max_preemptions
        self._max_model_len = max_model_len
        self._computing: dict[bytes, int] = {}  # block hash -> key of the request that computes it

    @property
    def num_free(self) -> int:
        """Blocks that anybody may take."""
        return self.kv.num_free - self.reserved

    def of_tokens(self, tokens: int) -> int:
        return -(-tokens // self.kv.block_size)

    def lacking(self, request: Request, tokens: int) -> int:
        """Blocks that the request has to take before it can have so many tokens."""
        return self.of_tokens(tokens) - len(request.block_table)

    def is_protected(self, request: Request) -> bool:
        return request.preemptions >= self._max_preemptions

    def worst(self, request: Request) -> int:
        """The most the request will ever have; its last token is sampled but never computed."""
        tokens = min(request.num_prompt_tokens + request.max_tokens, self._max_model_len) - 1
        return max(self.of_tokens(tokens), self.of_tokens(request.num_tokens))

    # ------------------------------------------------------------ prefixes

    def hash(self, request: Request) -> None:
        """Name the full blocks of its tokens by what they hold."""
        if self.kv.prefix_caching:
            extend_hashes(
                request.block_hashes, request.token_ids, self.kv.block_size, request.cache_salt
            )

    def match(self, request: Request) -> list[int]:
        """Cached blocks of the request's beginning, at least one token left to compute."""
        tokens = request.num_tokens - 1
        if request.wants_prompt_logprobs:
            tokens = min(tokens, request.prompt_logprobs_done)
        return self.kv.match(request.block_hashes, tokens // self.kv.block_size)

    def computed_by(self, request: Request, matched: Sequence[int]) -> int | None:
        """The key of who is about to compute the request's next block, if it can be shared."""
        following = len(matched)
        if (
            following >= (request.num_tokens - 1) // self.kv.block_size
            or following >= len(request.block_hashes)
            or request.wants_prompt_logprobs
        ):
            return None
        return self._computing.get(request.block_hashes[following])

    def store_full(self, request: Request) -> None:
        """Let others find the request's computed full blocks."""
        kv = self.kv
        full = request.num_computed_tokens // kv.block_size
        if full <= request.num_cached_blocks or not kv.prefix_caching:
            return
        hashes = request.block_hashes
        if len(hashes) < full:
            self.hash(request)
        for i in range(request.num_cached_blocks, full):
            kv.store(request.block_table[i], hashes[i], hashes[i - 1] if i else b"")
            if self._computing.get(hashes[i]) == request.key:
                del self._computing[hashes[i]]
        request.num_cached_blocks = full

    # ------------------------------------------------------------ taking and giving back

    def shortage(self, request: Request, matched: Sequence[int], running: int) -> int:
        """Blocks that are lacking to let the request in beside `running`; at most 0 if it fits."""
        needed = self.of_tokens(request.num_tokens)
        headroom = min(running, self.kv.num_blocks // _HEADROOM_SHARE)
        headroom <<= request.preemptions
        if self.is_protected(request):
            needed = self.worst(request)
            headroom = 0
        taken = needed - len(matched) + self.kv.num_idle(matched)
        return taken + headroom - self.num_free

    def take(self, request: Request, matched: Sequence[int]) -> None:
        """All that its tokens need, `matched` of them as they are; a protected one's worst case
        is promised."""
        self.kv.acquire(matched)
        new = self.of_tokens(request.num_tokens) - len(matched)
        request.block_table = array("i", [*matched, *self.kv.allocate(new)])
        if self.is_protected(request):
            request.reserved_blocks = self.worst(request) - len(request.block_table)
            self.reserved += request.reserved_blocks
        request.num_cached_blocks = len(matched)
        request.num_computed_tokens = len(matched) * self.kv.block_size
        for digest in request.block_hashes[len(matched) :]:
            self._computing.setdefault(digest, request.key)

    def grow(self, request: Request, blocks: int = 1) -> bool:
        """Take so many more, promised ones first; False if too few are free, and none is taken."""
        if request.reserved_blocks >= blocks:
            request.reserved_blocks -= blocks
            self.reserved -= blocks
        elif self.num_free < blocks:
            return False
        request.block_table.extend(self.kv.allocate(blocks))
        return True

    def release(self, request: Request) -> None:
        """Give back all blocks; what was computed of them stays findable until evicted."""
        self.reserved -= request.reserved_blocks
        request.reserved_blocks = 0
        for digest in request.block_hashes[request.num_cached_blocks :]:
            if self._computing.get(digest) == request.key:
                del self._computing[digest]
        self.kv.free(request.block_table)
        request.block_table = array("i")
        request.num_cached_blocks = 0

    def check_integrity(self, running: Iterable[Request]) -> None:
        """Raise AssertionError unless blocks and promises are those of `running`."""
        holders = list(running)
        self.kv.check_integrity(request.block_table for request in holders)
        if self.reserved != sum(request.reserved_blocks for request in holders):
            raise AssertionError("reservations do not add up")
        if not 0 <= self.reserved <= self.kv.num_free:
            raise AssertionError(f"{self.reserved} blocks reserved, {self.kv.num_free} free")
        if not set(self._computing.values()) <= {request.key for request in holders}:
            raise AssertionError("a block is said to be computed by a request that does not run")
