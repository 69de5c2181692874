"""Keys, shared budgets and usage of whole gateways, on SQLite and PostgreSQL."""

import json
import re
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import scalellm
from scalellm._core import accounts_request

from .postgres import Postgres
from .served import own_environment
from .supervised import until

ROOT = Path(__file__).parent.parent.parent
MODEL = Path(scalellm.__file__).parent / "demo" / "model"
_INTERVAL_S = 0.2  # of usage
_TBT_MS = 5.0


class Gateways:
    """Gateways on one database, before one fake engine."""

    def __init__(self, folder: Path, database_url: str, count: int) -> None:
        self._folder, self._database_url = folder, database_url
        self._socket = f"unix:{folder / 'engine.sock'}"
        settings = {"vocab_size": 2048, "max_model_len": 4096, "ttft_ms": 1.0, "tbt_ms": _TBT_MS}
        code = "import sys; from scalellm._core import run_fake_engine as run; run(*sys.argv[1:])"
        command = [sys.executable, "-c", code, self._socket, json.dumps(settings)]
        self._engine = subprocess.Popen(command, env=own_environment())
        self.processes: list[subprocess.Popen[bytes]] = []
        self.urls = [self._start(number) for number in range(count)]

    def _start(self, number: int) -> str:
        file, errors = self._folder / f"{number}.toml", self._folder / f"{number}.log"
        file.write_text(
            f"port = 0\ndatabase_url = {json.dumps(self._database_url)}\n"
            f"usage_interval_s = {_INTERVAL_S}\ndatabase_timeout_s = 30.0\n"
            f'[[models]]\nname = "demo"\npath = {json.dumps(str(MODEL))}\n'
            f"replicas = [{json.dumps(self._socket)}]\n",
            encoding="utf-8",
        )
        with errors.open("wb") as log:
            command = [sys.executable, "-m", "scalellm", "gateway", "--config", str(file)]
            self.processes.append(subprocess.Popen(command, stderr=log, env=own_environment()))
        found: list[str] = []

        def ready() -> bool:
            text = errors.read_text(encoding="utf-8", errors="replace")
            found.extend(re.findall(r"127\.0\.0\.1:\d+", text)[:1])
            return bool(found) and _status(f"http://{found[0]}/ready") == 200

        until(ready)
        return f"http://{found[0]}"

    def close(self) -> None:
        for process in (*self.processes, self._engine):
            process.kill()
            process.wait()


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


@pytest.fixture(scope="module")
def server() -> Iterator[Postgres]:
    postgres = Postgres()
    yield postgres
    postgres.close()


@pytest.fixture
def close_all() -> Iterator[list[Gateways]]:
    running: list[Gateways] = []
    yield running
    for gateways in running:
        gateways.close()


@pytest.mark.needs("postgres")
def test_the_crate_passes_its_tests_on_postgres(server: Postgres) -> None:
    done = subprocess.run(
        ["cargo", "test", "--quiet", "-p", "scalellm-accounts", "--test", "database"],
        cwd=ROOT,
        env=own_environment() | {"SCALELLM_TEST_POSTGRES": server.url},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.needs("postgres")
def test_two_gateways_and_one_budget(
    server: Postgres, tmp_path: Path, close_all: list[Gateways]
) -> None:
    url = f"{server.url}/postgres"
    limit, tokens = 6400, 23  # three of prompt, twenty of output
    key_id, secret = new_key(url, tokens_per_day=limit)
    gateways = Gateways(tmp_path, url, 2)
    close_all.append(gateways)

    def client(number: int) -> int:
        served = 0
        while True:
            status, _ = ask(gateways.urls[number % 2], secret, max_tokens=20)
            if status != 200:
                assert status == 429
                return served
            served += tokens

    with ThreadPoolExecutor(8) as pool:
        total = sum(pool.map(client, range(8)))
    slices = 2 * (limit // 64)
    # Less: what the other gateway leases when one is refused, what running requests reserved.
    assert limit - slices - 8 * tokens <= total <= limit + slices
    until(lambda: used(url, key_id)["prompt_tokens"] + used(url, key_id)["output_tokens"] == total)


@pytest.mark.parametrize(
    "kind", ["sqlite", pytest.param("postgres", marks=pytest.mark.needs("postgres"))]
)
def test_a_killed_gateway_loses_no_more_than_its_interval(
    kind: str, tmp_path: Path, close_all: list[Gateways], request: pytest.FixtureRequest
) -> None:
    if kind == "sqlite":
        url = f"sqlite:{tmp_path / 'accounts.db'}"
    else:
        url = request.getfixturevalue("server").url + "/postgres"
    key_id, secret = new_key(url)
    gateways = Gateways(tmp_path, url, 1)
    close_all.append(gateways)
    ended = threading.Event()
    received = [0] * 8

    def client(number: int) -> None:
        # Every second one streams without end, the others ask again and again.
        while not ended.is_set():
            stream = number % 2 == 0
            size = 4000 if stream else 10
            _, tokens = ask(
                gateways.urls[0], secret, max_tokens=size, stream=stream, return_token_ids=True
            )
            received[number] += tokens

    threads = [threading.Thread(target=client, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    until(lambda: used(url, key_id)["output_tokens"] > 3000)
    gateways.processes[0].send_signal(signal.SIGKILL)
    ended.set()
    for thread in threads:
        thread.join()
    written = used(url, key_id)["output_tokens"]
    # A second of eight clients, far more than the interval and a write.
    window = 8 * 1e3 / _TBT_MS
    # More: a few frames that were counted and not delivered any more.
    assert sum(received) - window <= written <= sum(received) + window / 4
