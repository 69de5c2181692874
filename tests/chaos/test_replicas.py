"""Replicas that are killed and stopped at random under many streams, none of which may show it.

SCALELLM_CHAOS_S is how long they are killed (16 s); two minutes make a thorough run. What happened
is told with `--log-cli-level=info`.
"""

import logging
import os
import random
import signal
import time
from collections.abc import Iterator

import pytest

from ..e2e.wire import call, is_at_rest, load
from ..integration.served import START_S, Serve
from ..integration.supervised import children, command_line, kill, until
from .crowd import Crowd
from .workload import Answer, undisturbed_answers

logger = logging.getLogger(__name__)

CHAOS_S = float(os.environ.get("SCALELLM_CHAOS_S", "16"))
# The controller gives a replica up that ends five times within two minutes.
KILLS_OF_ONE, WITHIN_S = 4, 120.0


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serve]:
    made = Serve(tmp_path_factory.mktemp("serve"), "--replicas", "2", "--kv-cache-memory", "128MiB")
    yield made
    made.close()


@pytest.fixture(scope="module")
def undisturbed(pair: Serve) -> list[Answer]:
    return undisturbed_answers(pair.url)


def engines(serve: Serve) -> dict[bytes, int]:
    """Pids of the running engines, by their listening address."""
    found = {}
    for pid in children(serve.process.pid):
        line = command_line(pid).split(b"\0")
        if b"engine" in line and b"--listen" in line:
            found[line[line.index(b"--listen") + 1]] = pid
    return found


def both_ready(serve: Serve) -> bool:
    return call(serve.url, "/metrics").body.decode().count('state="ready"} 1') == 2


class Killer:
    """Kills one of two replicas at random, when the other can take over what it had."""

    def __init__(self, serve: Serve, seed: int) -> None:
        self._serve = serve
        self._random = random.Random(seed)
        self.kills: list[tuple[float, bytes]] = []

    def run(self, seconds: float) -> None:
        began_s = time.monotonic()
        mean_s = max(WITHIN_S / (2 * KILLS_OF_ONE) if seconds > WITHIN_S / 2 else 0.0, 4.0)
        while time.monotonic() - began_s < seconds:
            time.sleep(self._random.uniform(0.2, 1.8) * mean_s / 2)
            until(lambda: both_ready(self._serve), START_S)
            allowed = [name for name in sorted(engines(self._serve)) if self._may_kill(name)]
            if allowed:
                name = self._random.choice(allowed)
                self.kills.append((time.monotonic(), name))
                kill(engines(self._serve)[name])
        until(lambda: both_ready(self._serve), START_S)

    def _may_kill(self, name: bytes) -> bool:
        now = time.monotonic()
        lately = [at for at, killed in self.kills if killed == name and now - at < WITHIN_S]
        return len(lately) < KILLS_OF_ONE


def test_streams_outlive_replicas_that_are_killed_at_random(
    pair: Serve, undisturbed: list[Answer]
) -> None:
    killer = Killer(pair, seed=1)
    with Crowd(pair.url, undisturbed) as crowd:
        killer.run(CHAOS_S)
    kills, finished, replays = len(killer.kills), crowd.finished, crowd.replays
    logger.info("%d kills, %d answers, %d replays", kills, finished, replays)
    assert not crowd.wrong, crowd.wrong[0]
    assert killer.kills and crowd.replays > 0
    found = load(pair.url)
    assert found["replays_total"] == crowd.replays
    assert found["replays_waiting"] == 0 and found.get("replays_failed_total", 0) == 0
    until(lambda: is_at_rest(pair.url))


def test_streams_outlive_replicas_that_stand_still_for_a_while(
    pair: Serve, undisturbed: list[Answer]
) -> None:
    """What a stopped replica had sent, and sends when it goes on, is nobody's any more."""
    until(lambda: both_ready(pair), START_S)
    with Crowd(pair.url, undisturbed) as crowd:
        for _ in range(2):
            pid = random.Random(2).choice(list(engines(pair).values()))
            os.kill(pid, signal.SIGSTOP)
            try:
                # Until the gateway has given it up, and a moment with its streams elsewhere.
                until(lambda: not both_ready(pair), START_S)
                time.sleep(0.5)
            finally:
                os.kill(pid, signal.SIGCONT)
            until(lambda: both_ready(pair), START_S)
    assert not crowd.wrong, crowd.wrong[0]
    assert crowd.replays > 0
    until(lambda: is_at_rest(pair.url))
