"""One level of load on one running system, with what the whole system spent on it."""

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from peers.system import PeerError, Running

# By the published rule a request that takes longer has timed out; slower ones are measured too.
LATE_AFTER_S = 60.0
_LATE_SHARE = 0.10
# Starting the bench, finding out about the target, making prompts.
_OVERHEAD_S = 120.0


@dataclass(frozen=True, slots=True)
class Sample:
    """One system at one concurrency, once. Latencies are p50 in ms, null where none was measured.

    `late` counts requests that took over LATE_AFTER_S or did not complete at all. `error` says why
    there are no figures; `skipped_after` is the smaller level that made this one pointless.
    """

    system: str
    concurrency: int
    repeat: int
    requests: int = 0
    completed: int = 0
    failed: int = 0
    late: int = 0
    ttft_ms: float | None = None
    tbt_ms: float | None = None
    output_tok_s: float = 0.0
    output_tokens: int = 0
    input_tokens: int | None = None
    cpu_s_per_1000_tokens: float | None = None
    pss_bytes: int = 0
    ready_after_s: float = 0.0
    skipped_after: int | None = None
    error: str | None = None

    @property
    def unfinished(self) -> int:
        return self.requests - self.completed

    @property
    def timed_out(self) -> bool:
        """By the rule that over a tenth of the requests are late."""
        return self.skipped_after is not None or self.late > _LATE_SHARE * self.requests

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Load:
    """What every request asks for, and how often each client asks. See `scalellm bench serve`."""

    timeout_s: float
    endpoint: str = "completions"
    ignore_eos: bool = True
    input_tokens: int = 128
    output_tokens: int = 64
    rounds: int = 1
    fewest_requests: int = 4  # one request at a time says little
    warmup: int = 2

    def command(
        self, url: str, model: str | None, concurrency: int, seed: int, path: Path
    ) -> list[str]:
        """The bench's command line for one level, its result in `path`."""
        values = {
            "endpoint": self.endpoint,
            "concurrency": concurrency,
            "requests": max(concurrency * self.rounds, self.fewest_requests),
            "warmup": self.warmup,
            "timeout": self.timeout_s,
            "input-tokens": self.input_tokens,
            "output-tokens": self.output_tokens,
            "seed": seed,
        }
        flags = [word for name, value in values.items() for word in (f"--{name}", str(value))]
        flags.append("--ignore-eos" if self.ignore_eos else "--no-ignore-eos")
        if model is not None:
            flags += ["--model", model]
        bench = [sys.executable, "-m", "scalellm", "bench", "serve", "--url", url, "--quiet"]
        return [*bench, *flags, "--json", str(path)]


@dataclass(frozen=True, slots=True)
class Costs:
    """Of a whole system: processor time during a call of the bench, and memory after it."""

    cpu_s: float
    pss_bytes: int
    ready_after_s: float


def measure(
    server: Running, load: Load, system: str, concurrency: int, repeat: int, scratch: Path
) -> Sample:
    """All requests of the level at once, by `scalellm bench serve`, after those that warm up.

    Processor time counts from before the warm-up, and is divided by its tokens too.
    Raises PeerError if the bench does not give a result in the time that all requests may take.
    """
    path = scratch / "bench.json"
    path.unlink(missing_ok=True)
    cpu_s_before = server.processes.cpu_s()
    # No level repeats another's prompts: a prefix cache would answer them.
    seed = 1000 * repeat + concurrency
    command = load.command(server.url, server.model, concurrency, seed, path)
    limit_s = 2 * load.timeout_s + _OVERHEAD_S
    try:
        done = subprocess.run(command, capture_output=True, timeout=limit_s, check=False)
    except subprocess.TimeoutExpired:
        raise PeerError(f"the load at {concurrency} did not end in {limit_s:.0f} s") from None
    cpu_s = server.processes.cpu_s() - cpu_s_before
    if not path.exists():
        raise PeerError(f"the load at {concurrency}: {done.stderr.decode(errors='replace')}")
    (row,) = json.loads(path.read_text(encoding="utf-8"))["rows"]
    costs = Costs(cpu_s, server.processes.pss_bytes(), server.ready_after_s)
    return sample_of(row, costs, load, system, repeat)


def sample_of(row: Mapping[str, Any], costs: Costs, load: Load, system: str, repeat: int) -> Sample:
    """The sample in one row of the bench's JSON."""
    requests = row["completed"] + row["failed"] + row["timed_out"]
    in_time = sum(time <= LATE_AFTER_S * 1000 for time in completed_e2e_ms(row))
    all_tokens = row["output_tokens"] + load.warmup * load.output_tokens
    return Sample(
        system=system,
        concurrency=row["concurrency"],
        repeat=repeat,
        requests=requests,
        completed=row["completed"],
        failed=row["failed"],
        late=requests - in_time,
        ttft_ms=row["ttft_ms"]["p50"],
        tbt_ms=row["tbt_ms"]["p50"],
        output_tok_s=row["output_tok_s"],
        output_tokens=row["output_tokens"],
        input_tokens=row["input_tokens"],
        cpu_s_per_1000_tokens=1000 * costs.cpu_s / all_tokens if row["completed"] else None,
        pss_bytes=costs.pss_bytes,
        ready_after_s=costs.ready_after_s,
        error=_failure(row),
    )


def completed_e2e_ms(row: Mapping[str, Any]) -> list[float]:
    """Of each completed request, from the row's columns."""
    columns = row["records"]["columns"]
    outcome, e2e_ms = columns.index("outcome"), columns.index("e2e_ms")
    return [line[e2e_ms] for line in row["records"]["rows"] if line[outcome] == "completed"]


def _failure(row: Mapping[str, Any]) -> str | None:
    """The first failure's message where nothing completed, else nothing: some may fail."""
    if row["completed"] or not row["failures"]:
        return None
    kind, failure = next(iter(row["failures"].items()))
    return f"{failure['count']} failed by {kind}, e.g. {failure['example']}"
