"""Any process of the tree is killed, stopped or slowed at random under load, and all heals.

SCALELLM_CHAOS_S is for how long (16 s); five minutes make a thorough run. SCALELLM_CHAOS_SEED (1)
says in which order. A request completes with the answer that it would have had, or its connection
breaks because the gateway was what ended, or it ends with one error that says why. What happened
is told with `--log-cli-level=info`.
"""

import contextlib
import http.client
import json
import logging
import os
import random
import signal
import time
from collections.abc import Callable, Iterator

import pytest

from ..e2e.wire import call, is_at_rest
from ..integration.served import START_S, Serve
from ..integration.supervised import alive, children, command_line, descendants, until
from .crowd import Crowd
from .shapes import WIDE, serve_two_shapes, state, switch
from .workload import undisturbed_answers

logger = logging.getLogger(__name__)

CHAOS_S = float(os.environ.get("SCALELLM_CHAOS_S", "16"))
SEED = int(os.environ.get("SCALELLM_CHAOS_SEED", "1"))
STREAMS = 16
# What keeps ending is given up, five times within one minute or two.
FAULTS_OF_ONE, WITHIN_S = 3, 120.0
SLOW_S, SLICE_S = 3.0, 0.05
HEALED_S = 120.0
CLEAR = ("engine_lost", "replica_deaths", "prompt_refused", "no_replica")


@pytest.fixture
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serve]:
    made = serve_two_shapes(
        tmp_path_factory.mktemp("serve"), "--hung-after-s", "2", "--objective", "latency"
    )
    yield made
    made.close()


def processes(serve: Serve) -> dict[str, int]:
    """One process of each kind, by its name."""
    found = {"root": serve.process.pid}
    for pid in children(serve.process.pid):
        line = command_line(pid)
        if b"\0gateway\0" in line:
            found["gateway"] = pid
        elif b"\0scalellm.controller\0" in line:
            found["controller"] = pid
        elif b"\0engine\0" in line:
            found["engine"] = pid
        else:
            found["watchdog"] = pid  # a fork of the root
    for pid in descendants(serve.process.pid):
        if b"scalellm.executor.rank" in command_line(pid):
            found["rank"] = pid
    return found


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


def stop(pid: int) -> None:
    os.kill(pid, signal.SIGSTOP)


def slow(pid: int) -> None:
    """It has half of the time for a while."""
    until_s = time.monotonic() + SLOW_S
    with contextlib.suppress(ProcessLookupError):
        while time.monotonic() < until_s:
            os.kill(pid, signal.SIGSTOP)
            time.sleep(SLICE_S)
            os.kill(pid, signal.SIGCONT)
            time.sleep(SLICE_S)


# The root's death ends everything, as it has to; a root that is stopped harms nobody.
FAULTS: dict[str, tuple[Callable[[int], None], ...]] = {
    "root": (slow,),
    "gateway": (kill, stop, slow),
    "controller": (kill, stop, slow),
    "engine": (kill, stop, slow),
    "rank": (kill, stop, slow),
    "watchdog": (kill, stop),
}


class Chaos:
    """Does one thing after the other, each when the last one has healed."""

    def __init__(self, serve: Serve, seed: int) -> None:
        self._serve = serve
        self._random = random.Random(seed)
        self.done: list[tuple[float, str, str]] = []
        self.healed_s: list[float] = []

    def explains(self, error: Exception) -> bool:
        """Whether a request may end so: told once why, or with the gateway's connection."""
        if isinstance(error, AssertionError):  # a status, or an event, that is an error
            text = str(error).replace(" ", "")
            return any(f'"code":"{code}"' in text for code in CLEAR)
        is_broken = isinstance(error, OSError | http.client.HTTPException)
        is_late = isinstance(error, TimeoutError)
        return is_broken and not is_late and any(name == "gateway" for _, name, _ in self.done)

    def run(self, seconds: float) -> None:
        until_s = time.monotonic() + seconds
        todo = [(name, fault) for name, faults in FAULTS.items() for fault in faults]
        self._random.shuffle(todo)
        while time.monotonic() < until_s:
            allowed = [(name, fault) for name, fault in todo if self._may(name)]
            if not allowed:
                time.sleep(1.0)
                continue
            name, fault = allowed[0]
            todo.append(todo.pop(todo.index((name, fault))))
            self._do(name, fault)
            time.sleep(self._random.uniform(0.0, 2.0))

    def _may(self, name: str) -> bool:
        # A rank's end is its engine's.
        same = {"rank", "engine"} if name in ("rank", "engine") else {name}
        now = time.monotonic()
        return sum(now - at < WITHIN_S for at, done, _ in self.done if done in same) < FAULTS_OF_ONE

    def _do(self, name: str, fault: Callable[[int], None]) -> None:
        pid = processes(self._serve)[name]
        self.done.append((time.monotonic(), name, fault.__name__))
        began_s = time.monotonic()
        fault(pid)
        if fault is not slow:
            until(lambda: not alive(pid), HEALED_S)
        until(self._is_whole, HEALED_S)
        self.healed_s.append(time.monotonic() - began_s)
        logger.info("%s %s: whole again after %.1f s", fault.__name__, name, self.healed_s[-1])

    def _is_whole(self) -> bool:
        if set(processes(self._serve)) != set(FAULTS):
            return False
        try:
            if call(self._serve.url, "/ready").status != http.client.OK:
                return False
            return bool(state(self._serve)["phase"] == "steady") and self._serve.works()
        except (OSError, http.client.HTTPException, json.JSONDecodeError):
            return False


@pytest.mark.slow
@pytest.mark.needs("two-cores")
@pytest.mark.timeout(240 + 2 * CHAOS_S)
def test_any_process_may_be_killed_stopped_or_slowed(
    served: Serve, record_property: Callable[[str, object], None]
) -> None:
    # Held: slowed processes have costs that give the policy a reason to move, and there would be no
    # rank to disturb.
    switch(served, WIDE)
    undisturbed = undisturbed_answers(served.url)
    chaos = Chaos(served, SEED)
    with Crowd(served.url, undisturbed, STREAMS, chaos.explains) as crowd:
        chaos.run(CHAOS_S)
    logger.info(
        "%d faults, %d answers, %d replays, %d ended with an error or their connection",
        *(len(chaos.done), crowd.finished, crowd.replays, crowd.forgiven),
    )
    for name, value in (
        ("seconds", CHAOS_S),
        ("streams", STREAMS),
        ("faults", len(chaos.done)),
        ("healed_s", max(chaos.healed_s, default=0.0)),
        ("answers", crowd.finished - crowd.forgiven),
        ("moves", crowd.replays),
        ("told", crowd.forgiven),
        ("wrong", len(crowd.wrong)),
    ):
        record_property(name, value)
    assert not crowd.wrong, crowd.wrong[0]
    assert chaos.done
    assert crowd.finished > crowd.forgiven
    assert served.process.poll() is None, served.errors()
    until(lambda: is_at_rest(served.url), START_S)
