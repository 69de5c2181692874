"""TTFT and TBT through the gateway, and how long it takes to be ready."""

import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from peers.system import Launch, free_port, running
from rich.console import Console

from scalellm.bench.plan import Level, Workload
from scalellm.bench.serve import Options, run_bench

WORKLOADS: Mapping[str, Workload] = MappingProxyType(
    {
        "mixtral-8x7b": Workload(input_tokens=512, output_tokens=128),
        "qwen3-0.6b": Workload(input_tokens=128, output_tokens=64),
    }
)
_ROUNDS = 8  # of which the first, all at once, is an eighth: medians are of the steady state


def measure(
    folder: Path, flags: list[str], workload: Workload, concurrencies: tuple[int, ...], log: Path
) -> dict[str, Any]:
    """A row for each level; what raises bears those before it as `measured`."""
    port = free_port()
    command = [sys.executable, "-m", "scalellm", "serve", str(folder.resolve())]
    command += ["--load-format", "dummy", "--device", "cuda", "--port", str(port), *flags]
    rows: list[dict[str, Any]] = []
    found: dict[str, Any] = {"flags": flags, "rows": rows}
    try:
        with running(Launch(tuple(command), ready_path="/ready"), port, log.resolve()) as server:
            found["ready_after_s"] = server.ready_after_s
            for count in concurrencies:
                level = Level(count, requests=max(_ROUNDS, count * _ROUNDS), warmup=max(2, count))
                options = Options(server.url, (level,), workload)
                rows += map(dict, run_bench(options, Console(stderr=True)).rows)
    except Exception as error:
        vars(error)["measured"] = found
        raise
    return found
