"""A TCP proxy that turns into a black hole: connections stay, new ones are taken, bytes vanish."""

import contextlib
import selectors
import socket
import threading


class BlackHole:
    """Forwards to `target`, if there is one, until `swallow` is called."""

    def __init__(self, target: tuple[str, int] | None = None) -> None:
        self._target = target
        self._swallows = threading.Event()
        self._ended = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.accepted = 0
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def swallow(self) -> None:
        self._swallows.set()

    def close(self) -> None:
        self._ended.set()
        self._thread.join()

    def __enter__(self) -> "BlackHole":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self) -> None:
        """One thread for all connections; each end knows where its bytes go."""
        waiting = selectors.DefaultSelector()
        waiting.register(self._listener, selectors.EVENT_READ)
        others: dict[socket.socket, socket.socket | None] = {}
        while not self._ended.is_set():
            for key, _ in waiting.select(timeout=0.02):
                end = key.fileobj
                assert isinstance(end, socket.socket)
                if end is self._listener:
                    self._accept(waiting, others)
                elif not self._forward(end, others[end]):
                    for closed in (end, others.pop(end)):
                        if closed is not None:
                            waiting.unregister(closed)
                            closed.close()
                            others.pop(closed, None)
        for end in (*others, self._listener):
            end.close()
        waiting.close()

    def _accept(
        self,
        waiting: selectors.DefaultSelector,
        others: dict[socket.socket, socket.socket | None],
    ) -> None:
        client, _ = self._listener.accept()
        self.accepted += 1
        server = None
        if self._target is not None:
            try:
                server = socket.create_connection(self._target)
            except ConnectionRefusedError:  # it does not listen yet: so its client is told
                client.close()
                return
        others[client] = server
        if server is not None:
            others[server] = client
        for end in (client, server):
            if end is not None:
                waiting.register(end, selectors.EVENT_READ)

    def _forward(self, end: socket.socket, other: socket.socket | None) -> bool:
        """False once this end is closed. What closes after the hole has opened is not told on."""
        data = b""
        with contextlib.suppress(ConnectionError):
            data = end.recv(65536)
        if self._swallows.is_set() or other is None:
            return bool(data)
        with contextlib.suppress(ConnectionError):
            other.sendall(data)
        return bool(data)
