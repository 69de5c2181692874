"""How the ranks of a replica on several hosts find each other.

rank 0      listens at --master-addr, --master-port
others      connect, and say which rank they are and where they listen: {"rank": 1, "port": 40001}
rank 0      tells each where all listen, and a key
all         connect to the ranks before them, with the key; accept those after them
rank 0      tells each what to load

The first connection stays: what rank 0 knows of a rank, it knows by it. A host that is gone without
a word is noticed by the kernel, which asks each connection that is silent whether it still lives.
Nothing is encrypted, and whoever reaches the port first is a rank: it belongs into a network of its
own.

This module imports no torch.
"""

import json
import secrets
import socket
import time
from collections.abc import Callable, Sequence
from typing import Any

from scalellm._core import __version__
from scalellm.errors import EngineError

COME_WITHIN_S = 600.0  # for a host's ranks to be started
_CONNECT_WITHIN_S = 30.0  # for a rank to connect to another that is there
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
            self._door = socket.create_server((host, port), backlog=16)
            self.listener = socket.create_server((host, 0), backlog=16)
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
        while len(found) < ranks - 1:
            self._door.settimeout(min(_LOOK_EVERY_S, COME_WITHIN_S))
            try:
                control, (host, *_) = self._door.accept()
            except TimeoutError:
                check()
                if time.monotonic() < until:
                    continue
                missing = sorted(set(range(1, ranks)) - found.keys())
                raise EngineError(
                    f"ranks {missing} have not come to {self.address[0]}:{self.address[1]} within "
                    f"{COME_WITHIN_S:.0f} s; is `scalellm engine --node-rank` running there?"
                ) from None
            rank, place = _introduced(control, host)
            if rank is None or not 0 < rank < ranks or rank in found:
                control.close()
                continue
            found[rank] = control, place
        controls = [found[rank][0] for rank in range(1, ranks)]
        return controls, [self._place, *(found[rank][1] for rank in range(1, ranks))]

    def close(self) -> None:
        self._door.close()
        self.listener.close()


def _introduced(control: socket.socket, host: str) -> tuple[int | None, Place]:
    """Which rank has connected, None if it is none, or of another version; and its place."""
    control.settimeout(_CONNECT_WITHIN_S)
    watch_over(control)
    try:
        told: dict[str, Any] = json.loads(read_line(control))
        control.settimeout(None)
        if told["version"] == __version__:
            return int(told["rank"]), (host, int(told["port"]))
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return None, (host, 0)


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
    listener = socket.create_server((control.getsockname()[0], 0), backlog=16)
    told = {"rank": rank, "port": listener.getsockname()[1], "version": __version__}
    control.sendall(json.dumps(told).encode() + b"\n")
    return control, listener


def connect(
    rank: int, places: Sequence[Place], key: str, listener: socket.socket
) -> list[socket.socket | None]:
    """Connections to all ranks, by rank, None for this one. Raises EngineError."""
    links: list[socket.socket | None] = [None] * len(places)
    mine = bytes.fromhex(key) + rank.to_bytes(4, "big")
    try:
        for other in range(rank):
            host, port = places[other]
            link = socket.create_connection((host, port), timeout=_CONNECT_WITHIN_S)
            link.sendall(mine)
            links[other] = link
        listener.settimeout(_CONNECT_WITHIN_S)
        while None in links[rank + 1 :]:
            link, _ = listener.accept()
            link.settimeout(_CONNECT_WITHIN_S)
            told = _read(link, len(mine))
            other = int.from_bytes(told[_KEY_BYTES:], "big")
            known = secrets.compare_digest(told[:_KEY_BYTES], mine[:_KEY_BYTES])
            if known and rank < other < len(places) and links[other] is None:
                links[other] = link
            else:
                link.close()
    except OSError as error:
        raise EngineError(f"rank {rank} cannot reach the other ranks: {error}") from None
    for connection in links:
        if connection is not None:
            watch_over(connection)
    return links


def watch_over(connection: socket.socket) -> None:
    """Have it end soon after the other host has, which may say nothing then."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (
        (socket.TCP_KEEPIDLE, 1),
        (socket.TCP_KEEPINTVL, 1),
        (socket.TCP_KEEPCNT, _ALIVE_WITHIN_S - 1),
        (socket.TCP_USER_TIMEOUT, _ALIVE_WITHIN_S * 1000),
    ):
        connection.setsockopt(socket.IPPROTO_TCP, option, value)


def read_line(control: socket.socket) -> bytes:
    """Up to the end of a line, byte by byte, so that nothing of what follows is taken."""
    line = bytearray()
    while not line.endswith(b"\n") and len(line) < _LONGEST_LINE:
        if not (byte := control.recv(1)):
            break
        line += byte
    return bytes(line)


def _read(link: socket.socket, count: int) -> bytes:
    found = b""
    while len(found) < count:
        more = link.recv(count - len(found))
        if not more:
            raise ConnectionError("it hung up")
        found += more
    return found
