"""What a step costs on a replica of one shape: a few coefficients, read from a calibration file.

    ms = base + per_token * max(0, tokens - free_tokens) + per_attended * attended
         + per_read * read + per_sequence * sequences + per_crowded * max(0, sequences - crowd)

tokens       computed in the step: one for each stream, and those of prompts' chunks
free_tokens  tokens that are computed while the weights are read, which takes the time up to them
attended     sum over tokens of the positions that each attends to: the attention's arithmetic
read         sum over streams and chunks of the positions whose keys and values are read: memory
sequences    streams and chunks in the step
crowd        sequences up to which another one is nearly free (waiting for the other devices takes
             the time); 0 where the cost is one straight line
"""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from importlib import resources
from pathlib import Path
from typing import Any

from scalellm.errors import ConfigError

_SUFFIX = ".toml"


@dataclass(frozen=True, slots=True)
class StepCost:
    """The coefficients, in milliseconds for one of each."""

    base_ms: float
    per_token_ms: float = 0.0
    per_attended_ms: float = 0.0
    per_sequence_ms: float = 0.0
    per_crowded_ms: float = 0.0
    crowd: int = 0
    per_read_ms: float = 0.0
    free_tokens: int = 0

    def step_ms(self, tokens: float, attended: float, sequences: float, read: float) -> float:
        return (
            self.base_ms
            + self.per_token_ms * max(0.0, tokens - self.free_tokens)
            + self.per_attended_ms * attended
            + self.per_read_ms * read
            + self.per_sequence_ms * sequences
            + self.per_crowded_ms * max(0.0, sequences - self.crowd)
        )

    @property
    def per_context_ms(self) -> float:
        """Of a stream's step, for each position of its context."""
        return self.per_attended_ms + self.per_read_ms

    def decode_ms(self, sequences: float, context_tokens: float) -> float:
        """Of a step in which so many streams, each with so much context, get a token."""
        context = sequences * context_tokens
        return self.step_ms(sequences, context, sequences, context)

    def decode_lines(self, context_tokens: float) -> list[tuple[float, float]]:
        """Straight lines in the number of streams, (at 0, slope), whose maximum `decode_ms` is."""
        slope = self.per_context_ms * context_tokens + self.per_sequence_ms
        lines = [(self.base_ms, slope)]
        for each_ms, free in (
            (self.per_token_ms, self.free_tokens),
            (self.per_crowded_ms, self.crowd),
        ):
            if each_ms > 0.0:
                lines += [(at - each_ms * free, by + each_ms) for at, by in lines]
        return lines

    def prompt_ms(self, tokens: float) -> float:
        """What a prompt adds to the steps that compute it, beside others."""
        attended = tokens * tokens / 2
        return (
            self.per_token_ms * tokens + self.per_attended_ms * attended + self.per_read_ms * tokens
        )


@dataclass(frozen=True, slots=True)
class ShapeCost:
    """A replica of `tp` devices: its steps' cost, and what its engine holds."""

    tp: int
    cost: StepCost
    max_num_seqs: int
    max_num_batched_tokens: int
    step_budget_ms: float
    kv_tokens: int
    block_size: int = 16
    max_model_len: int = 131_072
    beside: float = 1.0  # a step's time while others on the host compute, by its time alone
    others: int = 0  # devices of those others

    def pace(self, busy: int) -> float:
        """What `busy` other devices of the host make of a step's time; more than `others` count as
        those."""
        return 1.0 + (self.beside - 1.0) * min(1.0, busy / max(1, self.others))

    def streams(self, held_tokens: float) -> float:
        """Most that run at once if each holds so many positions of the KV cache."""
        return max(1.0, min(float(self.max_num_seqs), self.kv_tokens / max(1.0, held_tokens)))


@dataclass(frozen=True, slots=True)
class Calibration:
    """Everything the policy and the simulator know of one model on one kind of machine."""

    name: str
    source: str  # "measured" or "derived"
    note: str
    shapes: Mapping[int, ShapeCost]  # by tp
    front_ms: float = 0.0  # socket, gateway and link, added to every first token
    switch_ms: float = 1000.0  # in which nothing runs while the shape changes

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple(sorted(self.shapes))


def shipped() -> tuple[str, ...]:
    """Names of the calibrations that come with ScaleLLM."""
    folder = resources.files(__package__) / "calibrations"
    names = (entry.name for entry in folder.iterdir())
    return tuple(sorted(name.removesuffix(_SUFFIX) for name in names if name.endswith(_SUFFIX)))


def read_calibration(name: str) -> Calibration:
    """One of `shipped`, or a file. Raises ConfigError naming what is wrong with it."""
    if name in shipped():
        entry = resources.files(__package__) / "calibrations" / (name + _SUFFIX)
        return parse_calibration(entry.read_text(encoding="utf-8"), name)
    path = Path(name)
    if not path.is_file():
        known = ", ".join(shipped())
        raise ConfigError(f"calibration: got {name!r}, allowed: a file, or one of {known}")
    try:
        return parse_calibration(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"calibration: {path}: {error}") from None


def parse_calibration(text: str, origin: str) -> Calibration:
    """Read the text of a calibration file. Raises ConfigError."""
    try:
        found = tomllib.loads(text)
        shapes = found.pop("shapes")
        read = {int(shape["tp"]): _shape(dict(shape)) for shape in shapes}
        calibration = Calibration(shapes=read, **found)
    except (tomllib.TOMLDecodeError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"calibration: {origin}: {error}") from None
    if not read:
        raise ConfigError(f"calibration: {origin}: needs at least one [[shapes]]")
    return calibration


def _shape(found: dict[str, Any]) -> ShapeCost:
    names = {entry.name for entry in fields(StepCost)}
    cost = StepCost(**{name: found.pop(name) for name in names & found.keys()})
    shape = ShapeCost(cost=cost, **found)
    numbers = [getattr(cost, entry.name) for entry in fields(cost)]
    if not all(isinstance(value, int | float) and value >= 0 for value in numbers):
        raise ValueError(f"tp = {shape.tp}: every coefficient must be a number, at least 0")
    if not shape.beside >= 1:
        raise ValueError(f"tp = {shape.tp}: got beside = {shape.beside}, allowed: 1 or more")
    if cost.decode_ms(1, 1) <= 0:
        raise ValueError(f"tp = {shape.tp}: a step must take time")
    return shape


def calibration_toml(calibration: Calibration, comment: str = "") -> str:
    """The text of a calibration file that reads back as `calibration`."""
    lines = [f"# {line}".rstrip() for line in comment.splitlines()]
    lines += [
        f"name = {_quoted(calibration.name)}",
        f"source = {_quoted(calibration.source)}",
        f"note = {_quoted(calibration.note)}",
        f"front_ms = {calibration.front_ms:.4g}",
        f"switch_ms = {calibration.switch_ms:.4g}",
    ]
    for tp in calibration.widths:
        shape = calibration.shapes[tp]
        lines += ["", "[[shapes]]", f"tp = {tp}"]
        lines += [f"{e.name} = {getattr(shape.cost, e.name):.6g}" for e in fields(StepCost)]
        rest = (entry.name for entry in fields(ShapeCost) if entry.name not in ("tp", "cost"))
        lines += [f"{name} = {getattr(shape, name)!r}" for name in rest]
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'
