"""A database that goes away and comes back, and a disk that is full, under gateways that serve."""

import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from scalellm.controller.gateway_view import get, parse_metrics

from .gateways import Gateways, ask, new_key, used
from .postgres import Postgres
from .supervised import until

TOKENS = 13  # three of prompt, ten of output


@pytest.fixture(scope="module")
def server() -> Iterator[Postgres]:
    postgres = Postgres()
    yield postgres
    postgres.close()


def metric(url: str, name: str) -> float:
    answer = get(url, "/metrics")
    assert answer is not None
    return sum(s.value for s in parse_metrics(answer.body) if s.name == f"scalellm_{name}")


def served(url: str, secret: str) -> bool:
    status, _ = ask(url, secret, max_tokens=10)
    assert status in (200, 503), status
    return status == 200


@pytest.mark.needs("postgres")
@pytest.mark.parametrize("when_down", ["open", "closed"])
def test_a_database_that_goes_away_and_comes_back(
    server: Postgres, tmp_path: Path, when_down: str
) -> None:
    url = f"{server.url}/postgres"
    # A slice is 200 tokens: some fifteen requests.
    key_id, secret = new_key(url, tokens_per_day=64 * 200)
    _, unseen = new_key(url)
    settings = f'database_down = "{when_down}"\ndatabase_timeout_s = 1.0'
    gateways = Gateways(tmp_path, url, 1, settings)
    (gateway,) = gateways.urls
    try:
        assert served(gateway, secret)
        server.stop()
        try:
            until(lambda: metric(gateway, "accounts_database_up") == 0)
            assert not served(gateway, unseen)
            answers = [served(gateway, secret) for _ in range(40)]
            # Open, the requests go on; closed, until what was leased is spent.
            assert all(answers) if when_down == "open" else not all(answers)
        finally:
            server.start()
        until(lambda: served(gateway, secret))
        requests = 2 + sum(answers)
        until(lambda: metric(gateway, "usage_waiting") == 0)
        until(lambda: used(url, key_id)["requests"] >= requests)
        row = used(url, key_id)
        assert row["prompt_tokens"] + row["output_tokens"] == TOKENS * (
            row["requests"] - row["failed"]
        )
        assert metric(gateway, "usage_lost_total") == 0
        assert served(gateway, unseen)
    finally:
        gateways.close()


def test_a_full_disk_holds_usage_up_and_loses_none(tmp_path: Path) -> None:
    """Its files may not grow any more: to SQLite, and to its log, the disk is full."""
    url = f"sqlite:{tmp_path / 'accounts.db'}"
    key_id, secret = new_key(url)
    gateways = Gateways(tmp_path, url, 1, "database_timeout_s = 2.0")
    (gateway,) = gateways.urls
    pid = gateways.processes[0].pid
    try:
        assert served(gateway, secret)
        until(lambda: used(url, key_id)["requests"] == 1)
        _, most = resource.prlimit(pid, resource.RLIMIT_FSIZE)
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (4096, most))
        answers = [served(gateway, secret) for _ in range(50)]
        assert all(answers)
        until(lambda: metric(gateway, "accounts_database_up") == 0)
        assert metric(gateway, "usage_waiting") > 0
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (most, most))
        until(lambda: metric(gateway, "usage_waiting") == 0)
        until(lambda: metric(gateway, "accounts_database_up") == 1)
        assert used(url, key_id)["requests"] == 51
        assert metric(gateway, "usage_lost_total") == 0
    finally:
        gateways.close()
