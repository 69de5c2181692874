"""A running `scalellm serve`, with the whole process tree under it."""

import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from .supervised import alive, children, command_line, descendants, until

START_S = 120.0


def own_environment() -> dict[str, str]:
    """The environment without settings of ScaleLLM that the machine may have."""
    return {k: v for k, v in os.environ.items() if not k.startswith("SCALELLM_")}


class Serve:
    """One running `scalellm serve`."""

    def __init__(self, folder: Path, *arguments: str, model: str | None = "demo") -> None:
        self.runtime = folder / "runtime"
        self.runtime.mkdir()
        self._errors = (folder / "stderr").open("w+b")
        named = [] if model is None else [model]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "scalellm", "serve", *named, "--port", "0", *arguments],
            stdout=subprocess.PIPE,
            stderr=self._errors,
            start_new_session=True,
            env=own_environment() | {"XDG_RUNTIME_DIR": str(self.runtime)},
        )
        assert self.process.stdout is not None
        self.line = self.process.stdout.readline().decode()
        assert self.line.startswith("ready "), self.errors()
        self.url = self.line.split()[1]

    def errors(self) -> str:
        self._errors.seek(0)
        return self._errors.read().decode()

    def engine_pid(self) -> int:
        """The running engine's pid, 0 while there is none."""
        found = [p for p in children(self.process.pid) if b"\0engine\0" in command_line(p)]
        return found[0] if found else 0

    def complete(self, max_tokens: int = 4) -> dict[str, Any]:
        """One answer; raises HTTPError."""
        with self.post({"max_tokens": max_tokens}) as response:
            answer: dict[str, Any] = json.loads(response.read())
            return answer

    def works(self) -> bool:
        try:
            return bool(self.complete())
        except (urllib.error.HTTPError, ConnectionError, urllib.error.URLError):
            return False

    def post(self, fields: dict[str, Any]) -> Any:
        body = {"model": "demo", "prompt": "Once", "ignore_eos": True} | fields
        request = urllib.request.Request(
            self.url + "/v1/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        return urllib.request.urlopen(request, timeout=START_S)

    def close(self) -> None:
        pids = descendants(self.process.pid)
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(START_S)
        assert self.process.stdout is not None
        self.process.stdout.close()
        self._errors.close()
        until(lambda: not any(alive(pid) for pid in pids))
