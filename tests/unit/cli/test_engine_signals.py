"""What signals do to an engine that runs by itself."""

import os
import signal
from collections.abc import Iterator

import pytest

from scalellm.cli.engine import Stopping
from scalellm.controller.child import HAND_OVER

SIGNALS = (signal.SIGTERM, signal.SIGINT)
HANDLED = (*SIGNALS, HAND_OVER)


class Loop:
    def __init__(self) -> None:
        self.calls: list[str] = []

    def drain(self) -> None:
        self.calls.append("drain")

    def hand_over(self) -> None:
        self.calls.append("hand over")

    def stop(self) -> None:
        self.calls.append("stop")


@pytest.fixture
def loop() -> Iterator[Loop]:
    previous = {number: signal.getsignal(number) for number in HANDLED}
    made = Loop()
    stopping = Stopping(made)
    for number in HANDLED:
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


def test_after_a_hand_over_the_next_signal_stops_and_another_hand_over_changes_nothing(
    loop: Loop,
) -> None:
    for number in (HAND_OVER, HAND_OVER, signal.SIGTERM):
        os.kill(os.getpid(), number)
    assert loop.calls[:3] == ["hand over", "hand over", "stop"]
