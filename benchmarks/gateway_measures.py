"""What is measured of one gateway, alone on a core: throughput, processor time, delay, memory.

small     closed loop of 64, prompts of 500 bytes, answers of 16 tokens in one piece
chunk     64 streams of 256 tokens, as fast as they go; 256 streams of a token every 20 ms
added     constant arrivals; end to end, less the same load sent to the endpoint behind it, in turn
big       closed loop of 16, prompts of 220 KB, each new
beside    p99 of small requests while such run, the same again and again, over their p99 alone;
          and that of small requests straight to the endpoint, which is the load's own
overload  64 places before an engine of 20 ms: p99 at twice the load, over that at 80%
held      streams that are open at once with a token a second, and what is left of their memory
          later, over that of the same process after requests and a pause
"""

import json
import random
import statistics
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from peers.gateway import MODEL, Backend, Cores, Gateway, backend, pinned
from peers.system import PeerError, Running, free_port, running

from scalellm.bench.results import Row

_SMALL_BYTES, _BIG_BYTES = 500, 220_000
_SMALL_PROMPTS, _BIG_PROMPTS = 512, 192
_CONCURRENCY, _BIG_CONCURRENCY, _PACED_STREAMS = 64, 16, 256
_ANSWER_TOKENS, _STREAM_TOKENS, _PACED_TOKENS, _HELD_TOKENS = 16, 256, 100, 12
_PACED_TBT_MS, _HELD_TBT_MS = 20.0, 1000.0
_HELD_LIFE_MS = (_HELD_TOKENS - 1) * _HELD_TBT_MS
# A rate holds if the gateway could answer more, and did answer about as many.
_RATES, _HEADROOM, _HELD_SHARE = (2000, 5000, 10_000), 1.1, 0.95
_BESIDE_RATE = 200
# So often in turn, and the medians: p99 of one run is as often twice as long as not.
_ADDED_ROUNDS, _BESIDE_ROUNDS = 5, 3
_BIG_BEGIN_S = 0.5
_LIMITED_TTFT_MS = 20.0
_LOOK_EVERY_S = 0.2
_SETTLED_AFTER_S = 5.0
_MIB = 1 << 20

Prompt = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Amounts:
    """How much of each is asked for; a slow gateway is asked less, so that it answers at all."""

    seconds: float
    held: int = 9500  # with a connection to the endpoint for each, 20,000 files are enough

    def for_slow(self) -> "Amounts":
        return replace(self, held=200)


@dataclass(frozen=True, slots=True)
class Figures:
    """One gateway in one repeat. `error` says why there are none."""

    gateway: str
    repeat: int
    request_s: float | None = None
    cpu_us_request: float | None = None
    cpu_us_chunk: float | None = None
    # Of the streams that go as fast as they can; all that the gateway writes counts.
    tokens_per_write: float | None = None
    cpu_us_paced_chunk: float | None = None
    # At so many requests a second; None where it cannot answer as many.
    added_2000_p50_ms: float | None = None
    added_2000_p99_ms: float | None = None
    added_5000_p50_ms: float | None = None
    added_5000_p99_ms: float | None = None
    added_10000_p50_ms: float | None = None
    added_10000_p99_ms: float | None = None
    beside_big_p99_ratio: float | None = None
    beside_big_direct_p99_ratio: float | None = None
    overload_p99_ratio: float | None = None
    overload_refused_share: float | None = None
    big_request_s: float | None = None
    after_big_mib: float | None = None
    held_kib: float | None = None
    held_left_mib: float | None = None
    idle_mib: float | None = None
    ready_s: float | None = None
    failed: int = 0
    error: str | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class Prompts:
    """Random words, made once."""

    def __init__(self) -> None:
        source = random.Random(0)
        letters = "abcdefghijklmnopqrstuvwxyz"
        words = ["".join(source.choices(letters, k=source.randint(2, 9))) for _ in range(4096)]

        def text(size: int) -> str:
            return " ".join(source.choices(words, k=size // 5))[:size]

        self.small = [{"text": text(_SMALL_BYTES)} for _ in range(_SMALL_PROMPTS)]
        self.big = [{"text": text(_BIG_BYTES)} for _ in range(_BIG_PROMPTS)]


@dataclass(frozen=True, slots=True)
class Bench:
    """Where a gateway is measured, and with what."""

    amounts: Amounts
    prompts: Prompts
    cores: Cores
    cache: Path
    folder: Path


def measure_gateway(gateway: Gateway, repeat: int, bench: Bench) -> Figures:
    """All of it, with a start for each speed of what stands behind. Raises PeerError."""
    if gateway.slow:
        bench = replace(bench, amounts=bench.amounts.for_slow())
    found = Figures(gateway.name, repeat)
    with _behind(bench, 0.0, 0.0) as behind, _running(gateway, behind, bench) as server:
        mib = server.processes.pss_bytes() / _MIB
        found = replace(found, ready_s=server.ready_after_s, idle_mib=mib)
        found = _small_requests(found, server, bench)
        found = _chunks(found, server, bench)
        if not gateway.writes_are_counted:
            found = replace(found, tokens_per_write=None)
        found = _big_requests(found, server, bench)
        for rate in _RATES:
            found = _added(found, server, behind, bench, rate)
        found = _beside_big_requests(found, server, behind, bench)
    if gateway.limited is not None:
        with _behind(bench, _LIMITED_TTFT_MS, 0.0) as behind:
            limited = replace(gateway, launch=gateway.limited)
            with _running(limited, behind, bench) as server:
                found = _overload(found, server, bench)
    with (
        _behind(bench, _PACED_TBT_MS, _PACED_TBT_MS) as behind,
        _running(gateway, behind, bench) as server,
    ):
        found = _paced_chunks(found, server, bench)
    with (
        _behind(bench, _PACED_TBT_MS, _HELD_TBT_MS) as behind,
        _running(gateway, behind, bench) as server,
    ):
        return _held(found, server, bench)


def _behind(bench: Bench, ttft_ms: float, tbt_ms: float) -> AbstractContextManager[Backend]:
    return backend(bench.folder, ttft_ms, tbt_ms, bench.cores.rest)


def _running(gateway: Gateway, behind: Backend, bench: Bench) -> AbstractContextManager[Running]:
    port = free_port()
    launch = pinned(gateway.launch(bench.cache, port, behind), bench.cores.gateway)
    return running(launch, port, bench.folder / f"{gateway.name}.log")


def _small_requests(found: Figures, server: Running, bench: Bench) -> Figures:
    level = {"concurrency": _CONCURRENCY, "duration_s": bench.amounts.seconds}
    row, cpu_s = _costed(server, bench.prompts.small, level, _ANSWER_TOKENS, stream=False)
    return _plus(
        found,
        row,
        request_s=row["request_s"],
        cpu_us_request=1e6 * cpu_s / max(row["completed"], 1),
    )


def _chunks(found: Figures, server: Running, bench: Bench) -> Figures:
    level = {"concurrency": _CONCURRENCY, "duration_s": bench.amounts.seconds}
    written = server.processes.write_calls()
    row, cpu_s = _costed(server, bench.prompts.small, level, _STREAM_TOKENS, stream=True)
    written = server.processes.write_calls() - written
    return _plus(
        found,
        row,
        cpu_us_chunk=1e6 * cpu_s / max(row["output_tokens"], 1),
        tokens_per_write=row["output_tokens"] / max(written, 1),
    )


def _paced_chunks(found: Figures, server: Running, bench: Bench) -> Figures:
    """Each stream once, whole: what is cut off would cost and not count."""
    level = {"concurrency": _PACED_STREAMS, "requests": _PACED_STREAMS}
    row, cpu_s = _costed(server, bench.prompts.small, level, _PACED_TOKENS, stream=True)
    return _plus(found, row, cpu_us_paced_chunk=1e6 * cpu_s / max(row["output_tokens"], 1))


def _added(found: Figures, server: Running, behind: Backend, bench: Bench, rate: int) -> Figures:
    if (found.request_s or 0.0) < _HEADROOM * rate:
        return found
    ways = ((behind.url, ""), (server.url, server.api_key))
    rows: dict[str, list[Row]] = {url: [] for url, _ in ways}
    for number in range(_ADDED_ROUNDS):
        for url, key in ways if number % 2 else ways[::-1]:
            row = _open_loop(url, key, bench, rate)
            rows[url].append(row)
            if url == server.url:
                found = _plus(found, row)
    if not all(row["completed"] for of_way in rows.values() for row in of_way):
        return found
    held = (statistics.median(row["request_s"] for row in of_way) for of_way in rows.values())
    if min(held) < _HELD_SHARE * rate:
        return found
    added: dict[str, Any] = {}
    for percentile in ("p50", "p99"):
        direct, through = (
            statistics.median(row["e2e_ms"][percentile] for row in rows[url]) for url, _ in ways
        )
        added[f"added_{rate}_{percentile}_ms"] = through - direct
    return replace(found, **added)


def _open_loop(url: str, api_key: str, bench: Bench, rate: float) -> Row:
    number = round(rate * bench.amounts.seconds)
    send_at_s = [number / rate for number in range(number)]
    level = {"rate": rate, "send_at_s": send_at_s, "warmup": _CONCURRENCY}
    return _load(url, api_key, bench.prompts.small, level, 1, stream=False)


def _big_requests(found: Figures, server: Running, bench: Bench) -> Figures:
    level = {
        "concurrency": _BIG_CONCURRENCY,
        "duration_s": bench.amounts.seconds,
        "requests": len(bench.prompts.big),
    }
    row = _load(server.url, server.api_key, bench.prompts.big, level, 1, stream=False)
    mib = server.processes.pss_bytes() / _MIB
    return _plus(found, row, big_request_s=row["request_s"], after_big_mib=mib)


def _beside_big_requests(found: Figures, server: Running, behind: Backend, bench: Bench) -> Figures:
    ways = ((server.url, server.api_key), (behind.url, ""))
    ratios: dict[str, list[float]] = {url: [] for url, _ in ways}
    for number in range(_BESIDE_ROUNDS):
        if number:
            ways = ways[::-1]
        alone = [_open_loop(url, key, bench, _BESIDE_RATE) for url, key in ways]
        with ThreadPoolExecutor(1) as pool:
            big = pool.submit(_run_big_requests, server, bench)
            time.sleep(_BIG_BEGIN_S)
            beside = [_open_loop(url, key, bench, _BESIDE_RATE) for url, key in ways]
            rows = [*alone, *beside, big.result()]
        through = number % 2
        for row in (alone[through], beside[through], rows[-1]):
            found = _plus(found, row)
        if not all(row["completed"] for row in rows):
            return found
        for (url, _), row, other in zip(ways, alone, beside, strict=True):
            ratios[url].append(other["e2e_ms"]["p99"] / row["e2e_ms"]["p99"])
    return replace(
        found,
        beside_big_p99_ratio=statistics.median(ratios[server.url]),
        beside_big_direct_p99_ratio=statistics.median(ratios[behind.url]),
    )


def _run_big_requests(server: Running, bench: Bench) -> Row:
    """From before two loads of small ones until after them."""
    seconds = 2 * (bench.amounts.seconds + 1.0) + _BIG_BEGIN_S
    level = {"concurrency": _BIG_CONCURRENCY, "duration_s": seconds}
    return _load(server.url, server.api_key, bench.prompts.big, level, 1, stream=False)


def _overload(found: Figures, server: Running, bench: Bench) -> Figures:
    level = {"concurrency": _CONCURRENCY, "duration_s": bench.amounts.seconds}
    most = _load(server.url, server.api_key, bench.prompts.small, level, 1, stream=False)
    light, heavy = (
        _open_loop(server.url, server.api_key, bench, share * most["request_s"])
        for share in (0.8, 2.0)
    )
    refused = heavy["failures"].get("status", {"count": 0})["count"]
    if refused != heavy["failed"] or not light["completed"] or not heavy["completed"]:
        return _plus(found, heavy)
    return replace(
        _plus(found, light),
        overload_p99_ratio=heavy["e2e_ms"]["p99"] / light["e2e_ms"]["p99"],
        overload_refused_share=refused / (refused + heavy["completed"]),
    )


def _held(found: Figures, server: Running, bench: Bench) -> Figures:
    """The most that was there while they were open, and a while later, less what was before.

    Before them requests have filled what a gateway remembers for whoever comes next. No figure
    unless nearly all were open at the same time."""
    number = bench.amounts.held
    level = {"concurrency": _CONCURRENCY, "duration_s": bench.amounts.seconds}
    warm = _load(server.url, server.api_key, bench.prompts.small, level, 1, stream=False)
    if not warm["completed"]:
        raise PeerError("no request was answered before the held streams")
    found = _plus(found, warm)
    time.sleep(_SETTLED_AFTER_S)
    before = server.processes.pss_bytes()
    rows: list[Row] = []

    def hold() -> None:
        level = {"concurrency": number, "requests": number}
        prompts = bench.prompts.small
        loaded = _load(server.url, server.api_key, prompts, level, _HELD_TOKENS, stream=True)
        rows.append(loaded)

    holding = threading.Thread(target=hold)
    holding.start()
    most = before
    while holding.is_alive():
        most = max(most, server.processes.pss_bytes())
        holding.join(_LOOK_EVERY_S)
    if not rows:
        raise PeerError("the load of held streams failed")
    time.sleep(_SETTLED_AFTER_S)
    left_mib = (server.processes.pss_bytes() - before) / _MIB
    (row,) = rows
    if row["completed"] < _HELD_SHARE * number or row["ttft_ms"]["max"] > _HELD_LIFE_MS:
        return _plus(found, row)
    held_kib = (most - before) / row["completed"] / 1024
    return _plus(found, row, held_kib=held_kib, held_left_mib=left_mib)


def _costed(
    server: Running, prompts: Sequence[Prompt], level: Mapping[str, Any], tokens: int, stream: bool
) -> tuple[Row, float]:
    """The load's row, and the processor seconds of the gateway's processes meanwhile."""
    # What is done once is not what a request costs.
    warmup = {"concurrency": _CONCURRENCY, "requests": _CONCURRENCY}
    _load(server.url, server.api_key, prompts, warmup, 1, stream=stream)
    before_s = server.processes.cpu_s()
    row = _load(server.url, server.api_key, prompts, level, tokens, stream=stream)
    return row, server.processes.cpu_s() - before_s


def _load(
    url: str,
    api_key: str,
    prompts: Sequence[Prompt],
    level: Mapping[str, Any],
    tokens: int,
    *,
    stream: bool,
) -> Row:
    from scalellm._core import run_load

    plan = {
        "url": url,
        "endpoint": "chat",
        "model": MODEL,
        "api_key": api_key or None,
        "stream": stream,
        "max_tokens": tokens,
        "ignore_eos": False,  # not every gateway lets it pass
        "prompts": prompts,
        "levels": [level],
    }
    report = json.loads(run_load(json.dumps(plan), None))
    row: Row = report["levels"][0]
    return row


def _plus(found: Figures, row: Row, **figures: Any) -> Figures:
    failed = found.failed + row["failed"] + row["timed_out"] + row["resent"]
    return replace(found, failed=failed, **figures)
