"""Stay, or switch to another blueprint: a pure function of signals, costs and its own state.

    signals --> demand --> outlook of each blueprint --> score by the objective --> gain of the best
                                                                                      |
    stay, unless the gain                                                             |
      is more than `hysteresis`                                  <-------------------'
      repays the switch: gain * horizon > what the switch takes, the re-computed context included
      has lasted `confirm_s`, the less the larger it is,
      and the present blueprint has stood for `min_stay_s`

A switch back to the blueprint that was left last must bring twice the gain, so that a load right at
the crossover moves the deployment once and not to and fro.

Scores, of which a gain is the relative improvement:
    latency      time a token of a mean request takes, TTFT included, a growing queue as well
    throughput   requests a second of a closed loop of as many as are there now
    slo          expected share of requests that meet the objectives; a gain is the absolute one,
                 but where hardly any would meet them, how much nearer they come
What is measured corrects the prediction: each shape has a factor that follows, slowly, what its
engines' own steps cost against the calibration at the present load (without that, the measured
TBT); a shape that never ran is taken to be as far off as the others. What the measured TTFT is by
the predicted one holds for all shapes: it comes from how requests arrive. What streams paused that
a switch moved takes the place of the calibrated pause.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from scalellm.controller.blueprint.cost import Calibration, StepCost
from scalellm.controller.blueprint.predict import Demand, Outlook, predict
from scalellm.controller.blueprint.shape import Blueprint
from scalellm.controller.blueprint.signals import Signals

Objective = Literal["latency", "throughput", "slo"]
OBJECTIVES: tuple[Objective, ...] = ("latency", "throughput", "slo")
_SHARPNESS = 8.0  # how fast the share that meets an objective falls around it
_FEW = 0.5  # share of requests that meet the objectives, below which distance counts
_FOLLOW = 0.1  # weight of a measurement against those before
_FACTORS = (0.25, 4.0)  # beyond, a measurement is not believed
_PAUSE_MS = 20_000.0  # likewise


@dataclass(frozen=True, slots=True)
class Settings:
    """What the policy wants and how reluctant it is."""

    objective: Objective = "latency"
    ttft_slo_ms: float = 1000.0
    tbt_slo_ms: float = 50.0
    hysteresis: float = 0.1
    min_stay_s: float = 30.0
    confirm_s: float = 5.0
    horizon_s: float = 60.0  # for which the present load is taken to last
    drain_s: float = 10.0  # in which what waits now should be gone


@dataclass(frozen=True, slots=True)
class State:
    """What the policy remembers from one decision to the next."""

    since_s: float  # of the present blueprint
    left: Blueprint | None = None  # where it was before
    candidate: Blueprint | None = None
    candidate_since_s: float = 0.0
    factors: Mapping[int, float] = field(default_factory=dict)  # by tp: measured / predicted
    ttft_factor: float = 1.0  # the same, of the TTFT that is left once steps are corrected
    pause_ms: float | None = None  # measured of switches


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do, and the figures behind it."""

    blueprint: Blueprint  # to have from now on
    switch: bool
    reason: str
    gain: float  # of the best over the present one
    scores: tuple[tuple[Blueprint, float], ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "blueprint": self.blueprint.to_json(),
            "switch": self.switch,
            "reason": self.reason,
            "gain": round(self.gain, 6),
            "scores": [[str(blueprint), round(score, 6)] for blueprint, score in self.scores],
        }


def decide(
    signals: Signals,
    state: State,
    candidates: Sequence[Blueprint],
    calibration: Calibration,
    settings: Settings,
) -> tuple[Decision, State]:
    """The decision for this moment, and the state for the next one."""
    present = signals.blueprint
    if not signals.prompt_tokens or signals.output_tokens <= 0:
        return _stay(present, "nothing was measured yet"), replace(state, candidate=None)
    demand = demand_of(signals, calibration, settings)
    outlooks = {
        blueprint: predict(blueprint, demand, calibration, settings.horizon_s)
        for blueprint in dict.fromkeys((*candidates, present))
    }
    measured = _measured(signals, demand, calibration, outlooks[present])
    state = replace(state, factors=_follow_shape(state.factors, present, measured))
    outlooks = {
        blueprint: _corrected(outlook, blueprint, state.factors)
        for blueprint, outlook in outlooks.items()
    }
    state = _follow_rest(state, signals, outlooks[present], calibration.switch_ms)
    scores = {
        blueprint: _score(_later(outlook, state.ttft_factor), demand, settings)
        for blueprint, outlook in outlooks.items()
    }
    best = max(candidates, key=lambda blueprint: scores[blueprint])
    gain = _gain(scores[best], scores[present], settings.objective)
    decision = Decision(present, False, "", gain, tuple(scores.items()))
    if best == present:
        return replace(decision, reason="it is the best"), replace(state, candidate=None)
    switch_s = _switch_s(best, signals, state, calibration)
    needed = max(settings.hysteresis, switch_s / settings.horizon_s)
    if best == state.left:
        needed *= 2
    if gain <= needed:
        reason = f"{best} would gain {gain:.1%}, a switch needs {needed:.1%}"
        return replace(decision, reason=reason), replace(state, candidate=None)
    if state.candidate != best:
        state = replace(state, candidate=best, candidate_since_s=signals.now_s)
    # Where a deployment begins was nobody's decision: the first switch need not wait.
    min_stay_s = 0.0 if state.left is None else settings.min_stay_s
    for name, since_s, least_s in (
        ("the gain has lasted", state.candidate_since_s, settings.confirm_s * needed / gain),
        ("this blueprint has stood", state.since_s, min_stay_s),
    ):
        if signals.now_s - since_s < least_s:
            reason = f"{name} for {signals.now_s - since_s:.1f} s of {least_s:.1f}"
            return replace(decision, reason=reason), state
    reason = f"gains {gain:.1%}, needed {needed:.1%}"
    after = replace(state, since_s=signals.now_s, left=present, candidate=None)
    return replace(decision, blueprint=best, switch=True, reason=reason), after


def demand_of(signals: Signals, calibration: Calibration, settings: Settings) -> Demand:
    """The load to be carried: what arrives, and what waits to be gone within `drain_s`."""
    return Demand(
        signals.arrivals_s + signals.waiting / settings.drain_s,
        max(1.0, signals.running + signals.waiting),  # an idle deployment is kept for its next user
        signals.waiting,
        signals.prompt_tokens,
        max(1.0, signals.output_tokens),
        signals.backlog_tokens,
        _held_tokens(signals, calibration),
    )


def _held_tokens(signals: Signals, calibration: Calibration) -> float:
    """Of the KV cache, by a stream: what is used, by those that run."""
    shapes = [(group.count, calibration.shapes[group.tp]) for group in signals.blueprint.groups]
    there = sum(count * shape.kv_tokens for count, shape in shapes)
    return signals.kv_use * there / signals.running if signals.running > 0 else 0.0


def _stay(present: Blueprint, reason: str) -> Decision:
    return Decision(present, False, reason, 0.0, ())


def _switch_s(target: Blueprint, signals: Signals, state: State, calibration: Calibration) -> float:
    """The pause, with the running requests' context computed again: as measured, or calibrated."""
    if state.pause_ms is not None:
        return state.pause_ms / 1e3
    context = signals.prompt_tokens[len(signals.prompt_tokens) // 2] + signals.output_tokens / 2
    again_ms = [
        calibration.shapes[group.tp].cost.prompt_ms(context) / group.count
        for group in target.groups
    ]
    return (calibration.switch_ms + signals.running * min(again_ms)) / 1e3


def _score(outlook: Outlook, demand: Demand, settings: Settings) -> float:
    """Higher is better; see the top of the file."""
    if settings.objective == "throughput":
        return outlook.requests_s
    if settings.objective == "latency":
        return -outlook.request_ms(demand.output_tokens) / demand.output_tokens
    tbt = _met(outlook.tbt_ms / settings.tbt_slo_ms)
    ttft = [_met(value / settings.ttft_slo_ms) for value in outlook.ttft_ms]
    return tbt * sum(ttft) / len(ttft)


def _met(ratio: float) -> float:
    """Share of requests that meet an objective whose typical value is `ratio` of it."""
    return 1.0 / (1.0 + math.pow(min(ratio, 1e3), _SHARPNESS))


def _gain(best: float, present: float, objective: Objective) -> float:
    if objective == "slo":
        nearer = 1.0 - math.pow(present / best, 1.0 / _SHARPNESS) if best < _FEW else 0.0
        return max(best - present, nearer)
    if objective == "latency":
        return 1.0 - best / present  # both negative times
    return best / present - 1.0


def _measured(
    signals: Signals, demand: Demand, calibration: Calibration, outlook: Outlook
) -> float | None:
    """How many times as long as calibrated the present shape takes; None where nothing tells."""
    if len(signals.blueprint.groups) != 1:
        return None  # the parts of a mix differ
    (group,) = signals.blueprint.groups
    if signals.step_cost is not None and signals.running > 0:
        streams, context = max(1.0, signals.running / group.count), demand.context_tokens
        calibrated_ms = calibration.shapes[group.tp].cost.decode_ms(streams, context)
        base_ms, token_ms, attended_ms, sequence_ms = signals.step_cost
        fitted = StepCost(base_ms, token_ms, attended_ms, sequence_ms)
        return fitted.decode_ms(streams, context) / calibrated_ms
    return None if signals.tbt_ms is None else signals.tbt_ms / outlook.tbt_ms


def _followed(before: float, measured: float) -> float:
    return before + _FOLLOW * (measured - before)


def _believed(factor: float) -> bool:
    low, high = _FACTORS
    return low <= factor <= high


def _follow_shape(
    factors: Mapping[int, float], present: Blueprint, measured: float | None
) -> dict[int, float]:
    """The factors of the shapes; `measured` is of the present one."""
    if measured is None or not _believed(measured):
        return dict(factors)
    tp = present.groups[0].tp
    return {**factors, tp: _followed(factors.get(tp, 1.0), measured)}


def _follow_rest(state: State, signals: Signals, present: Outlook, switch_ms: float) -> State:
    """What is no shape's; `present` is the present one's corrected outlook."""
    # What waits in a queue is of the moment, and a request's TTFT is told when it has ended.
    is_steady = signals.waiting == 0 and signals.backlog_tokens == 0 and present.load < 1.0
    if signals.ttft_ms is not None and is_steady:
        ttft = signals.ttft_ms / max(1e-3, sorted(present.ttft_ms)[len(present.ttft_ms) // 2])
        if _believed(ttft):
            state = replace(state, ttft_factor=_followed(state.ttft_factor, ttft))
    if signals.pause_ms is not None and signals.pause_ms <= _PAUSE_MS:
        before = switch_ms if state.pause_ms is None else state.pause_ms
        state = replace(state, pause_ms=_followed(before, signals.pause_ms))
    return state


def _corrected(outlook: Outlook, blueprint: Blueprint, factors: Mapping[int, float]) -> Outlook:
    known = list(factors.values())
    others = sum(known) / len(known) if known else 1.0
    parts = [(group.devices, factors.get(group.tp, others)) for group in blueprint.groups]
    factor = sum(devices * value for devices, value in parts) / blueprint.devices
    return replace(
        outlook,
        ttft_ms=tuple(value * factor for value in outlook.ttft_ms),
        tbt_ms=outlook.tbt_ms * factor,
        requests_s=outlook.requests_s / factor,
    )


def _later(outlook: Outlook, factor: float) -> Outlook:
    return replace(outlook, ttft_ms=tuple(value * factor for value in outlook.ttft_ms))
