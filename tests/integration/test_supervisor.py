"""The process tree of `serve`: what dies, what is restarted, what is drained, in which order."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from .supervised import DEADLINE_S, ENGINE, Tree, alive, children, descendants, kill, until

FAILS_AT_START = """
import sys
print("cannot load: no such architecture", file=sys.stderr)
sys.exit(2)
"""
CRASHES_WHEN_READY = """
import os, sys
status = int(sys.argv[sys.argv.index("--status-fd") + 1])
os.write(status, b'{"ready": true}\\n')
os._exit(3)
"""
IGNORES_SIGTERM = ENGINE.replace(
    "signal.signal(signal.SIGTERM, stop)", "signal.signal(signal.SIGTERM, signal.SIG_IGN)"
)


@pytest.fixture
def tree(tmp_path: Path) -> Iterator[Callable[..., Tree]]:
    made: list[Tree] = []

    def make(**settings: Any) -> Tree:
        made.append(Tree(tmp_path, **settings))
        return made[-1]

    yield make
    for found in made:
        found.close()


def test_prints_phases_and_one_ready_line(tree: Callable[..., Tree]) -> None:
    made = tree()
    line = made.wait_ready()
    assert line.startswith(f"ready http://127.0.0.1:{made.port} model=stand-in replicas=1 ")
    assert "dtype=float32" in line
    assert "engine-0 load weights" in made.errors()


def test_sigkill_of_the_root_leaves_nothing(tree: Callable[..., Tree]) -> None:
    made = tree(engines={"engine-0": ENGINE, "engine-1": ENGINE})
    made.wait_ready()
    pids = descendants(made.process.pid)
    grandchildren = [made.pids(name)[0][1] for name in ("engine-0", "engine-1")]
    assert len(pids) >= 7  # watchdog, gateway, controller, two engines, each with a child
    assert set(grandchildren) <= set(pids)
    kill(made.process.pid)
    until(lambda: not any(alive(pid) for pid in pids))
    assert not (made.folder / "runtime").exists()


def test_sigkill_of_root_and_watchdog_together_leaves_no_child(tree: Callable[..., Tree]) -> None:
    made = tree()
    made.wait_ready()
    direct = children(made.process.pid)
    grandchild = made.pids("engine-0")[0][1]
    (watchdog,) = [pid for pid in direct if os.getpgid(pid) == pid and is_fork(pid, made)]
    os.kill(made.process.pid, signal.SIGSTOP)  # so that it cannot make another watchdog
    kill(watchdog)
    kill(made.process.pid)
    until(lambda: not any(alive(pid) for pid in direct))
    kill(grandchild)  # what only the watchdog would have ended


def is_fork(pid: int, made: Tree) -> bool:
    """Whether a process runs the root's own command line."""
    return (
        Path(f"/proc/{pid}/cmdline").read_bytes()
        == Path(f"/proc/{made.process.pid}/cmdline").read_bytes()
    )


@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP], ids=lambda one: one.name)
def test_a_killed_or_stopped_watchdog_is_replaced(
    tree: Callable[..., Tree], fault: signal.Signals
) -> None:
    made = tree()
    made.wait_ready()
    (watchdog,) = [pid for pid in children(made.process.pid) if is_fork(pid, made)]
    os.kill(watchdog, fault)
    until(
        lambda: any(
            pid != watchdog and alive(pid) and is_fork(pid, made)
            for pid in children(made.process.pid)
        )
    )
    pids = descendants(made.process.pid)
    kill(made.process.pid)
    until(lambda: not any(alive(pid) for pid in pids))


def test_a_killed_engine_is_restarted_and_its_children_are_gone(tree: Callable[..., Tree]) -> None:
    made = tree()
    made.wait_ready()
    first = made.pids("engine-0")[0]
    kill(first[0])
    until(lambda: len(made.pids("engine-0")) == 2)
    until(lambda: "engine-0 is ready again" in made.errors())
    until(lambda: not alive(first[1]))
    assert "engine-0 ended: killed by SIGKILL" in made.errors()
    assert made.process.poll() is None


def test_a_killed_gateway_is_restarted_and_engines_run_on(tree: Callable[..., Tree]) -> None:
    made = tree()
    made.wait_ready()
    kill(made.pids("gateway")[0][0])
    until(lambda: len(made.pids("gateway")) == 2)
    assert len(made.pids("engine-0")) == 1
    assert alive(made.pids("engine-0")[0][0])


def test_a_killed_controller_is_restarted_and_adopts(tree: Callable[..., Tree]) -> None:
    made = tree()
    made.wait_ready()
    engine = made.pids("engine-0")[0][0]
    first = made.controller_pid()
    kill(first)
    until(lambda: has_controller(made) and made.controller_pid() != first)
    assert alive(engine)
    assert len(made.pids("engine-0")) == 1  # adopted, not started again
    kill(engine)
    until(lambda: len(made.pids("engine-0")) == 2)  # and the new one does its work
    assert made.process.poll() is None


def test_a_stopped_controller_is_killed_and_another_adopts(tree: Callable[..., Tree]) -> None:
    made = tree(limits={"hung_after_s": 1.0})
    made.wait_ready()
    first = made.controller_pid()
    os.kill(first, signal.SIGSTOP)
    until(lambda: not alive(first))
    until(lambda: has_controller(made))
    assert "killing the controller: silent for" in made.errors()
    assert len(made.pids("engine-0")) == 1


def has_controller(made: Tree) -> bool:
    try:
        return bool(made.controller_pid())
    except AssertionError:
        return False


def test_a_hung_engine_is_killed_and_restarted(tree: Callable[..., Tree]) -> None:
    made = tree(limits={"hung_after_s": 1.0})
    made.wait_ready()
    engine = made.pids("engine-0")[0][0]
    os.kill(engine, signal.SIGSTOP)
    labels = f'replica="unix:{made.folder}/engine-0.sock"'
    metrics = made.folder / "metrics"
    metrics.write_text(f'scalellm_replica_state{{{labels},state="hung"}} 1\n')
    until(lambda: not alive(engine))
    metrics.write_text(f'scalellm_replica_state{{{labels},state="ready"}} 1\n')
    until(lambda: len(made.pids("engine-0")) == 2)
    assert made.errors().count("killing engine-0: no sign of life for") == 1
    time.sleep(3)  # longer than the limit: the new process is not blamed for the old one's silence
    assert len(made.pids("engine-0")) == 2


def test_an_engine_that_keeps_crashing_is_given_up_with_the_reason(
    tree: Callable[..., Tree],
) -> None:
    made = tree(
        engines={"engine-0": CRASHES_WHEN_READY},
        limits={"backoff_min_s": 0.01, "backoff_max_s": 0.02},
    )
    assert made.process.wait(DEADLINE_S) == 1
    assert "engine-0 ended 5 times in 120 s, the last time exit code 3" in made.errors()


def test_an_engine_that_cannot_start_ends_serve_at_once(tree: Callable[..., Tree]) -> None:
    made = tree(engines={"engine-0": ENGINE, "engine-1": FAILS_AT_START})
    assert made.process.wait(DEADLINE_S) == 1
    assert "cannot load: no such architecture" in made.errors()
    assert "failed: engine-1 could not start (exit code 2)" in made.errors()
    assert made.errors().count("cannot load") == 1  # no restart loop
    until(lambda: not any(alive(pid) for pid in flat(made.pids("engine-0"))))


def test_a_gateway_that_cannot_start_ends_serve_at_once(tree: Callable[..., Tree]) -> None:
    made = tree(gateway=FAILS_AT_START)
    assert made.process.wait(DEADLINE_S) == 1
    assert "failed: the gateway could not start (exit code 2)" in made.errors()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_drains_the_gateway_before_the_engines_stop(tree: Callable[..., Tree], number: int) -> None:
    made = tree(drain_s=0.5)
    made.wait_ready()
    pids = descendants(made.process.pid)
    made.signal(number)
    assert made.process.wait(DEADLINE_S) == 0, made.errors()
    assert made.log()[-3:] == ["gateway draining", "gateway ended", "engine-0 ended"]
    until(lambda: not any(alive(pid) for pid in pids))
    assert not (made.folder / "runtime").exists()


def test_a_hang_up_is_survived_under_nohup(tree: Callable[..., Tree]) -> None:
    made = tree(nohup=True)
    made.wait_ready()
    made.signal(signal.SIGHUP)
    with pytest.raises(subprocess.TimeoutExpired):
        made.process.wait(0.5)
    made.signal(signal.SIGTERM)
    assert made.process.wait(DEADLINE_S) == 0
    assert "SIGTERM: draining" in made.errors() and "SIGHUP" not in made.errors()


def test_a_hang_up_of_the_terminal_drains(tree: Callable[..., Tree]) -> None:
    made = tree()
    made.wait_ready()
    made.signal(signal.SIGHUP)
    assert made.process.wait(DEADLINE_S) == 0
    assert "SIGHUP: draining" in made.errors()


def test_a_second_signal_stops_at_once(tree: Callable[..., Tree]) -> None:
    made = tree(drain_s=1000, drain_timeout_s=1000)
    made.wait_ready()
    pids = descendants(made.process.pid)
    made.signal(signal.SIGTERM)
    until(lambda: "gateway draining" in made.log())
    made.signal(signal.SIGINT)
    assert made.process.wait(DEADLINE_S) == 128 + signal.SIGINT
    assert not any(alive(pid) for pid in pids)
    assert "engine-0 ended" not in made.log()


def test_a_signal_during_the_start_stops(tree: Callable[..., Tree]) -> None:
    never_ready = ENGINE.replace('{"ready": True, "dtype": "float32"}', "{}")
    made = tree(engines={"engine-0": never_ready})
    until(lambda: made.pids("engine-0") and made.pids("gateway"))
    made.signal(signal.SIGTERM)
    assert made.process.wait(DEADLINE_S) == 0, made.errors()
    assert "SIGTERM: stopping" in made.errors() and "draining" not in made.errors()


def test_an_engine_that_ignores_sigterm_is_killed(tree: Callable[..., Tree]) -> None:
    made = tree(engines={"engine-0": IGNORES_SIGTERM})
    made.wait_ready()
    pids = descendants(made.process.pid)
    made.signal(signal.SIGTERM)
    assert made.process.wait(DEADLINE_S) == 1
    assert not any(alive(pid) for pid in pids)


def test_ctrl_c_in_the_terminal_reaches_only_the_root(tree: Callable[..., Tree]) -> None:
    made = tree(drain_s=0.3)
    made.wait_ready()
    groups = {os.getpgid(pid) for pid in descendants(made.process.pid)}
    assert os.getpgid(made.process.pid) not in groups
    os.killpg(made.process.pid, signal.SIGINT)  # what a terminal does
    assert made.process.wait(DEADLINE_S) == 0
    assert "engine-0 ended" in made.log()


def test_the_root_stays_small(tree: Callable[..., Tree]) -> None:
    made = tree()
    made.wait_ready()
    status = Path(f"/proc/{made.process.pid}/status").read_text()
    resident_kb = int(status.split("VmRSS:")[1].split()[0])
    assert resident_kb < 40_000
    maps = Path(f"/proc/{made.process.pid}/maps").read_text()
    assert "torch" not in maps


def flat(lists: list[list[int]]) -> list[int]:
    return [entry for one in lists for entry in one]
