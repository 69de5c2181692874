"""Keys, shared budgets and usage of whole gateways, on SQLite and PostgreSQL."""

import signal
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from .gateways import TBT_MS, Gateways, ask, new_key, used
from .postgres import Postgres
from .served import own_environment
from .supervised import until

ROOT = Path(__file__).parent.parent.parent


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
    window = 8 * 1e3 / TBT_MS
    # More: a few frames that were counted and not delivered any more.
    assert sum(received) - window <= written <= sum(received) + window / 4
