"""The engine loop's end of the link, without a gateway (crates/engine-link/tests has both ends)."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from scalellm import _core

INFO: dict[str, Any] = {
    "model": "test",
    "vocab_size": 100,
    "max_model_len": 1000,
    "max_num_seqs": 4,
    "epoch": 5,
    "eos_token_ids": [1, 2],
}
LOAD = (0, 0, 0, 0, 0, 1.0, 0.5, 0, 0, (0, 0), (0, 0), ((1.0, 0.1, 0.0, 0.2), None))


@pytest.fixture
def listener() -> Iterator[_core.EngineListener]:
    listener = _core.EngineListener("127.0.0.1:0", INFO)
    yield listener
    listener.close()


def test_port_zero_becomes_a_real_port(listener: _core.EngineListener) -> None:
    host, port = listener.address.split(":")
    assert host == "127.0.0.1"
    assert int(port) > 0


def test_poll_waits_for_its_timeout_and_no_longer(listener: _core.EngineListener) -> None:
    start = time.monotonic()
    assert listener.poll(0.25) == []
    assert 0.24 < time.monotonic() - start < 2
    assert listener.poll(0) == []


def test_poll_releases_the_gil(listener: _core.EngineListener) -> None:
    polled = threading.Event()

    def poll() -> None:
        listener.poll(30)
        polled.set()

    thread = threading.Thread(target=poll)
    thread.start()
    assert not polled.wait(0.1)
    listener.drain()
    assert polled.wait(5)
    thread.join()


def test_drain_is_said_once(listener: _core.EngineListener) -> None:
    listener.drain()
    assert listener.poll(5) == [("drain", None)]
    listener.drain()
    assert listener.poll(0) == []


def test_close_ends_a_poll_and_may_be_repeated(listener: _core.EngineListener) -> None:
    timer = threading.Timer(0.1, listener.close)
    timer.start()
    start = time.monotonic()
    assert listener.poll(30) == []
    assert time.monotonic() - start < 5
    timer.join()
    listener.close()


def test_a_taken_address_is_an_os_error(listener: _core.EngineListener, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="in use") as error:
        _core.EngineListener(listener.address, INFO)
    assert error.value.errno == 98
    with pytest.raises(FileNotFoundError):
        _core.EngineListener(f"unix:{tmp_path}/missing/engine.sock", INFO)


def test_a_socket_left_by_a_dead_engine_is_replaced(tmp_path: Path) -> None:
    import socket

    path = tmp_path / "engine.sock"
    dead = socket.socket(socket.AF_UNIX)
    dead.bind(str(path))
    dead.close()
    listener = _core.EngineListener(f"unix:{path}", INFO)
    with pytest.raises(OSError, match="in use"):
        _core.EngineListener(f"unix:{path}", INFO)
    listener.close()
    assert not path.exists()


@pytest.mark.parametrize(
    ("address", "info", "message"),
    [
        ("nonsense", INFO, "unix:PATH, HOST:PORT or file:PATH"),
        ("127.0.0.1:99999", INFO, "port"),
        ("127.0.0.1:0", {**INFO, "vocabulary": 3}, "vocabulary"),
        ("127.0.0.1:0", {**INFO, "vocab_size": 0}, "vocab_size is 0"),
    ],
)
def test_a_bad_address_or_info_is_refused_by_name(
    address: str, info: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        _core.EngineListener(address, info)
    with pytest.raises(TypeError, match="max_model_len"):
        _core.EngineListener("127.0.0.1:0", {**INFO, "max_model_len": "long"})


def test_outputs_of_unknown_requests_fall_away(listener: _core.EngineListener) -> None:
    logprob = (3, -0.5, 1, [3, 4], [-0.5, -1.0])
    times = (1, 2, 3, 4, 0, 5, [("forward/linear", 3)], [("sample", 1)])
    listener.emit([(7, [3], "length", 0, [logprob], [None, logprob], times, 3, "text")], LOAD)
    listener.emit_kv([(b"", b"h" * 16)], [b"r" * 16], False)
    listener.answer_calibrate(9, [1.0])


@pytest.mark.parametrize(
    ("outputs", "load", "message"),
    [
        ([(1, [2])], LOAD, "9 items"),
        ([(1, [2], "bad", 0, None, None, None, None, None)], LOAD, "allowed are eos"),
        ([], LOAD[:3], "length 12"),
    ],
)
def test_a_malformed_step_is_an_error(
    listener: _core.EngineListener, outputs: list[Any], load: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        listener.emit(outputs, load)
