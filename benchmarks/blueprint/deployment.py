"""A deployment of a dummy model on two device slots of one core each, and load on it."""

import json
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import make_shape
from peers.system import Launch, Running, free_port, running
from rich.console import Console

from scalellm.bench.plan import Level, Workload
from scalellm.bench.results import Result
from scalellm.bench.serve import Options, run_bench

SLOTS = 2
PLANS = {"1 x TP 2": ("tp=2,count=1",), "2 x TP 1": ("tp=1,count=2",)}
AUTO = "auto"
_ENGINE = ("--load-format", "dummy", "--quantization", "int8", "--max-model-len", "1024")
_ASK_EVERY_S = 0.1


def model_folder(shape: str, folder: Path) -> Path:
    """The shape's files, written once."""
    model = folder / shape
    if not (model / "tokenizer.json").is_file():
        make_shape.write(shape, model)
    return model


def engine_flags(link_mb_s: int) -> tuple[str, ...]:
    """Of every replica, also where it is calibrated."""
    return (*_ENGINE, "--kv-cache-memory", "1GiB", "--link-mb-s", str(link_mb_s))


def calibrate(model: Path, link_mb_s: int, file: Path, widths: str = "1,2") -> None:
    """Measure what steps of these widths cost, as a first start would."""
    command = (
        *(sys.executable, "-m", "scalellm", "calibrate", str(model)),
        *engine_flags(link_mb_s),
        *("--widths", widths, "--devices", str(SLOTS), "--short", "--write", str(file)),
    )
    subprocess.run(command, check=True)


@contextmanager
def deployed(
    model: Path, plan: str, link_mb_s: int, log: Path, flags: Sequence[str] = ()
) -> Iterator[Running]:
    """`scalellm serve` with one of PLANS, or AUTO."""
    port = free_port()
    shapes = ["--blueprint", "auto"]
    if plan != AUTO:
        shapes = [flag for text in PLANS[plan] for flag in ("--replica", text)]
    command = (
        *(sys.executable, "-m", "scalellm", "serve", str(model), "--port", str(port)),
        *engine_flags(link_mb_s),
        *("--devices", str(SLOTS), "--cpu-threads", str(SLOTS), *shapes, *flags),
    )
    with running(Launch(command, ready_path="/ready"), port, log) as found:
        yield found


def loaded(url: str, levels: Sequence[Level], workload: Workload) -> Result:
    """What clients saw."""
    return run_bench(Options(url, tuple(levels), workload), Console(stderr=True))


@dataclass(frozen=True, slots=True)
class Seen:
    """The deployment's shape from this moment on."""

    at_s: float  # Unix time
    phase: str
    blueprint: str


class Watch:
    """Asks a gateway for the deployment's shape, over and over, on a thread of its own."""

    def __init__(self, url: str) -> None:
        self._url = url + "/admin/v1/blueprint"
        self._ended = threading.Event()
        self.seen: list[Seen] = []
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(_ASK_EVERY_S):
            try:
                with urllib.request.urlopen(self._url, timeout=5) as answer:
                    state: dict[str, Any] = json.loads(answer.read())
            except (OSError, ValueError):
                continue
            shape = " + ".join(f"{one['count']} x TP {one['tp']}" for one in state["blueprint"])
            found = Seen(time.time(), state["phase"], shape)
            last = self.seen[-1] if self.seen else None
            if last is None or (last.phase, last.blueprint) != (found.phase, found.blueprint):
                self.seen.append(found)
