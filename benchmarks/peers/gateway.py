"""Gateways before the same backend: an engine of set speed, behind ScaleLLM's own HTTP.

    gateway, LiteLLM or SMG  --HTTP-->  ScaleLLM's gateway  --gRPC-->  fake engine
    ScaleLLM's gateway       --------------------gRPC------------->    the same fake engine

What is measured is the gateway alone: its processes' time and memory, not its backend's. All share
the machine's cores, as they would on one host.
"""

import json
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import scalellm.demo
from peers.system import Launch, free_port, running

MODEL = "demo"
# Long enough that every token is a chunk of its own, short enough that 64 clients ask for more than
# a gateway on two cores gives.
TTFT_MS, TBT_MS = 5.0, 1.0
_MODEL_FOLDER = Path(scalellm.demo.__file__).parent / "model"
_ENGINE_SOCKET = "engine.sock"


@dataclass(frozen=True, slots=True)
class Gateway:
    """One gateway. `launch(cache, port, backend)` has it pass requests on to `backend`."""

    name: str
    about: str
    build: Callable[[Path, Path], None]
    launch: Callable[[Path, int, "Backend"], Launch]


@dataclass(frozen=True, slots=True)
class Backend:
    """A fake engine's address, and the URL of a gateway that serves it as an OpenAI endpoint."""

    engine: str
    url: str


@contextmanager
def backend(logs: Path) -> Generator[Backend, None, None]:
    """Run the fake engine and an HTTP endpoint before it."""
    logs.mkdir(parents=True, exist_ok=True)
    engine = f"unix:{logs / _ENGINE_SOCKET}"
    port = free_port()
    with (
        running(_fake_engine(engine), port, logs / "fake-engine.log"),
        running(scalellm_gateway(port, engine), port, logs / "backend.log") as front,
    ):
        yield Backend(engine, front.url)


def _fake_engine(address: str) -> Launch:
    vocab_size = json.loads((_MODEL_FOLDER / "config.json").read_text("utf-8"))["vocab_size"]
    settings = {
        "model": MODEL,
        "model_path": str(_MODEL_FOLDER),
        "vocab_size": vocab_size,
        "ttft_ms": TTFT_MS,
        "tbt_ms": TBT_MS,
        "output": {"kind": "echo"},
    }
    return _core_function("run_fake_engine", address, json.dumps(settings), ready_path=None)


def scalellm_gateway(port: int, engine: str) -> Launch:
    """ScaleLLM's gateway before `engine`."""
    config = (
        f'host = "127.0.0.1"\nport = {port}\n[[models]]\nname = "{MODEL}"\n'
        f'path = "{_MODEL_FOLDER}"\nreplicas = ["{engine}"]\n'
    )
    return _core_function("run_gateway", config, ready_path="/ready")


def _core_function(function: str, *arguments: str, ready_path: str | None) -> Launch:
    code = f"import sys; from scalellm._core import {function}; {function}(*sys.argv[1:])"
    return Launch((sys.executable, "-c", code, *arguments), ready_path=ready_path)


SCALELLM_GATEWAY = Gateway(
    "scalellm-gateway",
    "ScaleLLM",
    lambda _cache, _log: None,
    lambda _cache, port, behind: scalellm_gateway(port, behind.engine),
)
