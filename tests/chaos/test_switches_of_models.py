"""Two models that may each change their shape: one is told to, and the other one stays as it is."""

import json
from collections.abc import Iterator
from http import HTTPStatus

import pytest

from ..e2e.wire import is_at_rest
from ..integration.served import Serve
from ..integration.supervised import children, command_line, until
from .crowd import Crowd
from .shapes import NARROW, WIDE, ask_for, equal_costs, state, switch
from .workload import undisturbed_answers

MODELS = ("moved", "stays")
STREAMS = 8
CAN_BE = 'allowed: null, or one of [[{"tp":1,"count":2}],[{"tp":2,"count":1}]]'
FILE = """
devices = 4
blueprint = "auto"
calibration = {calibration}
kv_cache_memory_bytes = "64MiB"
hand_over_s = 3

[[models]]
model = "demo"
served_model_name = "moved"

[[models]]
model = "demo"
served_model_name = "stays"
"""


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serve]:
    folder = tmp_path_factory.mktemp("serve")
    file = folder / "models.toml"
    file.write_text(FILE.format(calibration=json.dumps(str(equal_costs(folder)))))
    made = Serve(folder, "--config", str(file), model=None)
    yield made
    made.close()


def engines(served: Serve, model: str) -> set[int]:
    """Pids of the model's replicas."""
    found = [(pid, command_line(pid)) for pid in children(served.process.pid)]
    name = f"/{model}-tp".encode()
    return {pid for pid, line in found if b"\0engine\0" in line and name in line}


@pytest.mark.slow
@pytest.mark.needs("two-cores")
@pytest.mark.timeout(600)
def test_one_model_is_switched_and_its_neighbour_stays(served: Serve) -> None:
    for model in MODELS:
        switch(served, WIDE, model)  # from now on the policy moves neither
    before = {model: engines(served, model) for model in MODELS}
    assert [len(before[model]) for model in MODELS] == [1, 1]
    expected = [undisturbed_answers(served.url, model) for model in MODELS]
    moved, stays = (
        Crowd(served.url, answers, STREAMS, model=model)
        for model, answers in zip(MODELS, expected, strict=True)
    )
    with moved, stays:
        for blueprint in (NARROW, WIDE):
            switch(served, blueprint, "moved")
            told = state(served, "stays")
            assert (told["phase"], told["blueprint"], told["wish"]) == ("steady", WIDE, WIDE)
    assert engines(served, "stays") == before["stays"]
    assert not engines(served, "moved") & before["moved"]
    for crowd in (moved, stays):
        assert not crowd.wrong, crowd.wrong[0]
        assert crowd.finished > STREAMS
    assert moved.replays > 0 and stays.replays == 0
    until(lambda: is_at_rest(served.url))


@pytest.mark.slow
@pytest.mark.needs("two-cores")
@pytest.mark.parametrize(
    ("blueprint", "model", "field", "said"),
    [
        (NARROW, "nobody", "model", 'got "nobody", allowed: one of ["moved", "stays"]'),
        (NARROW, None, "model", 'got null, allowed: one of ["moved", "stays"]'),
        ([{"tp": 4, "count": 1}], "moved", "blueprint", f'got [{{"tp":4,"count":1}}], {CAN_BE}'),
        ([{"tp": 1, "count": 1}], "stays", "blueprint", f'got [{{"tp":1,"count":1}}], {CAN_BE}'),
    ],
)
def test_a_wish_that_cannot_be_is_refused_and_changes_nothing(
    served: Serve,
    blueprint: list[dict[str, int]],
    model: str | None,
    field: str,
    said: str,
) -> None:
    wishes = sorted(served.runtime.rglob("*.wish.json"))
    texts = [file.read_text() for file in wishes]
    before = [(engines(served, one), state(served, one)["blueprint"]) for one in MODELS]
    reply = ask_for(served, blueprint, model)
    assert reply.status == HTTPStatus.BAD_REQUEST
    assert reply.error["param"] == field
    assert said in reply.error["message"]
    # What the controller never reads, it cannot follow.
    assert sorted(served.runtime.rglob("*.wish.json")) == wishes
    assert [file.read_text() for file in wishes] == texts
    after = [(engines(served, one), state(served, one)["blueprint"]) for one in MODELS]
    assert after == before
