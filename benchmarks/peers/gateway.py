"""Gateways, and what stands behind all of them: a fake engine and a fake foreign endpoint.

    nginx, LiteLLM, SMG, ScaleLLM's gateway  --HTTP-->  fake endpoint
    ScaleLLM's gateway                       --gRPC-->  fake engine, of the same speed

The gateway has one core for itself; what stands behind it shares another with the load.
"""

import json
import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import scalellm.demo
from peers.system import Launch, PeerError, free_port, running
from scalellm.cli.accounts import DatabaseAccounts

MODEL = "demo"
_MODEL_FOLDER = Path(scalellm.demo.__file__).parent / "model"
_ENGINE_SOCKET = "engine.sock"
# Room for every stream that is held and for the longest prompt.
_MAX_SEQS, _MAX_MODEL_LEN = 16_384, 1 << 20
_FEW_PLACES = 64


@dataclass(frozen=True, slots=True)
class Backend:
    """A fake engine's address and a fake endpoint's URL, of the same speed; a folder for files."""

    engine: str
    url: str
    folder: Path


@dataclass(frozen=True, slots=True)
class Gateway:
    """One gateway. `launch(cache, port, backend)` has it pass requests on to `backend`."""

    name: str
    about: str
    build: Callable[[Path, Path], None]
    launch: Callable[[Path, int, Backend], Launch]
    # The same with few places for running requests, where there is such a limit.
    limited: Callable[[Path, int, Backend], Launch] | None = None
    # Thousands of requests a second are out of its reach.
    slow: bool = False
    # It writes to its sockets by write and writev, which the kernel counts; it does not count send.
    writes_are_counted: bool = True


@dataclass(frozen=True, slots=True)
class Cores:
    """The gateway's own core, and the one for all else."""

    gateway: int
    rest: int

    @staticmethod
    def of(allowed: Sequence[int]) -> "Cores":
        """Raises PeerError where there is only one."""
        if len(allowed) < 2:
            raise PeerError("a gateway alone on a core needs a second one for the load")
        return Cores(allowed[0], allowed[1])


def pinned(launch: Launch, core: int) -> Launch:
    return replace(launch, argv=("taskset", "--cpu-list", str(core), *launch.argv))


@contextmanager
def backend(
    folder: Path, ttft_ms: float, tbt_ms: float, core: int
) -> Generator[Backend, None, None]:
    """Run both until the block ends."""
    folder.mkdir(parents=True, exist_ok=True)
    engine = f"unix:{folder / _ENGINE_SOCKET}"
    port = free_port()
    endpoint = _core_call(f"run_fake_endpoint({port}, {ttft_ms}, {tbt_ms})", "/v1/models")
    settings = _engine_settings(ttft_ms, tbt_ms)
    behind = _core_call(f"run_fake_engine({engine!r}, {settings!r})", None)
    with (
        running(pinned(behind, core), port, folder / "fake-engine.log"),
        running(pinned(endpoint, core), port, folder / "fake-endpoint.log") as served,
    ):
        yield Backend(engine, served.url, folder)


def _engine_settings(ttft_ms: float, tbt_ms: float) -> str:
    vocab_size = json.loads((_MODEL_FOLDER / "config.json").read_text("utf-8"))["vocab_size"]
    return json.dumps(
        {
            "model": MODEL,
            "model_path": str(_MODEL_FOLDER),
            "vocab_size": vocab_size,
            "max_num_seqs": _MAX_SEQS,
            "max_model_len": _MAX_MODEL_LEN,
            "num_blocks": _MAX_MODEL_LEN,
            "ttft_ms": ttft_ms,
            "tbt_ms": tbt_ms,
            "output": {"kind": "echo"},
        }
    )


def scalellm_gateway(port: int, engine: str) -> Launch:
    """ScaleLLM's gateway before `engine`, with nothing but its defaults."""
    return _gateway(f'host = "127.0.0.1"\nport = {port}\n{_model()}replicas = ["{engine}"]\n')


def _measured_gateway(port: int, behind: str, folder: Path, places: int) -> Launch:
    """With what a public endpoint has on: keys and usage in SQLite, metrics, stage times."""
    database = f"sqlite:{folder / f'accounts-{port}.db'}"
    key = DatabaseAccounts(database).create({"name": "bench", "tenant": "bench"})["secret"]
    settings = {
        "host": "127.0.0.1",
        "port": port,
        "log_level": "error",
        "database_url": database,
        "max_in_flight": places,
        "max_queued": places,
    }
    # Numbers and plain strings are the same in JSON and TOML.
    lines = [f"{name} = {json.dumps(value)}" for name, value in settings.items()]
    return replace(_gateway("\n".join([*lines, behind])), api_key=key)


def _model() -> str:
    return f'[[models]]\nname = "{MODEL}"\npath = "{_MODEL_FOLDER}"\n'


def _gateway(config: str) -> Launch:
    return _core_call(f"run_gateway({config!r})", "/ready")


def _core_call(call: str, ready_path: str | None) -> Launch:
    code = f"import scalellm._core as core; core.{call}"
    return Launch((sys.executable, "-c", code), ready_path=ready_path)


def _own_engine(places: int) -> Callable[[Path, int, Backend], Launch]:
    def launch(_: Path, port: int, behind: Backend) -> Launch:
        replicas = f'replicas = ["{behind.engine}"]\n'
        return _measured_gateway(port, _model() + replicas, behind.folder, places)

    return launch


def _foreign_engine(places: int) -> Callable[[Path, int, Backend], Launch]:
    def launch(_: Path, port: int, behind: Backend) -> Launch:
        model = f'[[models]]\nname = "{MODEL}"\n[[models.upstreams]]\nurl = "{behind.url}/v1"\n'
        return _measured_gateway(port, model, behind.folder, places)

    return launch


def _nothing(_cache: Path, _log: Path) -> None:
    pass


SCALELLM_GATEWAYS = (
    Gateway(
        "scalellm",
        "ScaleLLM, own engine over gRPC",
        _nothing,
        _own_engine(_MAX_SEQS),
        limited=_own_engine(_FEW_PLACES),
    ),
    Gateway(
        "scalellm-foreign",
        "ScaleLLM, foreign engine over HTTP",
        _nothing,
        _foreign_engine(_MAX_SEQS),
        limited=_foreign_engine(_FEW_PLACES),
    ),
)
