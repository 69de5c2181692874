"""Gateways of their own on one database, before a fake engine, and a client of theirs."""

import json
import re
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import scalellm
from scalellm._core import accounts_request

from .served import own_environment
from .supervised import until

MODEL = Path(scalellm.__file__).parent / "demo" / "model"
TBT_MS = 5.0
_INTERVAL_S = 0.2  # of usage


class Engine:
    """A fake engine at an address."""

    def __init__(self, address: str, **settings: Any) -> None:
        usual = {"vocab_size": 2048, "max_model_len": 4096, "ttft_ms": 1.0, "tbt_ms": TBT_MS}
        code = "import sys; from scalellm._core import run_fake_engine as run; run(*sys.argv[1:])"
        command = [sys.executable, "-c", code, address, json.dumps(usual | settings)]
        self._process = subprocess.Popen(command, env=own_environment())

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


class Gateway:
    """A gateway on a free port; `settings` are the lines of its file."""

    def __init__(self, folder: Path, settings: str, number: int = 0) -> None:
        file, errors = folder / f"{number}.toml", folder / f"{number}.log"
        file.write_text(f"port = 0\n{settings}", encoding="utf-8")
        with errors.open("wb") as log:
            command = [sys.executable, "-m", "scalellm", "gateway", "--config", str(file)]
            self.process = subprocess.Popen(command, stderr=log, env=own_environment())
        found: list[str] = []

        def ready() -> bool:
            text = errors.read_text(encoding="utf-8", errors="replace")
            found.extend(re.findall(r"address=127\.0\.0\.1:(\d+)", text)[:1])
            return bool(found) and _status(f"http://127.0.0.1:{found[0]}/ready") == 200

        until(ready)
        self.url = f"http://127.0.0.1:{found[0]}"

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


class Gateways:
    """Gateways on one database, before one fake engine; `settings` are more of their lines."""

    def __init__(
        self,
        folder: Path,
        database_url: str,
        count: int,
        settings: str = "database_timeout_s = 30.0",
    ) -> None:
        socket = f"unix:{folder / 'engine.sock'}"
        self._engine = Engine(socket)
        lines = (
            f"database_url = {json.dumps(database_url)}\nusage_interval_s = {_INTERVAL_S}\n"
            f'{settings}\n[[models]]\nname = "demo"\npath = {json.dumps(str(MODEL))}\n'
            f"replicas = [{json.dumps(socket)}]\n"
        )
        self._gateways = [Gateway(folder, lines, number) for number in range(count)]
        self.urls = [gateway.url for gateway in self._gateways]
        self.processes = [gateway.process for gateway in self._gateways]

    def close(self) -> None:
        for gateway in self._gateways:
            gateway.close()
        self._engine.close()


def _status(url: str) -> int:
    try:
        with urllib.request.urlopen(url, timeout=30) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


def ask(url: str, secret: str, **fields: Any) -> tuple[int, int]:
    """Status and output tokens of one completion, streamed or not."""
    body = {"model": "demo", "prompt": [1, 2, 3], "ignore_eos": True} | fields
    headers = {"Authorization": f"Bearer {secret}", "Content-Type": "application/json"}
    request = urllib.request.Request(url + "/v1/completions", json.dumps(body).encode(), headers)
    tokens = 0
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            if not body.get("stream"):
                return 200, int(json.loads(response.read())["usage"]["completion_tokens"])
            for line in response:
                if line.startswith(b"data: {"):
                    event = json.loads(line[6:])
                    tokens += sum(len(c.get("token_ids") or ()) for c in event["choices"])
            return 200, tokens
    except urllib.error.HTTPError as error:
        return error.code, tokens
    except (OSError, ValueError, urllib.error.URLError):
        return 0, tokens


def database(url: str, **request: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(accounts_request(url, json.dumps(request)))
    return found


def new_key(url: str, **limits: int) -> tuple[str, str]:
    made = database(url, do="create_key", key={"limits": limits})
    return made["id"], made["secret"]


def used(url: str, key_id: str) -> dict[str, int]:
    sums = database(url, do="usage", query={"key": key_id})
    row: dict[str, int] = sums["data"][0]
    return row
