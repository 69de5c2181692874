"""From one shape to another: what is started, what is ended, and when."""

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from scalellm.config import (
    BlueprintConfig,
    DeploymentConfig,
    EngineConfig,
    GatewayConfig,
    LogConfig,
    ServeConfig,
)
from scalellm.controller import steering
from scalellm.controller.blueprint.cost import calibration_toml, read_calibration
from scalellm.controller.blueprint.journal import replay
from scalellm.controller.blueprint.measured import Measured
from scalellm.controller.blueprint.policy import Settings
from scalellm.controller.blueprint.reading import Reading, reading_of
from scalellm.controller.blueprint.shape import Blueprint, uniform
from scalellm.controller.blueprint.signals import Signals
from scalellm.controller.gateway_view import Sample, parse_metrics
from scalellm.controller.shapes import Place, initial_state, shapes_of
from scalellm.errors import ConfigError

NODE = read_calibration("node-8gpu")
NARROW, WIDE = uniform(NODE.widths, 8)
NARROW_NAMES = [f"engine-tp1-{at}" for at in range(8)]
WIDE_NAMES = ["engine-tp8-0"]


def label(name: str) -> str:
    """What OpenTelemetry calls a model, and what we do."""
    return "gen_ai_request_model" if name.startswith("gen_ai") else "model"


class Deployment:
    """The root's part: it does as it is ordered, and replicas are ready when told."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 1000.0
        monkeypatch.setattr(steering.time, "monotonic", lambda: self.now_s)
        self.orders: list[dict[str, Any]] = []
        self.facts = {
            name: {"running": False, "ready": False, "standing_by": False, "given_up": ""}
            | {"wanted": name in WIDE_NAMES, "target": name in WIDE_NAMES, "held": False}
            for name in [*NARROW_NAMES, *WIDE_NAMES]
        }
        self.switch = "beside"
        self.load = (0, 0.0)  # running requests, of them ended a second
        self.ended = 0.0
        self.model = "demo"
        self.folder = folder
        self.start()
        self.restart_controller()

    def restart_controller(self) -> None:
        plan = {
            "model": "demo",
            "widths": dict.fromkeys(NARROW_NAMES, 1) | dict.fromkeys(WIDE_NAMES, 8),
            "candidates": [NARROW.to_json(), WIDE.to_json()],
            "calibration": calibration_toml(NODE),
            "settings": asdict(Settings("latency")),
            "switch": self.switch,
            "hand_over_s": 0.5,
            "journal": str(self.folder / "journal.jsonl"),
            "state_file": str(self.folder / "blueprint.json"),
        }
        self.steering = steering.Steering(plan, self.take)

    def take(self, order: dict[str, Any]) -> None:
        self.orders.append(order)
        if order["type"] == "want":
            for name, found in self.facts.items():
                for what in ("wanted", "target", "held"):
                    found[what] = name in order[what]
        elif order["type"] == "go":
            assert self.facts[order["name"]]["standing_by"]
            self.facts[order["name"]]["held"] = False

    def start(self) -> None:
        """What is wanted runs and is ready, or stands by."""
        for found in self.facts.values():
            if found["wanted"]:
                found["running"] = True
                found["ready"], found["standing_by"] = not found["held"], found["held"]

    def end(self, *names: str) -> None:
        for name in names:
            self.facts[name].update(running=False, ready=False, standing_by=False)

    def become_narrow(self) -> None:
        """As many come as eight narrow replicas are better for."""
        self.load = (300, 100.0)
        assert len(self.look(10.0)) == 1
        self.start()
        self.look(1.0)
        self.end("engine-tp8-0")

    def look(self, seconds: float) -> list[dict[str, Any]]:
        """The orders of so much time."""
        before = len(self.orders)
        for _ in range(round(seconds / 0.5)):
            self.now_s += 0.5
            self.ended += 0.5 * self.load[1]
            states = {n: "ready" if f["ready"] else "lost" for n, f in self.facts.items()}
            self.steering.look(self.facts, states, self.samples())
        return self.orders[before:]

    def samples(self) -> list[Sample]:
        """As the gateway writes them, another model's among them."""
        running, _ = self.load
        totals = {
            "scalellm_prompt_tokens_total": 128 * self.ended,
            "scalellm_output_tokens_total": 64 * self.ended,
            "gen_ai_server_time_to_first_token_seconds_count": self.ended,
            "scalellm_replica_running_requests": running,
        }
        return [
            Sample(name, {label(name): model}, float(value))
            for model, times in ((self.model, 1), ("another", 1000))
            for name, value in ((name, value * times) for name, value in totals.items())
        ]

    def state(self) -> Any:
        return json.loads((self.folder / "blueprint.json").read_text())


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Deployment]:
    yield Deployment(tmp_path, monkeypatch)


def kinds(orders: list[dict[str, Any]]) -> list[tuple[str, str]]:
    return [(order["type"], order.get("name", "")) for order in orders]


def test_the_new_shape_starts_first_and_the_old_one_ends_when_it_is_ready(made: Deployment) -> None:
    made.load = (2, 5.0)
    assert made.look(40.0) == []
    made.load = (300, 100.0)
    (order,) = made.look(20.0)
    assert set(order["wanted"]) == {*NARROW_NAMES, *WIDE_NAMES}
    assert set(order["target"]) == set(NARROW_NAMES)
    assert set(order["of"]) == set(made.facts)
    assert made.state()["phase"] == "starting"
    made.start()
    takes_over, drain = made.look(0.5), made.look(0.5)
    assert takes_over[0]["wanted"] == NARROW_NAMES
    assert kinds(drain) == [("end", "engine-tp8-0")]
    assert drain[0]["reason"] == "hand over"
    assert [order["reason"] for order in made.look(0.5)] == ["stop"]
    assert [order["reason"] for order in made.look(11.0)] == ["kill"]
    made.end("engine-tp8-0")
    assert made.look(10.0) == []
    assert made.state()["phase"] == "steady"
    assert made.state()["blueprint"] == [{"tp": 1, "count": 8}]


def test_where_both_have_no_room_the_new_shape_waits_until_the_old_one_is_gone(
    made: Deployment,
) -> None:
    made.switch = "after"
    made.restart_controller()
    made.load = (300, 100.0)
    (order,) = made.look(10.0)
    assert set(order["held"]) == set(NARROW_NAMES)
    assert made.look(5.0) == [], "they are still starting"
    made.start()
    assert not any(made.facts[name]["ready"] for name in NARROW_NAMES)
    (takes_over,) = made.look(0.5)
    assert takes_over["wanted"] == takes_over["held"] == NARROW_NAMES
    ends = made.look(1.0)
    assert [order["reason"] for order in ends] == ["hand over", "stop"], "at once, and all of it"
    assert made.state()["phase"] == "handing over"
    made.restart_controller()
    made.look(1.0)
    made.end("engine-tp8-0")
    goes = made.look(0.5)
    assert kinds(goes) == [("go", name) for name in NARROW_NAMES]
    assert made.look(0.5) == []
    assert made.state()["phase"] == "handing over"
    made.start()
    made.look(0.5)
    assert made.state()["phase"] == "steady"
    assert made.state()["blueprint"] == [{"tp": 1, "count": 8}]


def test_a_shape_that_is_lost_whole_is_replaced_by_one_that_can_be_had(made: Deployment) -> None:
    made.facts["engine-tp8-0"].update(running=False, ready=False, given_up="it ended five times")
    (order,) = made.look(0.5)
    assert order["wanted"] == order["target"] == NARROW_NAMES
    assert order["why"] == "1 x TP 8 -> 8 x TP 1: engine-tp8-0 was given up"
    made.start()
    assert made.look(10.0) == []
    assert made.state()["phase"] == "steady"
    for name in NARROW_NAMES:
        made.facts[name].update(running=False, ready=False, given_up="it ended five times")
    assert made.look(10.0) == [], "there is nothing left to have"


def test_a_shape_of_which_a_part_is_left_is_better_than_none(made: Deployment) -> None:
    made.facts["engine-tp1-3"]["given_up"] = "could not start"
    made.facts["engine-tp8-0"].update(running=False, ready=False, given_up="it ended five times")
    (order,) = made.look(0.5)
    assert order["wanted"] == order["target"] == NARROW_NAMES
    for name in NARROW_NAMES:
        if name != "engine-tp1-3":
            made.facts[name].update(running=True, ready=True)
    assert made.look(10.0) == []
    assert made.state()["phase"] == "steady"


def test_a_new_shape_that_cannot_start_is_left_alone(made: Deployment) -> None:
    made.load = (300, 100.0)
    assert len(made.look(30.0)) == 1
    made.facts["engine-tp1-3"]["given_up"] = "it ended five times"
    (back,) = made.look(0.5)
    assert (back["wanted"], back["target"]) == (WIDE_NAMES, WIDE_NAMES)
    assert "engine-tp1-3 could not start" in back["why"]
    assert made.look(200.0) == []


def test_a_replica_given_up_does_not_hold_the_others_to_their_shape(made: Deployment) -> None:
    made.become_narrow()
    made.look(1.0)
    assert made.state()["given_up"] == {}
    reason = "it ended five times"
    made.facts["engine-tp1-3"].update(running=False, ready=False, given_up=reason)
    assert made.look(5.0) == []
    assert made.state()["given_up"] == {"engine-tp1-3": reason}
    assert made.state()["phase"] == "steady"
    made.load = (1, 0.5)
    (order,) = made.look(300.0)
    assert order["target"] == WIDE_NAMES
    made.start()
    made.look(1.0)
    made.end(*NARROW_NAMES)
    # The way back is closed, and that is told.
    made.load = (300, 100.0)
    assert made.look(300.0) == []
    assert made.state()["given_up"] == {"engine-tp1-3": reason}
    assert made.state()["barred"] == {"8 x TP 1": "engine-tp1-3 was given up"}
    journal = replay(made.folder / "journal.jsonl")
    assert all(again.to_json() == then for _, then, again in journal)


def test_another_models_load_and_replicas_are_none_of_its_business(made: Deployment) -> None:
    made.facts["other-0"] = made.facts[WIDE_NAMES[0]].copy()
    made.load = (300, 100.0)
    made.model = "other"
    assert made.look(40.0) == []
    made.model = "demo"
    (order,) = made.look(20.0)
    assert "other-0" not in {*order["of"], *order["wanted"], *order["target"]}


def test_a_restarted_controller_goes_on_where_the_last_one_was(made: Deployment) -> None:
    made.load = (300, 100.0)
    assert len(made.look(30.0)) == 1
    made.restart_controller()
    assert made.look(5.0) == []
    made.start()
    assert kinds(made.look(1.0)) == [("want", ""), ("end", "engine-tp8-0")]
    made.restart_controller()
    assert kinds(made.look(1.5)) == [("end", "engine-tp8-0")] * 2


def test_a_restarted_controller_knows_how_long_the_shape_has_stood(made: Deployment) -> None:
    made.become_narrow()
    assert made.state()["phase"] == "handing over"
    made.look(1.0)
    made.restart_controller()
    made.load = (2, 5.0)
    assert made.look(15.0) == []  # min_stay_s is 30; a policy that begins would not wait
    assert kinds(made.look(30.0)) == [("want", "")]


def test_a_state_file_that_is_none_is_no_reason_to_stop(made: Deployment) -> None:
    (made.folder / "blueprint.json").write_text('{"policy": 1}')
    made.restart_controller()
    made.load = (300, 100.0)
    assert kinds(made.look(30.0)) == [("want", "")]


def test_an_operators_wish_goes_before_the_policy_until_it_is_taken_back(made: Deployment) -> None:
    wish = made.folder / "blueprint.wish.json"
    made.load = (2, 5.0)
    wish.write_text(json.dumps({"blueprint": NARROW.to_json()}))
    (order,) = made.look(1.0)
    assert set(order["target"]) == set(NARROW_NAMES)
    made.start()
    made.look(1.0)
    made.end("engine-tp8-0")
    assert made.look(100.0) == []  # the policy would have gone back
    assert made.state()["wish"] == NARROW.to_json()
    for nonsense in ("", "[]", '{"blueprint": [{"tp": 3, "count": 1}]}', '{"blueprint": null}'):
        wish.write_text(nonsense)
        made.restart_controller()
    (order,) = made.look(60.0)
    assert order["target"] == WIDE_NAMES
    assert [Blueprint.of_json(found) for found in made.state()["candidates"]] == [NARROW, WIDE]


METRICS = """
scalellm_replica_running_requests{replica="a"} 3
scalellm_replica_waiting_requests{replica="a"} 1
scalellm_queued_requests{model="demo",class="standard"} 2
scalellm_replica_kv_blocks_used{replica="a"} 5
scalellm_replica_kv_blocks_total{replica="a"} 20
scalellm_prompt_tokens_total{model="demo"} {prompt}
scalellm_cached_tokens_total{model="demo"} {cached}
scalellm_output_tokens_total{model="demo"} {output}
gen_ai_server_time_to_first_token_seconds_count{gen_ai_request_model="demo"} {ended}
gen_ai_server_time_per_output_token_seconds_bucket{gen_ai_request_model="demo",le="0.01"} 7
gen_ai_server_time_per_output_token_seconds_bucket{gen_ai_request_model="demo",le="0.03"} {ended}
gen_ai_server_time_per_output_token_seconds_bucket{gen_ai_request_model="demo",le="+Inf"} {ended}
scalellm_hand_over_pause_seconds_bucket{model="demo",le="0.3"} 0
scalellm_hand_over_pause_seconds_bucket{model="demo",le="0.4"} {ended}
scalellm_hand_over_pause_seconds_bucket{model="demo",le="+Inf"} {ended}
scalellm_replica_state{replica="a",state="ready"} 1
scalellm_replica_state{replica="gone",state="lost"} 1
scalellm_replica_step_cost_ms{replica="a",of="step"} 4
scalellm_replica_step_cost_ms{replica="a",of="token"} 0.5
scalellm_replica_step_cost_ms{replica="a",of="attended"} 0.001
scalellm_replica_step_cost_ms{replica="a",of="request"} 0
scalellm_replica_step_cost_ms{replica="gone",of="step"} 100
scalellm_replica_running_requests{replica="gone"} 40
scalellm_replica_backlog_tokens{replica="gone"} 4000
scalellm_replica_kv_blocks_used{replica="gone"} 15
scalellm_replica_kv_blocks_total{replica="gone"} 20
"""


def read(at_s: float, *, prompt: int = 0, cached: int = 0, output: int = 0, ended: int) -> Reading:
    text = METRICS
    values = {"prompt": prompt, "cached": cached, "output": output, "ended": ended}
    for name, value in values.items():
        text = text.replace("{" + name + "}", str(value))
    return reading_of(at_s, parse_metrics(text))


def test_signals_are_differences_of_counters() -> None:
    measured = Measured(20.0)
    first = read(0.0, prompt=1000, output=500, ended=10)
    assert measured.signals(first, WIDE).prompt_tokens == ()
    later = read(10.0, prompt=3000, cached=500, output=900, ended=20)
    found = measured.signals(later, WIDE)
    assert (found.running, found.waiting, found.kv_use) == (3, 3, 0.25)
    assert found.arrivals_s == 1.0
    assert found.prompt_tokens == (150.0,) * 5
    assert found.output_tokens == 40.0
    assert found.tbt_ms == pytest.approx((10 * 30) ** 0.5)
    assert found.pause_ms == pytest.approx((300 * 400) ** 0.5)
    assert found.step_cost == (4.0, 0.5, 0.001, 0.0)
    assert Signals.of_json(json.loads(json.dumps(found.to_json()))) == found
    idle = measured.signals(replace(later, at_s=60.0), WIDE)
    assert (idle.arrivals_s, idle.output_tokens, idle.tbt_ms) == (0.0, 40.0, None)
    restarted = read(61.0, prompt=10, output=10, ended=1)
    assert measured.signals(restarted, WIDE).arrivals_s == 0.0


def test_a_crowd_is_seen_as_it_comes_and_for_some_seconds_after() -> None:
    measured, calm = Measured(20.0), read(0.0, ended=10)
    found = []
    for second, running in enumerate((0, 0, 100, 100, 0, 0, 0)):
        reading = replace(calm, at_s=float(second), running=running, backlog_tokens=10 * running)
        found.append(measured.signals(reading, WIDE))
    assert [one.running for one in found] == [0, 0, 100, 100, 40, 40, 40]
    assert [one.backlog_tokens for one in found] == [0, 0, 1000, 1000, 400, 400, 400]


def test_readings_go_on_while_the_shape_changes() -> None:
    """A switch takes longer than signals look back."""
    measured = Measured(20.0)
    measured.signals(read(0.0, ended=10), WIDE)
    for second in range(1, 60):
        # Streams move in the 40th second.
        measured.read(read(float(second), ended=10 if second < 40 else 30))
    found = measured.signals(read(58.0, ended=30), NARROW)
    assert found.pause_ms == pytest.approx((300 * 400) ** 0.5)


def config(deployment: DeploymentConfig | None = None, **shape: Any) -> ServeConfig:
    return ServeConfig(
        EngineConfig(cpu_threads=8),
        GatewayConfig(),
        deployment or DeploymentConfig(),
        LogConfig(),
        BlueprintConfig(**shape),
    )


def test_static_shapes_share_the_cores_by_width(tmp_path: Path) -> None:
    found = shapes_of(config(replica=("tp=2,count=1", "tp=1,count=2"), devices=4), tmp_path)
    assert found.widths == {"engine-0": 2, "engine-1": 1, "engine-2": 1}
    assert found.threads == {"engine-0": 4, "engine-1": 2, "engine-2": 2}
    assert found.wanted == {"engine-0", "engine-1", "engine-2"}
    assert found.steering is None


def test_auto_declares_every_candidate_and_begins_with_one(tmp_path: Path) -> None:
    auto = config(DeploymentConfig(blueprint="auto"), calibration="node-8gpu")
    found = shapes_of(auto, tmp_path)
    assert set(found.widths) == {*NARROW_NAMES, *WIDE_NAMES}
    assert found.wanted == set(WIDE_NAMES)
    throughput = replace(auto, blueprint=replace(auto.blueprint, objective="throughput"))
    assert shapes_of(throughput, tmp_path).wanted == set(NARROW_NAMES)
    assert found.steering is not None
    assert [Blueprint.of_json(plan) for plan in found.steering["candidates"]] == [NARROW, WIDE]
    assert initial_state(found, "auto")["candidates"] == found.steering["candidates"]
    for asked, journal in (("none", None), ("j", str(Path("j").resolve()))):
        kept = replace(auto, blueprint=replace(auto.blueprint, journal=asked))
        steering_plan = shapes_of(kept, tmp_path).steering
        assert steering_plan is not None and steering_plan["journal"] == journal


@pytest.mark.parametrize(
    ("deployment", "shape", "named"),
    [
        ({"replicas": 2}, {"replica": ("tp=1",)}, "--replica and --replicas"),
        ({"blueprint": "auto"}, {"replica": ("tp=1",)}, "--replica and --blueprint auto"),
        ({"blueprint": "auto", "replicas": 2}, {}, "--blueprint auto and --replicas"),
        ({"blueprint": "auto"}, {"calibration": "node-8gpu", "devices": 4}, "two shapes"),
        ({"blueprint": "auto"}, {"calibration": "node-8gpu", "devices": 64}, "at most 8"),
        ({}, {"replica": ("tp=8,count=2",)}, "needs 16 devices, there are 8; what would fit"),
        ({}, {"replica": ("tp=16",)}, "got tp=16, allowed here"),
    ],
)
def test_impossible_shapes_are_refused_before_anything_starts(
    tmp_path: Path, deployment: dict[str, Any], shape: dict[str, Any], named: str
) -> None:
    with pytest.raises(ConfigError, match=named):
        shapes_of(config(DeploymentConfig(**deployment), **shape), tmp_path)


@pytest.mark.parametrize("ranks", [3, 4])
def test_ranks_that_the_model_does_not_allow_are_refused_too(tmp_path: Path, ranks: int) -> None:
    asked = config()
    asked = replace(asked, engine=replace(asked.engine, tensor_parallel_size=ranks))
    said = f"--tensor-parallel-size: got {ranks}, allowed for this model: 1, 2$"
    with pytest.raises(ConfigError, match=said):
        shapes_of(asked, tmp_path, Place(widths=(1, 2)))
