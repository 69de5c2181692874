"""Moves a deployment from one blueprint to another while it serves.

    steady --policy switches--> starting --all new are ready--> handing over --old are gone-.
       ^                           | one of the new is given up                            |
       '---------------------------'-------------------------------------------------------'

The new shape starts beside the old one, which serves until every new replica is ready. Then the
old replicas are told to hand over: they take no new requests, and give those that they run back at
a pace (engine/hand_over.py); what is left after `hand_over_s` follows at once. All of it goes on at
the new replicas, from the tokens that its clients have.

Where memory is not enough for the caches of both, the new replicas only stand by at first, with
all but their memory. Then the old ones give everything back at once, and when they are gone the
new ones are let go; requests wait in the gateway meanwhile.

Where a switch stands follows from the root's facts alone (which replicas are wanted, which are the
target, which run), and what the policy remembers from the state file, so that a restarted
controller goes on.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from scalellm.controller.blueprint.cost import parse_calibration
from scalellm.controller.blueprint.journal import Policy, state_json, state_of_json
from scalellm.controller.blueprint.measured import Measured
from scalellm.controller.blueprint.policy import Settings, State
from scalellm.controller.blueprint.reading import reading_of
from scalellm.controller.blueprint.shape import Blueprint, Group
from scalellm.controller.gateway_view import Sample
from scalellm.controller.state_file import write_state

DECIDE_EVERY_S = 1.0
_JOURNAL_BYTES = 16 << 20  # some five hours of decisions
WISH_SUFFIX = ".wish.json"  # of the state file's name: what an operator asked the gateway for
_KILL_AFTER_S = 10.0  # beyond the hand-over, for an engine that does not end
_ENDINGS = ("hand over", "stop", "kill")


class Steering:
    """Of one model. `widths` gives each replica that may be wanted its tensor-parallel width."""

    def __init__(self, plan: Mapping[str, Any], order: Callable[[dict[str, Any]], None]) -> None:
        self._model = str(plan["model"])
        self._widths: dict[str, int] = plan["widths"]
        self._is_after = plan["switch"] == "after"
        self._hand_over_s = 0.0 if self._is_after else float(plan["hand_over_s"])
        self._order = order
        self._state_file = Path(plan["state_file"])
        self._wish_file = self._state_file.with_suffix(WISH_SUFFIX)
        self._measured = Measured()
        self._decided_s = -DECIDE_EVERY_S
        self._ending_s: dict[str, tuple[float, int]] = {}  # since when, signals sent
        self._last: dict[str, Any] = {}
        self._candidates = [Blueprint.of_json(found) for found in plan["candidates"]]
        journal = Path(plan["journal"]) if plan["journal"] else None
        self._policy = Policy(
            parse_calibration(plan["calibration"], "plan"),
            Settings(**plan["settings"]),
            self._candidates,
            time.monotonic(),
            journal,
            self._remembered(),
            _JOURNAL_BYTES,
        )

    def _remembered(self) -> State | None:
        """What the policy of the controller before this one knew; its clock is this one's too."""
        try:
            return state_of_json(json.loads(self._state_file.read_text(encoding="utf-8"))["policy"])
        except (OSError, ValueError, KeyError, TypeError):
            return None  # this is the first, or the file is lost: it begins anew

    def _wish(self) -> Blueprint | None:
        """The blueprint that an operator wants; None while the policy decides."""
        try:
            wish = json.loads(self._wish_file.read_text(encoding="utf-8"))["blueprint"]
            blueprint = None if wish is None else Blueprint.of_json(wish)
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return blueprint if blueprint in self._candidates else None

    def look(
        self,
        facts: Mapping[str, Mapping[str, Any]],
        states: Mapping[str, str],
        samples: Sequence[Sample],
    ) -> None:
        """Go one step on; `states` are those in which the gateway sees the replicas, by name.

        Facts and samples of other models are passed over."""
        now_s = time.monotonic()
        facts = {name: found for name, found in facts.items() if name in self._widths}
        samples = [found for found in samples if self._is_of_model(found)]
        target = [name for name, found in facts.items() if found["target"]]
        wanted = [name for name, found in facts.items() if found["wanted"]]
        running = [name for name, found in facts.items() if found["running"]]
        lost = {name: found["given_up"] for name, found in facts.items() if found["given_up"]}
        # What is given up is not waited for: without it the rest goes on, and may change its shape.
        kept = [name for name in target if name not in lost]
        held = [name for name in kept if facts[name]["held"]]
        standing_by = [name for name in kept if facts[name]["standing_by"]]
        ready = all(_is_there(facts[name], states.get(name)) for name in kept)
        phase = "steady"
        if set(wanted) != set(target):
            phase = "starting"
            if first := next((name for name in target if name in lost), None):
                back = [name for name in wanted if name not in target]
                self._want(back, back, f"{first} could not start: {self._name(back)} stays")
            elif ready:
                why = f"{self._name(target)} is ready and takes over"
                self._want(target, target, why, held)
        ending = [name for name in running if name not in wanted]
        self._end(ending, now_s)
        if ending:
            phase = "handing over"
        elif phase == "steady" and (held or standing_by):
            phase = "handing over"
            for name in held:
                self._order({"type": "go", "name": name})
        elif phase == "steady" and not kept:
            self._replace(target, lost)
        if now_s - self._decided_s >= DECIDE_EVERY_S:
            self._decided_s = now_s
            if phase == "steady" and kept and ready:
                self._decide(now_s, samples, target, kept, facts)
            else:
                self._measured.read(reading_of(now_s, samples))
        self._tell(phase, target, wanted, lost)

    def _decide(
        self,
        now_s: float,
        samples: Sequence[Sample],
        target: Sequence[str],
        kept: Sequence[str],
        facts: Mapping[str, Mapping[str, Any]],
    ) -> None:
        present = self._shape(kept)
        signals = self._measured.signals(reading_of(now_s, samples), present)
        self._last = {"signals": signals.to_json()}
        wish = self._wish()
        barred = {}
        for found in self._candidates:
            lost = [name for name in self._replicas(found) if facts[name]["given_up"]]
            if lost:
                barred[found] = f"{lost[0]} was given up"
        self._last["barred"] = {str(found): why for found, why in barred.items()}
        if wish is None:
            decision = self._policy.decide(signals, barred)
            self._last["decision"] = decision.to_json()
            best, reason = decision.blueprint, decision.reason
        else:
            self._last["wish"] = wish.to_json()
            best, reason = wish, "an operator wants it"
            if wish != present:
                self._policy.moved(now_s, present)
        if best == present or best in barred:
            return
        new = self._replicas(best)
        held = new if self._is_after else ()
        self._want([*target, *new], new, f"{present} -> {best}: {reason}", held)

    def _replace(self, target: Sequence[str], lost: Mapping[str, str]) -> None:
        """All of the shape is given up: to the one of which most is left, if there is any."""

        def left(names: Sequence[str]) -> float:
            return sum(name not in lost for name in names) / len(names)

        new = max((self._replicas(found) for found in self._candidates), key=left)
        if left(new) > 0:
            why = f"{self._name(target)} -> {self._name(new)}: {target[0]} was given up"
            self._want(new, new, why)

    def _end(self, ending: Sequence[str], now_s: float) -> None:
        """At once, after `hand_over_s`, and for what does not hear."""
        self._ending_s = {name: self._ending_s.get(name, (now_s, 0)) for name in ending}
        for name, (since_s, sent) in self._ending_s.items():
            due = 1 + (now_s - since_s >= self._hand_over_s)
            due += now_s - since_s >= self._hand_over_s + _KILL_AFTER_S
            if sent < due:
                self._order({"type": "end", "name": name, "reason": _ENDINGS[sent]})
                self._ending_s[name] = (since_s, sent + 1)

    def _is_of_model(self, sample: Sample) -> bool:
        labels = sample.labels
        name = labels.get("model") or labels.get("gen_ai_request_model", self._model)
        return name == self._model

    def pause_s(self) -> float:
        """How long to wait for news at most."""
        return 0.1 if self._ending_s else DECIDE_EVERY_S

    def _want(
        self, wanted: Sequence[str], target: Sequence[str], why: str, held: Sequence[str] = ()
    ) -> None:
        self._order(
            {
                "type": "want",
                "of": [*self._widths],
                "wanted": [*wanted],
                "target": [*target],
                "held": [*held],
                "why": why,
            }
        )

    def _shape(self, names: Sequence[str]) -> Blueprint:
        return Blueprint.of(Group(self._widths[name], 1) for name in names)

    def _name(self, names: Sequence[str]) -> str:
        return str(self._shape(names))

    def _replicas(self, blueprint: Blueprint) -> list[str]:
        """The replicas that make up a blueprint; there are enough of each width."""
        found: list[str] = []
        for group in blueprint.groups:
            fitting = [name for name, tp in self._widths.items() if tp == group.tp]
            found += fitting[: group.count]
        return found

    def _tell(
        self,
        phase: str,
        target: Sequence[str],
        wanted: Sequence[str],
        lost: Mapping[str, str],
    ) -> None:
        """Write where it stands for `/admin/v1/blueprint` and `scalellm status`."""
        state = {
            "mode": "auto",
            "switch": "after" if self._is_after else "beside",
            "phase": phase,
            "blueprint": self._shape(target).to_json(),
            "replicas": sorted(wanted),
            "given_up": dict(lost),
            "candidates": [found.to_json() for found in self._candidates],
            "policy": state_json(self._policy.state),
            **self._last,
        }
        with suppress(OSError):  # it says less than it could, and the deployment goes on
            write_state(self._state_file, state)


def _is_there(facts: Mapping[str, Any], state: str | None) -> bool:
    """Whether the old shape can go: it serves, or needs but the memory that others have."""
    return bool(facts["standing_by"] if facts["held"] else facts["ready"] and state == "ready")
