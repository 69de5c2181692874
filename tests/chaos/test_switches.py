"""Streams that outlive one change of shape after the other, each with the undisturbed answer.

SCALELLM_SWITCHES says how many (2); a thorough run has 200. What happened is told with
`--log-cli-level=info`.
"""

import logging
import os
import signal
import time
from collections.abc import Callable, Iterator
from http import HTTPStatus

import pytest

from ..e2e.wire import call, is_at_rest, load
from ..integration.served import Serve
from ..integration.supervised import children, command_line, kill, until
from .crowd import Crowd
from .shapes import NARROW, SWITCH_S, WIDE, serve_two_shapes, state, switch, wish
from .workload import undisturbed_answers

logger = logging.getLogger(__name__)

SWITCHES = int(os.environ.get("SCALELLM_SWITCHES", "2"))
STREAMS = 32


@pytest.fixture
def served(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[Serve]:
    made = serve_two_shapes(
        tmp_path_factory.mktemp("serve"), "--switch", getattr(request, "param", "auto")
    )
    yield made
    made.close()


@pytest.mark.slow
@pytest.mark.needs("two-cores")
@pytest.mark.timeout(120 + 60 * SWITCHES)
@pytest.mark.parametrize("served", ["beside", "after"], indirect=True)
def test_streams_outlive_forced_switches(
    served: Serve, record_property: Callable[[str, object], None]
) -> None:
    undisturbed = undisturbed_answers(served.url)
    began_s = time.monotonic()
    with Crowd(served.url, undisturbed, STREAMS) as crowd:
        for number in range(SWITCHES):
            switch(served, NARROW if number % 2 == 0 else WIDE)
            logger.info("%d switches, %d wrong answers", number + 1, len(crowd.wrong))
            if crowd.wrong:
                break
    logger.info("%d answers, %d replays", crowd.finished, crowd.replays)
    for name, value in (
        ("switches", SWITCHES),
        ("streams", STREAMS),
        ("answers", crowd.finished),
        ("moves", crowd.replays),
        ("wrong", len(crowd.wrong)),
        ("seconds", round(time.monotonic() - began_s)),
    ):
        record_property(name, value)
    assert not crowd.wrong, crowd.wrong[0]
    assert crowd.finished > 0 and crowd.replays > 0
    found = load(served.url)
    assert found["replays_waiting"] == 0 and found.get("replays_failed_total", 0) == 0
    until(lambda: is_at_rest(served.url))


@pytest.mark.slow
@pytest.mark.needs("two-cores")
@pytest.mark.parametrize("served", ["after"], indirect=True)
def test_a_replica_that_dies_standing_by_is_waited_for_again(served: Serve) -> None:
    def standing_by() -> set[int]:
        found = children(served.process.pid)
        return {pid for pid in found if b"--stand-by" in command_line(pid)}

    with Crowd(served.url, undisturbed_answers(served.url), STREAMS) as crowd:
        wish(served, NARROW)
        until(lambda: len(standing_by()) == NARROW[0]["count"])
        died = min(standing_by())
        kill(died)
        until(lambda: len(standing_by() - {died}) == NARROW[0]["count"])
        switch(served, NARROW)
    assert not crowd.wrong, crowd.wrong[0]


@pytest.mark.slow
@pytest.mark.needs("two-cores")
@pytest.mark.parametrize("served", ["after"], indirect=True)
def test_a_deployment_that_is_to_end_between_two_shapes_answers_first(served: Serve) -> None:
    undisturbed = undisturbed_answers(served.url)
    crowd = Crowd(served.url, undisturbed, STREAMS)
    with crowd:
        wish(served, NARROW)
        until(lambda: state(served)["phase"] == "handing over")
        crowd.leave.set()
        served.process.send_signal(signal.SIGTERM)
    assert not crowd.wrong, crowd.wrong[0]
    assert crowd.replays > 0
    assert served.process.wait(SWITCH_S) == 0


@pytest.mark.slow
@pytest.mark.needs("two-cores")
def test_a_wish_that_cannot_be_is_refused_with_what_can(served: Serve) -> None:
    reply = call(
        served.url, "/admin/v1/blueprint", {"blueprint": [{"tp": 4, "count": 1}]}, method="PUT"
    )
    assert reply.status == HTTPStatus.BAD_REQUEST
    assert '"tp":2' in reply.error["message"]
    wish(served, None)
    assert state(served)["phase"] == "steady"
