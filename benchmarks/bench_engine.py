"""What an engine owes its users besides tokens a second: gaps, prefixes, memory, its start.

    python benchmarks/bench_engine.py                       all parts; about ten minutes
    python benchmarks/bench_engine.py --parts gap,prefix    other parts' rows stay as they were

start    `scalellm serve` until it is ready, without and with packed weights on disk; its memory
         once every block of its KV pool has been written
steps    what a step of 64 streams takes outside its kernels
gap      a prompt of 8,192 tokens arrives while 16 streams decode: their longest gap
prefix   64 prompts at once that begin with the same 1,024 tokens, beside 64 that do not

Qwen3-0.6B shape, random weights, int8. All but `start` run the engine within this process, without
a network. Each part wants the machine for itself.
"""

import argparse
import json
import os
import queue
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from http.client import HTTPConnection
from itertools import pairwise
from pathlib import Path

from document import write_section
from peers import weights
from peers.process_tree import ProcessTree
from peers.system import Launch, free_port, running

from scalellm.bench.machine import describe_machine
from scalellm.config import EngineConfig
from scalellm.engine.local import LocalEngine, LocalListener, LocalSubmission, Outbox
from scalellm.engine.loop import EngineLoop
from scalellm.executor.expert_use import ExpertUse
from scalellm.executor.load import load_executor

ROOT = Path(__file__).resolve().parent.parent
CACHE = Path.home() / ".cache" / "scalellm" / "peers"
RESULTS = ROOT / "target" / "bench-engine" / "rows.json"
SECTION = "engine-promises"
WARM_STARTS = 3
POOL_BYTES = 512 << 20
FILLING, FILLING_TOKENS = 6, 1000  # prompts that share nothing and take more than the pool together
OUTSIDE_WEIGHTS_BYTES = 800 << 20  # torch's own libraries are most of it
PROMPT, STREAMS, LONG_PROMPT, BURST = 128, 16, 8192, 64
SHARED, OWN = 1024, 32
STEADY_TOKENS = 48  # of each stream before the long prompt comes
STEPS = 40


@dataclass(frozen=True, slots=True)
class Row:
    """`found` is to be `bound` at most; both in `unit`."""

    what: str
    unit: str
    bound: float
    found: float
    detail: str = ""

    def line(self) -> str:
        verdict = "met" if self.found <= self.bound else "missed"
        bound, found = (f"{number:.3g} {self.unit}" for number in (self.bound, self.found))
        return f"| {self.what} | {bound} | {found} | {verdict} | {self.detail} |"


# Number, start, requests, tokens, and microseconds by phase of a step.
Note = tuple[int, int, int, int, Mapping[str, int]]


class StepNotes(LocalListener):
    """A listener that keeps what it is told of each step."""

    def __init__(self) -> None:
        super().__init__()
        self.notes: list[Note] = []

    def note_step(
        self,
        number: int,
        started_us: int,
        requests: int,
        tokens: int,
        phases: Sequence[tuple[str, int]],
        expert_use: ExpertUse | None,
    ) -> None:
        super().note_step(number, started_us, requests, tokens, phases, expert_use)
        self.notes.append((number, started_us, requests, tokens, dict(phases)))


class Engine:
    """One engine, and the outputs of whoever asks it: one caller at a time."""

    def __init__(self, engine: LocalEngine, listener: StepNotes) -> None:
        self._engine = engine
        self._random = random.Random(1)
        self.listener = listener
        self.outbox: Outbox = queue.SimpleQueue()

    def ids(self, count: int) -> list[int]:
        return [self._random.randrange(1000, 150_000) for _ in range(count)]

    def submit(self, prompts: Sequence[list[int]], max_tokens: int) -> list[int]:
        """The keys of greedy requests that end at their last token."""
        listener = self.listener
        made = [
            LocalSubmission(
                listener.next_key(), ids, max_tokens, seed=0, temperature=0.0, ignore_eos=True
            )
            for ids in prompts
        ]
        listener.submit(made, self.outbox)
        return [one.key for one in made]

    def next(self) -> tuple[int, list[int], float]:
        """Whose tokens came, which, and when."""
        output = self.outbox.get(timeout=300)
        if output is None:
            raise self._engine.failure()
        return output[0], output[1], time.perf_counter()

    def end(self, keys: Sequence[int]) -> None:
        """Cancel what still runs of them, and let no output of them be seen later."""
        self.listener.cancel(keys)
        while self.listener.load[0] or self.listener.load[1]:
            time.sleep(0.05)
        self.outbox = queue.SimpleQueue()


@contextmanager
def engine() -> Generator[Engine, None, None]:
    """The bf16 checkpoint as int8, warmed up."""
    config = EngineConfig(
        model_path=weights.bf16_folder(CACHE),
        device="cpu",
        quantization="int8",
        cpu_threads=len(os.sched_getaffinity(0)),
        max_model_len=LONG_PROMPT + 1024,
        # Prompts that share nothing take 8 GiB; those that wait have none.
        kv_cache_memory_bytes=4 << 30,
    )
    executor, listener = load_executor(config), StepNotes()
    held = LocalEngine(EngineLoop(executor, listener, config), listener, executor.close)
    try:
        found = Engine(held, listener)
        first_tokens(found, [found.ids(PROMPT) for _ in range(4)])
        yield found
    finally:
        held.close()


def first_tokens(of: Engine, prompts: Sequence[list[int]]) -> list[float]:
    """Seconds until each prompt of the faster half has its first token, all sent at once."""
    began = time.perf_counter()
    keys = of.submit(prompts, max_tokens=8)
    first: dict[int, float] = {}
    while len(first) < (len(keys) + 1) // 2:
        key, tokens, now = of.next()
        if tokens:
            first.setdefault(key, now - began)
    of.end(keys)
    return list(first.values())


# ------------------------------------------------------------ parts


def start() -> list[Row]:
    """Of `scalellm serve`, in a process of its own."""
    folder = weights.bf16_folder(CACHE)
    with tempfile.TemporaryDirectory() as scratch:
        cache, log = Path(scratch) / "packed", Path(scratch) / "log"
        cold_s, _ = _serve(folder, cache, log)
        warm = [_serve(folder, cache, log) for _ in range(WARM_STARTS)]
        packed_bytes = sum(file.stat().st_size for file in cache.iterdir())
    resident = statistics.median(bytes_ for _, bytes_ in warm)
    bound = 1.15 * (packed_bytes + POOL_BYTES) + OUTSIDE_WEIGHTS_BYTES
    memory = "1.15 x (packed weights + KV pool of 512 MiB, all written) + 800 MiB"
    return [
        Row("ready, nothing packed yet", "s", 8.0, cold_s),
        Row("ready, packed weights on disk", "s", 3.0, statistics.median(s for s, _ in warm)),
        Row("resident memory of a replica", "GiB", bound / 2**30, resident / 2**30, memory),
    ]


def _serve(folder: Path, cache: Path, log: Path) -> tuple[float, float]:
    """Seconds until it is ready, and the bytes resident in the engine with a full pool."""
    port = free_port()
    argv = (sys.executable, "-m", "scalellm", "serve", str(folder), "--port", str(port))
    flags = ("--max-model-len", "4096", "--kv-cache-memory", str(POOL_BYTES))
    launch = Launch((*argv, *flags, "--packed-cache", str(cache)), ready_path="/ready")
    with running(launch, port, log) as server, ThreadPoolExecutor(4) as clients:
        list(clients.map(lambda _: _complete(port), range(FILLING)))
        return server.ready_after_s, _largest_resident_bytes(server.processes)


def _complete(port: int) -> None:
    ids = [random.randrange(1000, 150_000) for _ in range(FILLING_TOKENS)]
    asked = {"model": str(weights.bf16_folder(CACHE)), "prompt": ids, "max_tokens": 4}
    connection = HTTPConnection("127.0.0.1", port, timeout=120)
    connection.request("POST", "/v1/completions", json.dumps(asked))
    answer = connection.getresponse()
    if answer.status != 200:
        raise RuntimeError(f"status {answer.status}: {answer.read()[:200]!r}")
    answer.read()
    connection.close()


def _largest_resident_bytes(processes: ProcessTree) -> float:
    """Of the engine, whose process is the largest of all."""
    found = []
    for member in processes.members():
        fields = Path(f"/proc/{member.pid}/status").read_text(encoding="utf-8").splitlines()
        found += [int(line.split()[1]) << 10 for line in fields if line.startswith("VmRSS")]
    return float(max(found))


def steps(of: Engine) -> list[Row]:
    """Steps of 64 streams: what is not one of the executor's kinds of operation."""
    keys = of.submit([of.ids(PROMPT) for _ in range(BURST)], max_tokens=4 * BURST + STEPS)
    notes = of.listener.notes
    notes.clear()

    def decodes() -> list[Mapping[str, int]]:
        return [phases for _, _, count, tokens, phases in notes if count == tokens == BURST]

    while len(decodes()) < STEPS:
        of.next()
    found = decodes()
    of.end(keys)
    outside = [
        {phase: us / 1e3 for phase, us in step.items() if not phase.startswith("forward/")}
        for step in found
    ]
    median_ms = statistics.median(sum(step.values()) for step in outside)
    whole_ms = statistics.median(sum(step.values()) / 1e3 for step in found)
    phases = sorted({phase for step in outside for phase in step})
    parts = (
        f"{phase} {statistics.median(step.get(phase, 0.0) for step in outside):.2f}"
        for phase in phases
    )
    detail = f"of {whole_ms:.0f} ms: {', '.join(parts)}"
    return [Row("a step of 64 streams, outside its kernels", "ms", 1.5, median_ms, detail)]


def gap(of: Engine) -> list[Row]:
    """How long streams wait for a token while a long prompt is computed beside them."""
    streams = of.submit([of.ids(PROMPT) for _ in range(STREAMS)], max_tokens=LONG_PROMPT)
    times: dict[int, list[float]] = {key: [] for key in streams}
    while min(map(len, times.values())) < STEADY_TOKENS:
        key, tokens, now = of.next()
        times[key] += [now] * len(tokens)
    sent = time.perf_counter()
    [late] = of.submit([of.ids(LONG_PROMPT)], max_tokens=4)
    while True:
        key, tokens, now = of.next()
        if key == late:
            break
        times[key] += [now] * len(tokens)
    of.end([*streams, late])
    pairs = [(a, b) for stream in times.values() for a, b in pairwise(stream)]
    all_started = max(stream[0] for stream in times.values())
    steady_s = statistics.median(b - a for a, b in pairs if all_started < a and b < sent)
    gaps = [b - a for a, b in pairs if b > sent]
    detail = (
        f"steady TBT {1e3 * steady_s:.0f} ms; meanwhile median "
        f"{1e3 * statistics.median(gaps):.0f}, longest {1e3 * max(gaps):.0f}; "
        f"the prompt's TTFT {now - sent:.1f} s"
    )
    name = "longest gap of 16 streams while a prompt of 8,192 tokens comes, of their steady TBT"
    return [Row(name, "x", 2.5, max(gaps) / steady_s, detail)]


def prefix(of: Engine) -> list[Row]:
    """What a shared beginning saves of the wait for a first token."""
    common = of.ids(SHARED)
    shared_s = max(first_tokens(of, [common + of.ids(OWN) for _ in range(BURST)]))
    apart_s = max(first_tokens(of, [of.ids(SHARED + OWN) for _ in range(BURST)]))
    name = "TTFT p50 of 64 prompts with 1,024 tokens in common, of that without"
    detail = f"{shared_s:.1f} s, {apart_s:.1f} s"
    return [Row(name, "x", 0.2, shared_s / apart_s, detail)]


PARTS: Mapping[str, Callable[[Engine], list[Row]]] = {"steps": steps, "gap": gap, "prefix": prefix}
NAMES = ("start", *PARTS)


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parts", default=",".join(NAMES), help="default: %(default)s")
    parser.add_argument("--docs", default=str(ROOT / "docs" / "performance.md"))
    given = parser.parse_args(arguments)
    chosen = given.parts.split(",")
    if unknown := set(chosen) - set(NAMES):
        parser.error(f"--parts: got {', '.join(sorted(unknown))}; known: {', '.join(NAMES)}")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # servers end with this process
    found: dict[str, list[Row]] = {"start": start()} if "start" in chosen else {}
    if inside := [name for name in PARTS if name in chosen]:
        with engine() as of:
            found |= {name: PARTS[name](of) for name in inside}
    text = _table(_kept(found))
    print(text)
    if given.docs != "none":
        write_section(Path(given.docs), SECTION, text)
    return 0


def _kept(found: Mapping[str, Sequence[Row]]) -> dict[str, list[Row]]:
    """What was found, with what earlier calls found of other parts."""
    kept = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    kept |= {name: [asdict(row) for row in rows] for name, rows in found.items()}
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    return {name: [Row(**row) for row in kept[name]] for name in NAMES if name in kept}


def _table(parts: Mapping[str, Sequence[Row]]) -> str:
    machine = describe_machine()
    lines = [row.line() for rows in parts.values() for row in rows]
    return (
        f"Qwen3-0.6B shape, random weights, int8, on {machine['cores']} cores of {machine['cpu']}"
        f", with\n\n    python benchmarks/bench_engine.py --parts {','.join(parts)}\n\n"
        "| what | at most | measured | | |\n|---|---:|---:|---|---|\n" + "\n".join(lines) + "\n"
    )


if __name__ == "__main__":
    sys.exit(main())
