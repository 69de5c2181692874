"""SMG (Shepherd Model Gateway, once sglang-router), over HTTP to one worker."""

from pathlib import Path

from peers.environment import python_environment
from peers.gateway import Backend, Gateway
from peers.system import Launch

VERSION = "1.13.0"
_ENVIRONMENT = "smg"


def _build(cache: Path, log: Path) -> None:
    python_environment(cache, _ENVIRONMENT, log)


def _launch(cache: Path, port: int, backend: Backend) -> Launch:
    program = cache / _ENVIRONMENT / "env" / "bin" / "smg"
    argv = (str(program), "launch", "--worker-urls", backend.url, "--backend", "vllm")
    listen = ("--host", "127.0.0.1", "--port", str(port), "--log-level", "warn")
    return Launch((*argv, *listen, "--disable-tokenizer-autoload"), ready_path="/readiness")


GATEWAY = Gateway("smg", f"SMG {VERSION}", _build, _launch)
