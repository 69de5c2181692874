"""What a routing policy is worth: four replicas, one of them three times slower, shared prefixes.

    python benchmarks/bench_routing.py [--requests 3000] [--rates 3 5 7] [--seed 1]

A discrete-event simulation: the policies are the gateway's own (`scalellm._core.Router`), the
replicas batch continuously, cache prefixes by least recent use, and tell of load and KV events when
a step has ended, so that the router learns of them as late as a gateway does. Time is simulated:
the figures do not depend on the machine.

Compared with round robin, and with "cache-aware", SMG's rule: the longest prefix above a share of
the prompt while the numbers of requests are balanced, else the fewest requests. "Of the oracle's"
is what was found cached, of the longest prefixes that any replica had, or was about to have, at
each choice.
"""

import argparse
import heapq
import itertools
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from scalellm._core import ReplicaLoad, Router
from scalellm.bench.prefix import shared_prefixes

BLOCK_TOKENS = 512
COST = (10.0, 0.05, 0.0, 0.3)  # fixed, token, attended, request, in ms
SLOWNESS = (1.0, 1.0, 1.0, 3.0)
CACHE_BLOCKS = 1500
STEP_TOKENS = 2048
SLOTS = 128
SHARED = 0.5  # of all prompt tokens
LINK_MS = 1.0  # from a step's end until a gateway knows


@dataclass(slots=True)
class Request:
    arrival_ms: float
    prompt_tokens: int
    output_tokens: int
    hashes: list[bytes]
    replica: int = -1
    cached: int = 0
    available: int = 0  # of the prompt, at the replica that had most of it when this came
    expected: int = 0  # uncached tokens, as the gateway believed
    left: int = 0  # prompt tokens to compute
    given: int = 0
    first_ms: float = 0.0


@dataclass(slots=True)
class Replica:
    """Continuous batching with chunked prompts: decodes go first, prompts fill the step."""

    slowness: float
    waiting: deque[Request] = field(default_factory=deque)
    running: list[Request] = field(default_factory=list)
    cache: OrderedDict[bytes, None] = field(default_factory=OrderedDict)
    busy: bool = False
    steps: int = 0
    step_ms: float = 0.0
    busy_ms: float = 0.0
    requests: int = 0
    stored: list[bytes] = field(default_factory=list)
    removed: list[bytes] = field(default_factory=list)
    told: list[tuple[str, list[bytes]]] = field(default_factory=list)  # KV events under way

    @property
    def cost(self) -> tuple[float, float, float, float]:
        fixed, token, attended, request = (self.slowness * ms for ms in COST)
        return fixed, token, attended, request

    def leading(self, request: Request) -> int:
        """Tokens of the prompt that are cached."""
        blocks = itertools.takewhile(self.cache.__contains__, request.hashes)
        return min(sum(BLOCK_TOKENS for _ in blocks), request.prompt_tokens - 1)

    def promised(self, request: Request) -> int:
        """The same, with what is going to be cached once the requests here are computed."""
        coming = {digest for r in (*self.waiting, *self.running) for digest in r.hashes}
        there = coming | self.cache.keys()
        blocks = itertools.takewhile(there.__contains__, request.hashes)
        return min(sum(BLOCK_TOKENS for _ in blocks), request.prompt_tokens - 1)

    def begin_step(self) -> float:
        """Admit, and the time that the step will take in ms; 0 with nothing to do."""
        while self.waiting and len(self.running) < SLOTS:
            request = self.waiting.popleft()
            request.cached = self.leading(request)
            request.left = request.prompt_tokens - request.cached
            self.running.append(request)
        if not self.running:
            return 0.0
        tokens = sum(request.left == 0 for request in self.running)
        for request in self.running:
            tokens += min(request.left, max(0, STEP_TOKENS - tokens))
        fixed, token, _, each = self.cost
        return fixed + token * tokens + each * len(self.running)

    def end_step(self, now_ms: float) -> list[Request]:
        """What `begin_step` announced; the requests that ended."""
        tokens = sum(request.left == 0 for request in self.running)
        for request in self.running:
            if request.left:
                chunk = min(request.left, max(0, STEP_TOKENS - tokens))
                tokens += chunk
                request.left -= chunk
                if request.left:
                    continue
                request.first_ms = now_ms
                self._store(request.hashes)
            request.given += 1
        ended = [request for request in self.running if request.given >= request.output_tokens]
        self.running = [r for r in self.running if r.given < r.output_tokens]
        self.steps += 1
        return ended

    def _store(self, hashes: Sequence[bytes]) -> None:
        for digest in reversed(hashes):
            if digest not in self.cache:
                self.stored.append(digest)
            self.cache[digest] = None
            self.cache.move_to_end(digest)
        while len(self.cache) > CACHE_BLOCKS:
            self.removed.append(self.cache.popitem(last=False)[0])

    def load(self) -> dict[str, Any]:
        first = [request for request in self.running if request.left]
        backlog = sum(r.left for r in first) + sum(
            r.prompt_tokens - self.leading(r) for r in self.waiting
        )
        return {
            "running": len(self.running),
            "waiting": len(self.waiting),
            "backlog_tokens": backlog,
            "step_ms": self.step_ms,
            "steps": self.steps,
            "max_num_seqs": SLOTS,
            "block_size": BLOCK_TOKENS,
            "cost": self.cost,
        }


class Fleet:
    """The replicas and what one gateway knows of them."""

    def __init__(self, slowness: Sequence[float]) -> None:
        self.replicas = [Replica(each) for each in slowness]
        self.known = [replica.load() for replica in self.replicas]
        self.own_requests = [0] * len(slowness)
        self.own_tokens = [0] * len(slowness)

    def loads(self) -> list[ReplicaLoad]:
        return [
            ReplicaLoad(at, own_requests=requests, own_tokens=tokens, **known)
            for at, (known, requests, tokens) in enumerate(
                zip(self.known, self.own_requests, self.own_tokens, strict=True)
            )
        ]


# Where a request goes, and how many of its tokens are believed to be cached there.
Choose = Callable[[Fleet, Request, float], tuple[int, int]]


def by_router(policy: str) -> Choose:
    """The gateway's code, told what the replicas have told."""
    router = Router(policy)

    def choose(fleet: Fleet, request: Request, now_ms: float) -> tuple[int, int]:
        for at, replica in enumerate(fleet.replicas):
            for kind, hashes in replica.told:
                (router.store if kind == "stored" else router.remove)(at, hashes)
            replica.told.clear()
        route = router.pick(
            fleet.loads(),
            request.prompt_tokens,
            now_ms,
            max_tokens=request.output_tokens,
            hashes=request.hashes,
            block_size=BLOCK_TOKENS,
        )
        assert route is not None
        return route.index, route.cached_tokens

    return choose


def round_robin() -> Choose:
    turns = itertools.count()
    return lambda fleet, *_: (next(turns) % len(fleet.replicas), 0)


def cache_aware(threshold: float = 0.5, apart: int = 32, times: float = 1.1) -> Choose:
    """SMG's rule with its defaults, on what it has sent: nothing tells it what was evicted."""
    sent: list[set[bytes]] = [set() for _ in SLOWNESS]

    def choose(fleet: Fleet, request: Request, _: float) -> tuple[int, int]:
        counts = fleet.own_requests
        shares = [
            sum(1 for _ in itertools.takewhile(known.__contains__, request.hashes))
            / max(1, len(request.hashes))
            for known in sent
        ]
        most, least = max(counts), min(counts)
        if most - least > apart and most > times * least:
            at = counts.index(least)
        elif max(shares) > threshold:
            at = shares.index(max(shares))
        else:
            at = min(range(len(sent)), key=lambda i: len(sent[i]))
        sent[at].update(request.hashes)
        return at, 0

    return choose


def simulate(requests: Sequence[Request], slowness: Sequence[float], choose: Choose) -> Fleet:
    """Run all requests to their end; their times and replicas are noted in them."""
    fleet = Fleet(slowness)
    order = itertools.count()
    events: list[tuple[float, int, str, Any]] = [
        (request.arrival_ms, next(order), "arrive", request) for request in requests
    ]
    heapq.heapify(events)

    def start(at: int, now_ms: float) -> None:
        replica = fleet.replicas[at]
        replica.step_ms = replica.begin_step()
        replica.busy = replica.step_ms > 0.0
        if replica.busy:
            heapq.heappush(events, (now_ms + replica.step_ms, next(order), "step", at))

    while events:
        now_ms, _, kind, what = heapq.heappop(events)
        if kind == "arrive":
            request = what
            request.available = max(replica.promised(request) for replica in fleet.replicas)
            at, cached = choose(fleet, request, now_ms)
            request.replica = at
            request.expected = request.prompt_tokens - cached
            fleet.own_requests[at] += 1
            fleet.own_tokens[at] += request.expected
            replica = fleet.replicas[at]
            replica.requests += 1
            replica.waiting.append(request)
            if not replica.busy:
                start(at, now_ms)
        elif kind == "step":
            replica = fleet.replicas[what]
            replica.busy_ms += replica.step_ms
            first = [request for request in replica.running if request.left]
            ended = replica.end_step(now_ms)
            answered = [request for request in first if not request.left]
            told = [("stored", replica.stored), ("removed", replica.removed)]
            replica.stored, replica.removed = [], []
            start(what, now_ms)
            news = (what, replica.load(), told, answered, ended)
            heapq.heappush(events, (now_ms + LINK_MS, next(order), "told", news))
        else:
            at, load, told, answered, ended = what
            fleet.known[at] = load
            fleet.replicas[at].told += told
            fleet.own_requests[at] -= len(ended)
            fleet.own_tokens[at] -= sum(request.expected for request in answered)
    return fleet


def workload(count: int, rate: float, seed: int) -> list[Request]:
    """Mooncake's lengths (docs/benchmarking.md), half of the prompts' tokens shared beginnings."""
    random = np.random.default_rng(seed)
    arrivals = np.cumsum(random.exponential(1e3 / rate, count))
    prompts = np.clip(random.lognormal(8.74, 1.20, count), 64, 100_000).astype(int)
    outputs = np.clip(random.lognormal(5.34, 1.36, count), 1, 2_000).astype(int)
    ids = shared_prefixes([int(n) for n in prompts], SHARED, BLOCK_TOKENS, random)
    return [
        Request(float(at), int(prompt), int(output), [_name(i) for i in blocks[: prompt // 512]])
        for at, prompt, output, blocks in zip(arrivals, prompts, outputs, ids, strict=True)
    ]


def hot_prefix(count: int, rate: float, seed: int) -> list[Request]:
    """Everybody shares 8,192 tokens and brings 256 of their own."""
    random = np.random.default_rng(seed)
    arrivals = np.cumsum(random.exponential(1e3 / rate, count))
    outputs = random.integers(50, 300, count)
    shared = [_name(i) for i in range(16)]
    return [
        Request(float(at), 8_192 + 256, int(output), shared)
        for at, output in zip(arrivals, outputs, strict=True)
    ]


def _name(content: int) -> bytes:
    return content.to_bytes(16, "little")


POLICIES: dict[str, Callable[[], Choose]] = {
    "round robin": round_robin,
    "cache-aware": cache_aware,
    "least-load": lambda: by_router("least-load"),
    "prefix": lambda: by_router("prefix"),
}


def measure(requests: Sequence[Request], slowness: Sequence[float], name: str) -> dict[str, float]:
    fresh = [Request(r.arrival_ms, r.prompt_tokens, r.output_tokens, r.hashes) for r in requests]
    fleet = simulate(fresh, slowness, POLICIES[name]())
    ttft = np.array([request.first_ms - request.arrival_ms for request in fresh])
    load = [replica.requests * replica.slowness for replica in fleet.replicas]
    return {
        "found": sum(r.cached for r in fresh) / sum(r.available for r in fresh),
        "cached": sum(r.cached for r in fresh) / sum(r.prompt_tokens for r in fresh),
        "p50": float(np.percentile(ttft, 50)),
        "p99": float(np.percentile(ttft, 99)),
        "most": max(load) / (sum(load) / len(load)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare routing policies in simulated time.")
    parser.add_argument("--requests", type=int, default=3000)
    parser.add_argument("--rates", type=float, nargs="+", default=[3.0, 5.0, 7.0])
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    print("four replicas, one 3x slower, Mooncake-like prompts")
    print("| requests/s | policy | cached | of the oracle's | TTFT p50 ms | p99 ms |")
    print("|---|---|---|---|---|---|")
    for rate in given.rates:
        requests = workload(given.requests, rate, given.seed)
        for name in POLICIES:
            row = measure(requests, SLOWNESS, name)
            print(
                f"| {rate:g} | {name} | {row['cached']:.2f} | {row['found']:.2f} "
                f"| {row['p50']:.0f} | {row['p99']:.0f} |"
            )
    print("\none hot prefix")
    print("| replicas | requests/s | policy | most loaded, of the mean | TTFT p50 ms | p99 ms |")
    print("|---|---|---|---|---|---|")
    for label, slowness in (("equal", (1.0,) * 4), ("one 3x slower", SLOWNESS)):
        for rate in (5.0, 20.0, 60.0):
            requests = hot_prefix(given.requests, rate, given.seed)
            for name in POLICIES:
                row = measure(requests, slowness, name)
                print(
                    f"| {label} | {rate:g} | {name} | {row['most']:.2f} "
                    f"| {row['p50']:.0f} | {row['p99']:.0f} |"
                )


if __name__ == "__main__":
    main()
