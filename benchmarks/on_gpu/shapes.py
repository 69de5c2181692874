"""Replicas that share GPUs: on one GPU two side by side; on several a deployment that is made to
change its shape to and fro under streams."""

import json
import sys
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

from blueprint.deployment import Watch, loaded
from peers.system import Launch, Running, free_port, running

from scalellm.bench.plan import Level, Workload

_STREAMS = 32
_WORKLOAD = Workload(input_tokens=128, output_tokens=256)
_SWITCHES = 4
_SWITCH_S = 90.0
_TO_LOOK_S = 0.2


def measure(folder: Path, flags: list[str], gpus: int, log: Path) -> dict[str, Any]:
    port = free_port()
    command = [sys.executable, "-m", "scalellm", "serve", str(folder.resolve())]
    command += ["--load-format", "dummy", "--device", "cuda", "--port", str(port), *flags]
    if gpus == 1:
        command += ["--replicas", "2", "--gpu-memory-utilization", "0.45"]
    else:
        command += ["--blueprint", "auto"]
    with running(Launch(tuple(command), ready_path="/ready"), port, log.resolve()) as server:
        found: dict[str, Any] = {"gpus": gpus, "ready_after_s": server.ready_after_s}
        if gpus == 1:
            return found | _seen(server, 4 * _STREAMS)
        return found | _switched(server)


def _seen(server: Running, requests: int) -> dict[str, Any]:
    """What clients of so many requests saw."""
    level = Level(_STREAMS, requests=requests, warmup=2)
    (row,) = loaded(server.url, [level], _WORKLOAD).rows
    return {
        "completed": row["completed"],
        "failed": row["failed"],
        "max_gap_ms": row["max_gap_ms"]["max"],
        "output_tok_s": row["output_tok_s"],
    }


def _switched(server: Running) -> dict[str, Any]:
    """Switches by an operator's wish, with streams from the first to the last."""
    url = server.url + "/admin/v1/blueprint"
    with urllib.request.urlopen(url, timeout=10) as answer:
        candidates = json.loads(answer.read())["candidates"]
    taken_s: list[float] = []
    errors: list[str] = []

    def switch() -> None:
        for at in range(_SWITCHES):
            wish = candidates[0 if at % 2 == 0 else -1]
            body = json.dumps({"blueprint": wish}).encode()
            began = time.monotonic()
            urllib.request.urlopen(urllib.request.Request(url, body, method="PUT"), timeout=10)
            while not _is_steady(url, wish):
                if time.monotonic() - began > _SWITCH_S:
                    errors.append(f"no {wish} after {_SWITCH_S:.0f} s")
                    return
                time.sleep(_TO_LOOK_S)
            taken_s.append(time.monotonic() - began)

    switching = threading.Thread(target=switch)
    seen: list[dict[str, Any]] = []
    with Watch(server.url) as watch:
        switching.start()
        while switching.is_alive():
            seen.append(_seen(server, 4 * _STREAMS))
        switching.join()
    if errors:
        raise RuntimeError(errors[0])
    return {
        "switches_s": taken_s,
        "phases": [f"{one.phase}: {one.blueprint}" for one in watch.seen],
        "completed": sum(one["completed"] for one in seen),
        "failed": sum(one["failed"] for one in seen),
        "max_gap_ms": max(one["max_gap_ms"] for one in seen),
        "output_tok_s": max(one["output_tok_s"] for one in seen),
    }


def _is_steady(url: str, wish: Any) -> bool:
    with urllib.request.urlopen(url, timeout=10) as answer:
        state = json.loads(answer.read())
    return bool(state["phase"] == "steady" and state["blueprint"] == wish)
