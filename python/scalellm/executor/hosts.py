"""How the ranks of a replica on several hosts find each other.

rank 0      listens at --master-addr, --master-port
others      connect, and say which rank they are and where they listen: {"rank": 1, "port": 40001}
rank 0      tells each where all listen, and a key
            or why it is none of them: {"error": "version 1, here 2"}
all         connect to the ranks before them, with the key; accept those after them
rank 0      tells each what to load

The first connection stays: what rank 0 knows of a rank, it knows by it. A host that is gone without
a word is noticed by the kernel, which asks such a connection, where it is silent, whether it still
lives. Those over which parts go are left alone: a rank that is late takes nothing from them.
Nothing is encrypted, and whoever reaches the port first is a rank: it belongs into a network of its
own.

This module imports no torch.
"""

import contextlib
import json
import logging
import secrets
import select
import socket
import time
from collections.abc import Callable, Sequence
from typing import Any

from scalellm._core import __version__
from scalellm.errors import EngineError

logger = logging.getLogger(__name__)

COME_WITHIN_S = 600.0  # for a host's ranks to be started
_CONNECT_WITHIN_S = 30.0  # for a rank to connect to another that is there
_SPEAK_WITHIN_S = 5.0  # for whoever has connected to say who it is
_LOOK_EVERY_S = 0.5  # for ranks of this host that have ended meanwhile
_ALIVE_WITHIN_S = 2  # for a host to answer
_LONGEST_LINE = 64 << 10
_KEY_BYTES = 16

Place = tuple[str, int]  # host and port that a rank listens at


class Meeting:
    """Rank 0's side. Raises EngineError for an address that it cannot listen at."""

    def __init__(self, host: str, port: int) -> None:
        self.key = secrets.token_hex(_KEY_BYTES)
        try:
            family, *_ = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            self._door = socket.create_server((host, port), family=family, backlog=16)
            self.listener = socket.create_server((host, 0), family=family, backlog=16)
        except OSError as error:
            raise EngineError(
                f"--master-addr {host}, --master-port {port}: cannot listen there: {error}"
            ) from None
        self.address: Place = (host, self._door.getsockname()[1])
        self._place: Place = (host, self.listener.getsockname()[1])

    def wait(
        self, ranks: int, check: Callable[[], None] = lambda: None
    ) -> tuple[list[socket.socket], list[Place]]:
        """The others' connections, of rank 1 first, and where all ranks listen.

        `check` is called now and then, to raise what ends the wait. Raises EngineError."""
        found: dict[int, tuple[socket.socket, Place]] = {}
        until = time.monotonic() + COME_WITHIN_S
        self._door.settimeout(min(_LOOK_EVERY_S, COME_WITHIN_S))
        while len(found) < ranks - 1:
            check()
            if time.monotonic() > until:
                missing = sorted(set(range(1, ranks)) - found.keys())
                raise EngineError(
                    f"ranks {missing} have not come to {self.address[0]}:{self.address[1]} within "
                    f"{COME_WITHIN_S:.0f} s; is `scalellm engine --node-rank` running there?"
                )
            try:
                control, (host, *_) = self._door.accept()
            except (TimeoutError, ConnectionError):  # nobody, or somebody who is gone again
                continue
            for rank in [rank for rank, (before, _) in found.items() if _is_gone(before)]:
                found.pop(rank)[0].close()
            try:
                rank, port = _introduced(control, ranks)
                if rank in found:
                    raise ValueError(f"rank {rank} is here already")
            except ValueError as reason:
                logger.warning("%s is no rank of this replica: %s", host, reason)
                _refuse(control, str(reason))
                continue
            found[rank] = control, (host, port)
        controls = [found[rank][0] for rank in range(1, ranks)]
        return controls, [self._place, *(found[rank][1] for rank in range(1, ranks))]

    def close(self) -> None:
        self._door.close()
        self.listener.close()


def _introduced(control: socket.socket, ranks: int) -> tuple[int, int]:
    """Which rank has connected, and the port that it listens at. Raises ValueError for none."""
    try:
        watch_over(control)
        told = json.loads(read_line(control, time.monotonic() + _SPEAK_WITHIN_S))
        control.settimeout(None)
        version, rank, port = told["version"], told["rank"], told["port"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise ValueError("it does not say which it is") from None
    if version != __version__:
        shown = version[:20] if isinstance(version, str) else "none"
        raise ValueError(f"version {shown}, here {__version__}")
    for name, number, most in (("rank", rank, ranks - 1), ("port", port, 65535)):
        if not isinstance(number, int) or not 0 < number <= most:
            raise ValueError(f"its {name} is not one of 1 to {most}")
    return rank, port


def _refuse(control: socket.socket, reason: str) -> None:
    with control, contextlib.suppress(OSError):
        control.settimeout(_LOOK_EVERY_S)
        control.sendall(json.dumps({"error": reason}).encode() + b"\n")


def _is_gone(control: socket.socket) -> bool:
    """Of a rank that has nothing to say before it is told something."""
    return bool(select.select([control], [], [], 0)[0])


def come(address: Place, rank: int) -> tuple[socket.socket, socket.socket]:
    """A later rank's side: its connection to rank 0 at `address`, which it waits for, and where it
    listens. Raises EngineError."""
    until = time.monotonic() + COME_WITHIN_S
    while True:
        try:
            control = socket.create_connection(address, timeout=_CONNECT_WITHIN_S)
            break
        except OSError as error:
            if time.monotonic() > until:
                host, port = address
                raise EngineError(f"rank 0 is not at {host}:{port}: {error}") from None
            time.sleep(0.2)
    control.settimeout(None)
    watch_over(control)
    own = control.getsockname()[0]
    listener = socket.create_server((own, 0), family=control.family, backlog=16)
    told = {"rank": rank, "port": listener.getsockname()[1], "version": __version__}
    control.sendall(json.dumps(told).encode() + b"\n")
    return control, listener


def places_told(control: socket.socket) -> tuple[list[Place], str]:
    """What rank 0 says to a rank that has come: where all listen, and the key. Raises EngineError
    for a rank that is refused, OSError."""
    line = read_line(control)
    if not line:
        raise EngineError("rank 0 has ended")
    told: dict[str, Any] = json.loads(line)
    if reason := told.get("error"):
        raise EngineError(f"rank 0 refuses it: {reason}")
    return [(host, port) for host, port in told["places"]], told["key"]


def connect(
    rank: int, places: Sequence[Place], key: str, listener: socket.socket
) -> list[socket.socket | None]:
    """Connections to all ranks, by rank, None for this one. Raises EngineError."""
    links: list[socket.socket | None] = [None] * len(places)
    known = bytes.fromhex(key)
    until = time.monotonic() + _CONNECT_WITHIN_S
    try:
        for other in range(rank):
            link = socket.create_connection(places[other], timeout=_CONNECT_WITHIN_S)
            link.sendall(known + rank.to_bytes(4, "big"))
            links[other] = link
        while None in links[rank + 1 :]:
            listener.settimeout(_left_s(until))
            link, _ = listener.accept()
            other = _greeted(link, known, until)
            if rank < other < len(places) and links[other] is None:
                links[other] = link
            else:
                link.close()
    except OSError as error:
        raise EngineError(f"rank {rank} cannot reach the other ranks: {error}") from None
    return links


def _greeted(link: socket.socket, known: bytes, until: float) -> int:
    """The rank that has connected; -1 for whoever does not have the key, or says nothing."""
    until = min(until, time.monotonic() + _SPEAK_WITHIN_S)
    told = b""
    try:
        while missing := len(known) + 4 - len(told):
            link.settimeout(_left_s(until))
            if not (more := link.recv(missing)):
                return -1
            told += more
    except OSError:
        return -1
    is_known = secrets.compare_digest(told[: len(known)], known)
    return int.from_bytes(told[len(known) :], "big") if is_known else -1


def watch_over(connection: socket.socket) -> None:
    """Have it end soon after the other host has, which may say nothing then.

    Only where little is sent: what the other side does not take in that time ends it, too."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (
        (socket.TCP_KEEPIDLE, 1),
        (socket.TCP_KEEPINTVL, 1),
        (socket.TCP_KEEPCNT, _ALIVE_WITHIN_S - 1),
        (socket.TCP_USER_TIMEOUT, _ALIVE_WITHIN_S * 1000),
    ):
        connection.setsockopt(socket.IPPROTO_TCP, option, value)


def read_line(control: socket.socket, until: float | None = None) -> bytes:
    """Up to the end of a line, byte by byte, so that nothing of what follows is taken.

    Raises TimeoutError where that has not come at `until`, of the monotonic clock."""
    line = bytearray()
    while not line.endswith(b"\n") and len(line) < _LONGEST_LINE:
        if until is not None:
            control.settimeout(_left_s(until))
        if not (byte := control.recv(1)):
            break
        line += byte
    return bytes(line)


def _left_s(until: float) -> float:
    """Raises TimeoutError for nothing."""
    left_s = until - time.monotonic()
    if left_s <= 0:
        raise TimeoutError("timed out")
    return left_s
