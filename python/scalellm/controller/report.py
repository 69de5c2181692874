"""What the root tells its user: phases of the start, events, and the one line that says ready."""

import json
import sys
import time
from collections.abc import Mapping
from typing import Any


class Report:
    """Writes phases and events to standard error, the ready line to standard output."""

    def __init__(self, log_format: str = "text") -> None:
        self._json = log_format == "json"
        self._started_s = time.monotonic()

    def elapsed_s(self) -> float:
        return time.monotonic() - self._started_s

    def phase(self, name: str, seconds: float, detail: str = "") -> None:
        """One finished step of the start and how long it took."""
        self._write(
            {"phase": name, "seconds": round(seconds, 3), "detail": detail},
            f"  {seconds:8.2f} s  {name}" + (f": {detail}" if detail else ""),
        )

    def event(self, text: str) -> None:
        self._write({"event": text}, f"scalellm: {text}")

    def ready(self, url: str, facts: Mapping[str, Any]) -> None:
        """`ready http://127.0.0.1:8000 model=demo ...`"""
        pairs = " ".join(f"{name}={value}" for name, value in facts.items())
        sys.stdout.write(f"ready {url} {pairs} after={self.elapsed_s():.1f}s\n")
        sys.stdout.flush()

    def _write(self, fields: dict[str, Any], text: str) -> None:
        line = json.dumps({"time": round(time.time(), 3)} | fields) if self._json else text
        sys.stderr.write(line + "\n")
        sys.stderr.flush()
