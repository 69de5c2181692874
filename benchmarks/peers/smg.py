"""SMG (Shepherd Model Gateway, once sglang-router), over HTTP to one worker."""

from pathlib import Path

from peers.environment import python_environment
from peers.gateway import Backend, Gateway
from peers.system import Launch

VERSION = "1.13.0"
_ENVIRONMENT = "smg"


def _build(cache: Path, log: Path) -> None:
    python_environment(cache, _ENVIRONMENT, log)


def _launch(cache: Path, port: int, backend: Backend, policy: str) -> Launch:
    program = cache / _ENVIRONMENT / "env" / "bin" / "smg"
    argv = (str(program), "launch", "--worker-urls", backend.url, "--backend", "vllm")
    listen = ("--host", "127.0.0.1", "--port", str(port), "--log-level", "warn")
    flags = ("--disable-tokenizer-autoload", "--policy", policy)
    return Launch((*argv, *listen, *flags), ready_path="/readiness")


def _gateway(name: str, policy: str) -> Gateway:
    return Gateway(
        name,
        f"SMG {VERSION}, HTTP, {policy}",
        _build,
        lambda cache, port, backend: _launch(cache, port, backend, policy),
    )


GATEWAYS = (_gateway("smg", "round_robin"), _gateway("smg-cache-aware", "cache_aware"))
