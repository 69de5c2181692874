"""TTFT and TBT through the gateway, and how long it takes to be ready."""

from pathlib import Path
from typing import Any

from rich.console import Console
from serve_qwen3 import serving

from scalellm.bench.plan import Level, Workload
from scalellm.bench.serve import Options, run_bench

_ROUNDS = 8  # of which the first, all at once, is an eighth: medians are of the steady state


def measure(
    folder: Path, flags: list[str], workload: Workload, concurrencies: tuple[int, ...], log: Path
) -> dict[str, Any]:
    levels = tuple(
        Level(count, requests=max(_ROUNDS, count * _ROUNDS), warmup=max(2, count))
        for count in concurrencies
    )
    with serving(folder, ["--device", "cuda", *flags], log) as server:
        result = run_bench(Options(server.url, levels, workload), Console(stderr=True))
    return {"ready_after_s": server.ready_after_s, "flags": flags, **result.to_json()}
