"""What signals do to an engine that runs by itself."""

import os
import signal
from collections.abc import Iterator

import pytest

from scalellm.cli.engine import Stopping

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Loop:
    def __init__(self) -> None:
        self.calls: list[str] = []

    def drain(self) -> None:
        self.calls.append("drain")

    def stop(self) -> None:
        self.calls.append("stop")


@pytest.fixture
def loop() -> Iterator[Loop]:
    previous = {number: signal.getsignal(number) for number in SIGNALS}
    made = Loop()
    stopping = Stopping(made)
    for number in SIGNALS:
        signal.signal(number, stopping)
    yield made
    for number, handler in previous.items():
        signal.signal(number, handler)


def test_the_first_drains_the_second_stops_and_a_third_needs_no_loop(loop: Loop) -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    assert loop.calls == ["drain"]
    assert signal.getsignal(signal.SIGINT) is not signal.SIG_DFL
    os.kill(os.getpid(), signal.SIGINT)
    assert loop.calls[1] == "stop"
    assert all(signal.getsignal(number) is signal.SIG_DFL for number in SIGNALS)
