"""What the controller decides about one replica, from facts alone."""

import pytest

from scalellm.controller.policy import (
    Decision,
    Exit,
    Facts,
    GiveUp,
    Kill,
    Leave,
    Limits,
    Start,
    backoff_s,
    decide,
)

LIMITS = Limits(backoff_min_s=1, backoff_max_s=8, crash_window_s=100, crash_limit=4)


def crashes(*agos_s: float) -> tuple[Exit, ...]:
    return tuple(Exit(ago_s, False, "killed by SIGKILL") for ago_s in agos_s)


@pytest.mark.parametrize(
    ("facts", "decision"),
    [
        (Facts(running=False), Start()),
        (Facts(running=True), Leave()),
        (Facts(running=True, ready=True, unresponsive_s=29), Leave()),
        (Facts(running=True, ready=True, unresponsive_s=31), Kill("no sign of life for 31 s")),
        (Facts(running=True, ready=False, unresponsive_s=31), Leave()),
        (Facts(running=True, age_s=1801), Kill("not ready after 1800 s")),
        (Facts(running=True, ready=True, age_s=1801), Leave()),
        (Facts(running=False, given_up=True), Leave()),
        # the first crash is answered at once, later ones after 1, 2, ... s
        (Facts(running=False, ever_ready=True, exits=crashes(0)), Start()),
        (Facts(running=False, ever_ready=True, exits=crashes(5, 0.9)), Leave()),
        (Facts(running=False, ever_ready=True, exits=crashes(5, 1.1)), Start()),
        (Facts(running=False, ever_ready=True, exits=crashes(9, 5, 1.9)), Leave()),
        (Facts(running=False, ever_ready=True, exits=crashes(9, 5, 2.1)), Start()),
        (
            Facts(running=False, ever_ready=True, exits=crashes(9, 5, 3, 1)),
            GiveUp("ended 4 times in 100 s, the last time killed by SIGKILL"),
        ),
        # what lies before the window is forgotten
        (Facts(running=False, ever_ready=True, exits=crashes(900, 800, 700, 0)), Start()),
    ],
)
def test_decisions(facts: Facts, decision: Decision) -> None:
    assert decide(facts, LIMITS) == decision


def test_an_error_at_the_first_start_is_not_tried_again() -> None:
    ended = (Exit(0, True, "exit code 2"),)
    assert decide(Facts(running=False, exits=ended), LIMITS) == GiveUp(
        "could not start (exit code 2)"
    )


def test_an_error_at_a_later_start_is_tried_again() -> None:
    ended = (Exit(0, True, "exit code 1"),)
    assert decide(Facts(running=False, ever_ready=True, exits=ended), LIMITS) == Start()


def test_a_replica_killed_while_starting_is_tried_again() -> None:
    ended = (Exit(0, False, "killed by SIGKILL"),)
    assert decide(Facts(running=False, exits=ended), LIMITS) == Start()


def test_backoff_doubles_up_to_its_limit() -> None:
    pauses = [backoff_s(crashes(*range(count)), LIMITS) for count in range(8)]
    assert pauses == [0, 0, 1, 2, 4, 8, 8, 8]
