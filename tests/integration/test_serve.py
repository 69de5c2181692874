"""`scalellm serve` with the demo model: start, faults and drain of the real process tree."""

import json
import signal
import subprocess
import sys
import urllib.error
from collections.abc import Iterator
from pathlib import Path

import pytest

from .served import START_S, Serve
from .supervised import alive, children, command_line, descendants, kill, until

LONG = 1500  # tokens; long enough to be under way whenever a fault comes


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    made = Serve(tmp_path, "--drain-timeout", "120")
    yield made
    made.close()


def test_faults_heal_and_a_drain_loses_nothing(serve: Serve) -> None:
    """One tree for all of it: a start takes seconds."""
    says_what_is_taken(serve)
    continues_streams_of_a_killed_engine(serve)
    survives_a_stopped_controller(serve)
    drains(serve)


def says_what_is_taken(serve: Serve) -> None:
    port = serve.url.rpartition(":")[2]
    done = subprocess.run(
        [sys.executable, "-m", "scalellm", "serve", "--port", port],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr == (
        f"scalellm serve: port {port} of 127.0.0.1 is taken; "
        "stop what listens there or use --port\n"
    )


def continues_streams_of_a_killed_engine(serve: Serve) -> None:
    engine = serve.engine_pid()
    with serve.post({"stream": True, "max_tokens": LONG}) as stream:
        assert stream.readline().startswith(b"data: ")
        kill(engine)
        rest = stream.read().decode()
    events = [line.removeprefix("data: ") for line in rest.splitlines() if line]
    assert events.pop() == "[DONE]"
    assert json.loads(events[-1])["choices"][0]["finish_reason"] == "length"
    until(serve.works, START_S)
    assert serve.engine_pid() not in (0, engine)


def survives_a_stopped_controller(serve: Serve) -> None:
    (controller,) = [
        p for p in children(serve.process.pid) if b"scalellm.controller" in command_line(p)
    ]
    engine = serve.engine_pid()
    kill(controller)
    assert serve.complete()["usage"]["completion_tokens"] == 4
    assert serve.engine_pid() == engine


def drains(serve: Serve) -> None:
    pids = descendants(serve.process.pid)
    with serve.post({"stream": True, "max_tokens": 300}) as stream:
        assert stream.readline().startswith(b"data: ")
        serve.process.send_signal(signal.SIGTERM)
        until(lambda: refused(serve))
        rest = stream.read().decode()
    assert '"finish_reason":"length"' in rest
    assert rest.rstrip().endswith("data: [DONE]")
    assert serve.process.wait(60) == 0, serve.errors()
    assert not any(alive(pid) for pid in pids)
    assert list(serve.runtime.iterdir()) == []


def refused(serve: Serve) -> bool:
    """Whether new requests are turned away: by 503, or because nobody listens any more."""
    try:
        serve.complete()
    except urllib.error.HTTPError as error:
        return error.code == 503
    except (ConnectionError, urllib.error.URLError):
        return True
    return False


def test_an_engines_own_complaint_is_shown(tmp_path: Path) -> None:
    """Beyond what can be checked beforehand: the weights do not fit the configuration."""
    from scalellm.demo import model_folder

    for file in model_folder().iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config["intermediate_size"] *= 2
    (tmp_path / "config.json").write_text(json.dumps(config))
    done = subprocess.run(
        [sys.executable, "-m", "scalellm", "serve", str(tmp_path), "--port", "0"],
        capture_output=True,
        text=True,
        timeout=START_S,
        check=False,
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert "scalellm engine: " in done.stderr
    assert done.stderr.rstrip().endswith("scalellm serve: engine-0 could not start (exit code 1)")
    assert "Traceback" not in done.stderr


def test_an_engine_that_loses_a_rank_is_replaced(tmp_path: Path) -> None:
    serve = Serve(tmp_path, "--tensor-parallel-size", "2", "--cpu-threads", "2")
    try:
        assert serve.works()
        engine = serve.engine_pid()
        [rank] = children(engine)
        kill(rank)
        until(lambda: not alive(engine))
        until(lambda: serve.engine_pid() and serve.works(), START_S)
    finally:
        serve.close()
