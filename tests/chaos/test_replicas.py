"""Replicas that are killed and stopped at random under many streams, none of which may show it.

SCALELLM_CHAOS_S is how long they are killed (16 s); two minutes make a thorough run. What happened
is told with `--log-cli-level=info`.
"""

import logging
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from ..e2e.wire import call, is_at_rest, load
from ..integration.served import START_S, Serve
from ..integration.supervised import children, command_line, kill, until
from .workload import Answer, ask, requests

logger = logging.getLogger(__name__)

CHAOS_S = float(os.environ.get("SCALELLM_CHAOS_S", "16"))
STREAMS = 64
# The controller gives a replica up that ends five times within two minutes.
KILLS_OF_ONE, WITHIN_S = 4, 120.0


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serve]:
    made = Serve(tmp_path_factory.mktemp("serve"), "--replicas", "2", "--kv-cache-memory", "128MiB")
    yield made
    made.close()


@pytest.fixture(scope="module")
def undisturbed(pair: Serve) -> list[Answer]:
    """The answer of every request of the workload, while nothing happens."""
    answers = []
    for body in requests():
        answer, replays = ask(pair.url, body)
        assert replays == 0
        answers.append(answer)
    return answers


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


@dataclass
class Crowd:
    """Clients that ask one request after the other until told to leave."""

    url: str
    expected: list[Answer]
    leave: threading.Event = field(default_factory=threading.Event)
    finished: int = 0
    replays: int = 0
    wrong: list[str] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _threads: list[threading.Thread] = field(default_factory=list)

    def __enter__(self) -> "Crowd":
        for number in range(STREAMS):
            thread = threading.Thread(target=self._client, args=(number,), daemon=True)
            thread.start()
            self._threads.append(thread)
        return self

    def __exit__(self, *_: object) -> None:
        self.leave.set()
        for thread in self._threads:
            thread.join(START_S)
            assert not thread.is_alive(), "a client still waits for its answer"

    def _client(self, number: int) -> None:
        workload = requests()
        while not self.leave.is_set():
            which = number % len(workload)
            number += 1
            problem, replays = "", 0
            try:
                answer, replays = ask(self.url, workload[which])
                if answer != self.expected[which]:
                    problem = f"{workload[which]}: {_difference(answer, self.expected[which])}"
            except Exception as error:
                problem = f"{workload[which]}: {type(error).__name__}: {error}"
            with self._lock:
                self.finished += 1
                self.replays += replays
                if problem:
                    self.wrong.append(problem)


def _difference(got: Answer, expected: Answer) -> str:
    for index, choice in expected.choices.items():
        other = got.choices.get(index)
        if other != choice:
            return f"choice {index} is {other}, not {choice}"
    return f"{got} is not {expected}"


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
