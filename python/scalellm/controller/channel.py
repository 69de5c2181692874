"""JSON objects, one a line, over a stream socket or a pipe: how the tree's processes talk."""

import json
import os
from typing import Any

MAX_LINE_BYTES = 1 << 20
_READ_BYTES = 1 << 16


class Lines:
    """Collects what a non-blocking descriptor delivers into whole JSON objects."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self._rest = b""
        self.closed = False

    def read(self) -> list[dict[str, Any]]:
        """All objects that have arrived; sets `closed` at the end of the stream.

        Lines that are no JSON object, or longer than MAX_LINE_BYTES, are dropped.
        """
        while not self.closed:
            try:
                piece = os.read(self.descriptor, _READ_BYTES)
            except BlockingIOError:
                break
            except OSError:
                piece = b""
            self.closed = not piece
            self._rest += piece
            if len(self._rest) > MAX_LINE_BYTES:
                break
        *lines, rest = self._rest.split(b"\n")
        self._rest = rest if len(rest) <= MAX_LINE_BYTES else b""
        return [found for line in lines if isinstance(found := _parse(line), dict)]


def _parse(line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None


def encode(message: dict[str, Any]) -> bytes:
    return json.dumps(message, separators=(",", ":")).encode() + b"\n"
