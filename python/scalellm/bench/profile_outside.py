"""What shows of an endpoint that tells nothing: differences between measurements from outside.

round trip          a GET of /v1/models: connection, HTTP, and the server's event loop
front               the same load on ScaleLLM's front before an engine that does nothing, here
short prompt        the same load with prompts of a few tokens: queue and one step
the prompt          what is left: computing it
"""

import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from rich.console import Console

from scalellm.bench.front import front_alone
from scalellm.bench.results import Row
from scalellm.bench.serve import Options, run_bench
from scalellm.bench.target import TargetClient
from scalellm.errors import EndpointError

_ROUND_TRIPS = 21
_SHORT_TOKENS = 8


@dataclass(frozen=True, slots=True)
class Outside:
    """Mean milliseconds; absent where it could not be measured."""

    round_trip_ms: float | None
    short_prompt_ttft_ms: float | None
    front_ttft_ms: float | None  # of ScaleLLM's front alone, at the same level
    front_tbt_ms: float | None
    ttft_ms: float
    tbt_ms: float | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"ttft_parts": list(self.ttft_parts())}

    def ttft_parts(self) -> Iterator[tuple[str, float]]:
        """What the wait for the first token is made of, as far as it shows; adds up to it."""
        told = 0.0
        for name, at_ms in (
            ("round trip", self.round_trip_ms),
            ("front, if it were ScaleLLM's", self.front_ttft_ms),
            ("short prompt: other front, queue, one step", self.short_prompt_ttft_ms),
            ("the rest of the prompt", self.ttft_ms),
        ):
            if at_ms is not None and at_ms > told:
                yield name, min(at_ms, self.ttft_ms) - told
                told = min(at_ms, self.ttft_ms)


def look_from_outside(bench: Options, row: Row, baseline: bool, console: Console) -> Outside:
    """Measure what can be measured of the endpoint that gave `row` its times."""
    workload = bench.workload
    short: float | None = None
    if workload.input_tokens > _SHORT_TOKENS:
        trial = replace(bench, workload=replace(workload, input_tokens=_SHORT_TOKENS))
        short = _mean_ttft_ms(trial, console)
    front: Row | None = None
    if baseline:
        with front_alone() as url:
            rows = run_bench(replace(bench, url=url, model=None, api_key=""), console).rows
            front = rows[0] if rows and rows[0]["completed"] else None
    return Outside(
        _round_trip_ms(TargetClient(bench.url, bench.api_key, bench.trust)),
        short,
        None if front is None else front["ttft_ms"]["mean"],
        None if front is None else front["tbt_ms"]["mean"],
        row["ttft_ms"]["mean"],
        row["tbt_ms"]["mean"],
    )


def _mean_ttft_ms(bench: Options, console: Console) -> float | None:
    """None where such prompts cannot be made: a template alone may be longer."""
    try:
        row = run_bench(bench, console).rows[0]
    except EndpointError:
        return None
    mean: float | None = row["ttft_ms"]["mean"]
    return mean


def _round_trip_ms(client: TargetClient) -> float | None:
    times: list[float] = []
    for _ in range(_ROUND_TRIPS):
        began = time.perf_counter()
        try:
            client.call("GET", "/v1/models")
        except EndpointError:
            return None
        times.append((time.perf_counter() - began) * 1e3)
    return statistics.median(times)
