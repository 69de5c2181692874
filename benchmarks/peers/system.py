"""What a system to be measured is, and running one: built, started, awaited, ended.

build      its environment and its model, once, below a cache folder
launch     the command line on a free loopback port, its environment, how to ask if it is ready
running    start it, wait until it answers, and end it and all its processes by their ids
"""

import http.client
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from peers.process_tree import ProcessTree

READY_WITHIN_S = 600.0
_STOPPED_WITHIN_S = 30.0
_ASK_EVERY_S = 0.02
_LOG_TAIL_LINES = 3


class PeerError(Exception):
    """A system that cannot be built, started or measured; its message is the reason."""


@dataclass(frozen=True, slots=True)
class Launch:
    """A server's command line. `ready_path` answers 200 as soon as it can serve.

    Without one the server is not waited for: something else that needs it will be. `model` is the
    name that requests must give where the server does not tell it.
    """

    argv: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    ready_path: str | None = "/v1/models"
    model: str | None = None
    api_key: str = field(default="", repr=False)


@dataclass(frozen=True, slots=True)
class System:
    """One system with one setting: a row of the tables.

    `build(cache, log)` makes everything below the cache folder, and does nothing where that is done
    already; what it runs writes into the log. `launch(cache, port)` is called after it.
    """

    name: str
    about: str
    precision: str
    build: Callable[[Path, Path], None]
    launch: Callable[[Path, int], Launch]
    # Refuses requests that hold it; random weights all but never end a sequence by themselves.
    ignore_eos: bool = True


@dataclass(frozen=True, slots=True)
class Running:
    """A server that is ready."""

    url: str
    ready_after_s: float
    processes: ProcessTree
    model: str | None
    api_key: str = field(default="", repr=False)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def running(launch: Launch, port: int, log: Path) -> Generator[Running, None, None]:
    """Run what `launch` says, listening at `port`, until the block ends; `log` gets all it says.

    Raises PeerError, with the end of its log, if it ends or is not ready in time.
    """
    begun = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(
            launch.argv,
            env={**os.environ, **launch.environment},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=log.parent,
            start_new_session=True,
        )
    tree = ProcessTree(process.pid)
    try:
        if launch.ready_path is not None:
            _await_ready(process, port, launch.ready_path, log)
        ready_after_s = time.monotonic() - begun
        url = f"http://127.0.0.1:{port}"
        yield Running(url, ready_after_s, tree, launch.model, launch.api_key)
    finally:
        _stop(process, tree)


def _await_ready(process: "subprocess.Popen[bytes]", port: int, ready_path: str, log: Path) -> None:
    deadline = time.monotonic() + READY_WITHIN_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise PeerError(
                f"ended with code {process.returncode} before it was ready: {tail(log)}"
            )
        if _answers(port, ready_path):
            return
        time.sleep(_ASK_EVERY_S)
    raise PeerError(f"was not ready after {READY_WITHIN_S:.0f} s: {tail(log)}")


def _answers(port: int, path: str) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", path)
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def tail(log: Path) -> str:
    """The end of a log: its last lines that hold anything."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return " | ".join([line.strip() for line in lines if line.strip()][-_LOG_TAIL_LINES:])


def _stop(process: "subprocess.Popen[bytes]", tree: ProcessTree) -> None:
    """Ask the server to end; what is left of its processes after that is killed, each by its id."""
    members = tree.members()
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(_STOPPED_WITHIN_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    left = [member for member in {*members, *tree.members()} if tree.is_same(member)]
    for member in left:
        with suppress(ProcessLookupError):
            os.kill(member.pid, signal.SIGKILL)
    deadline = time.monotonic() + _STOPPED_WITHIN_S
    while any(tree.is_same(member) for member in left) and time.monotonic() < deadline:
        time.sleep(_ASK_EVERY_S)
