"""Every decision with its inputs, as JSON lines, so that it can be taken again.

{"journal": 2, "calibration": TOML text, "settings": {...}, "candidates": [[{"tp","count"}], ...]}
{"signals": {...}, "barred": [...] if there are any, "state": {...}, "decision": {...}}
...

Every file begins with such a head, so that each can be taken by itself.
"""

import json
import math
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from scalellm.controller.blueprint.cost import Calibration, calibration_toml, parse_calibration
from scalellm.controller.blueprint.policy import Decision, Settings, State, decide
from scalellm.controller.blueprint.shape import Blueprint
from scalellm.controller.blueprint.signals import Signals
from scalellm.errors import ConfigError

VERSION = 2


class Journal:
    """Appends to a file; one that is full becomes NAME.1, in the place of an older one."""

    def __init__(self, file: Path, head: Mapping[str, Any], most_bytes: float) -> None:
        self._file: Path | None = file
        self._head = _line(head)
        self._most_bytes = most_bytes
        self._has_begun = False

    def write(self, record: Mapping[str, Any]) -> None:
        if self._file is None:
            return
        try:
            self._append(self._file, _line(record))
        except OSError as error:
            # Nobody serves from a journal: a full disk must not end the deployment.
            sys.stderr.write(f"the blueprint's journal ends here: {error}\n")
            self._file = None

    def _append(self, file: Path, line: str) -> None:
        if file.exists() and file.stat().st_size + len(line) > self._most_bytes:
            file.replace(file.with_name(f"{file.name}.1"))
        is_whole = self._has_begun and file.exists()
        with file.open("a", encoding="utf-8") as stream:
            stream.write(line if is_whole else self._head + line)
        self._has_begun = True


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record, separators=(",", ":")) + "\n"


class Policy:
    """The policy with its state, each decision appended to `journal` if there is one."""

    def __init__(
        self,
        calibration: Calibration,
        settings: Settings,
        candidates: Sequence[Blueprint],
        now_s: float,
        journal: Path | None = None,
        state: State | None = None,
        journal_bytes: float = math.inf,
    ) -> None:
        """`state`: that of an earlier policy over the same deployment, to go on with;
        `journal_bytes`: of a file, before the next begins."""
        # As the journal's reader will see it: text keeps six digits of a coefficient.
        text = calibration_toml(calibration)
        self._calibration = parse_calibration(text, calibration.name)
        self._settings = settings
        self._candidates = tuple(candidates)
        self._state = State(now_s) if state is None else state
        head = {
            "journal": VERSION,
            "calibration": text,
            "settings": asdict(settings),
            "candidates": [found.to_json() for found in candidates],
        }
        self._journal = None if journal is None else Journal(journal, head, journal_bytes)

    @property
    def state(self) -> State:
        return self._state

    def moved(self, now_s: float, left: Blueprint) -> None:
        """The deployment left a blueprint, as somebody else decided."""
        self._state = replace(self._state, since_s=now_s, left=left, candidate=None)

    def decide(self, signals: Signals, barred: Collection[Blueprint] = ()) -> Decision:
        """`barred`: candidates that cannot be had now."""
        before = self._state
        candidates = _allowed(self._candidates, barred, signals.blueprint)
        decision, self._state = decide(
            signals, before, candidates, self._calibration, self._settings
        )
        if self._journal is not None:
            told = {"barred": [found.to_json() for found in barred]} if barred else {}
            self._journal.write(
                {
                    "signals": signals.to_json(),
                    **told,
                    "state": state_json(before),
                    "decision": decision.to_json(),
                }
            )
        return decision


def _allowed(
    candidates: Sequence[Blueprint], barred: Collection[Blueprint], present: Blueprint
) -> Sequence[Blueprint]:
    """What is there may stay, whatever else is barred."""
    return [found for found in candidates if found not in barred] or [present]


def replay(path: Path) -> Iterator[tuple[Signals, dict[str, Any], Decision]]:
    """Take every decision of a journal again: its inputs, what was decided, what is decided now.

    A journal may hold several runs, each with its own head. Raises ConfigError naming the line."""
    head: tuple[Calibration, Settings, tuple[Blueprint, ...]] | None = None
    for number, line in _lines(path):
        try:
            record = json.loads(line)
            if "journal" in record:
                head = _head(record)
                continue
            if head is None:
                raise ValueError("a decision before the journal's head")
            calibration, settings, candidates = head
            signals, state = Signals.of_json(record["signals"]), state_of_json(record["state"])
            barred = [Blueprint.of_json(found) for found in record.get("barred", ())]
            told = dict(record["decision"])
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path}, line {number}: not of a journal: {error}") from None
        allowed = _allowed(candidates, barred, signals.blueprint)
        yield signals, told, decide(signals, state, allowed, calibration, settings)[0]


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        with path.open(encoding="utf-8") as file:
            yield from enumerate(file, start=1)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from None


def _head(record: dict[str, Any]) -> tuple[Calibration, Settings, tuple[Blueprint, ...]]:
    if record["journal"] != VERSION:
        raise ValueError(f"version {record['journal']}, allowed: {VERSION}")
    candidates = tuple(Blueprint.of_json(found) for found in record["candidates"])
    calibration = parse_calibration(record["calibration"], "journal")
    return calibration, Settings(**record["settings"]), candidates


def state_json(state: State) -> dict[str, Any]:
    def shape(blueprint: Blueprint | None) -> Any:
        return None if blueprint is None else blueprint.to_json()

    return {
        "since_s": state.since_s,
        "left": shape(state.left),
        "candidate": shape(state.candidate),
        "candidate_since_s": state.candidate_since_s,
        "factors": {str(tp): value for tp, value in state.factors.items()},
        "ttft_factor": state.ttft_factor,
        "pause_ms": state.pause_ms,
    }


def state_of_json(found: dict[str, Any]) -> State:
    """Raises KeyError, TypeError or ValueError for what is none."""

    def shape(groups: Any) -> Blueprint | None:
        return None if groups is None else Blueprint.of_json(groups)

    return State(
        found["since_s"],
        shape(found["left"]),
        shape(found["candidate"]),
        found["candidate_since_s"],
        {int(tp): value for tp, value in found["factors"].items()},
        found["ttft_factor"],
        found["pause_ms"],
    )
