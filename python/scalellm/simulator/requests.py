"""The requests of a simulation: who sends what and when, and what follows an answer.

Open       open loops one after the other: a rate, a trace, or the hours of a day
Closed     so many clients, each sends when its answer is there
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from scalellm.bench.plan import Level, Workload
from scalellm.bench.schedule import schedule
from scalellm.bench.shapes import RequestShape, TurnShape, cut
from scalellm.bench.sources import Source
from scalellm.errors import ConfigError

_DRAWN = 512  # shapes of a closed loop drawn at a time


@dataclass(frozen=True, slots=True)
class Send:
    """One request on its way to the gateway."""

    at_ms: float
    prompt_ids: Sequence[int]
    output_tokens: int
    turns: tuple[TurnShape, ...] = ()  # what the user says after the answer
    client: int = 0


class Load(Protocol):
    """What arrives; `followers` is asked at each answer's end."""

    @property
    def shares_prefixes(self) -> bool: ...

    @property
    def span_ms(self) -> float:
        """Until when requests are sent."""
        ...

    def first(self) -> list[Send]:
        """All that is known to be sent before any answer, by time."""
        ...

    def followers(self, send: Send, answer_ids: Sequence[int], now_ms: float) -> list[Send]:
        """What an answer that ended at `now_ms` leads to."""
        ...


@dataclass(slots=True)
class Speller:
    """Ids for shapes: equal content ids of blocks give equal ids, all else is unlike."""

    max_tokens: int
    _unlike: int = field(default=1 << 24, init=False)

    def spell(self, shape: RequestShape) -> tuple[list[int], int]:
        """The prompt's ids and the answer's length, made to fit the context."""
        fitting = cut(shape, self.max_tokens)
        ids: list[int] = []
        if shape.system_id is not None:
            ids += [1 + shape.system_id] * shape.system_tokens
        for block in shape.blocks:
            ids += [1 << 16 | block & 0xFFFF_FFF] * shape.block_tokens
        wanted = fitting.input_tokens + (0 if shape.system_id is None else shape.system_tokens)
        ids = ids[:wanted]
        ids += self.unlike(wanted - len(ids))
        return ids[: self.max_tokens - fitting.output_tokens], fitting.output_tokens

    def unlike(self, tokens: int) -> list[int]:
        """Ids that nobody else has said."""
        self._unlike += 1
        return [self._unlike] * max(0, tokens)


def _shares(shape: RequestShape) -> bool:
    return bool(shape.blocks or shape.turns or shape.system_id is not None)


def _send(at_ms: float, shape: RequestShape, speller: Speller, client: int = 0) -> Send:
    ids, output_tokens = speller.spell(shape)
    return Send(at_ms, ids, output_tokens, shape.turns, client)


def _next_turn(
    send: Send, answer_ids: Sequence[int], now_ms: float, speller: Speller
) -> Send | None:
    """The user's answer to an answer, with all that was said before; None at the end."""
    if not send.turns:
        return None
    turn, *rest = send.turns
    said = [*send.prompt_ids, *answer_ids, *speller.unlike(turn.input_tokens)]
    if len(said) + turn.output_tokens > speller.max_tokens:
        return None
    at_ms = now_ms + 1e3 * turn.after_s
    return Send(at_ms, said, turn.output_tokens, tuple(rest), send.client)


class Open:
    """Open loops one after the other, each as `bench` would send it."""

    def __init__(self, parts: Sequence[tuple[Level, Workload]], max_tokens: int) -> None:
        """Every level has a rate. Raises ConfigError for one without sends."""
        self._speller = Speller(max_tokens)
        self._sends: list[Send] = []
        self.shares_prefixes = False
        begin_ms = 0.0
        for number, (level, workload) in enumerate(parts):
            drawn = schedule(level, workload, number)
            shapes, times_s = drawn.shapes[level.warmup :], drawn.send_at_s or ()
            for at, time_s in enumerate(times_s):
                shape = shapes[at % len(shapes)]
                self._sends.append(_send(begin_ms + 1e3 * time_s, shape, self._speller))
            begin_ms += 1e3 * (level.duration_s or max(times_s))
            self.shares_prefixes |= any(_shares(shape) for shape in shapes)
        self.span_ms = begin_ms

    def first(self) -> list[Send]:
        return self._sends

    def followers(self, send: Send, answer_ids: Sequence[int], now_ms: float) -> list[Send]:
        following = _next_turn(send, answer_ids, now_ms, self._speller)
        return [] if following is None else [following]


class Closed:
    """`clients` of them, each with one request at a time, until so many have been sent; they begin
    evenly over `ramp_s`."""

    def __init__(
        self,
        source: Source,
        clients: int,
        requests: int | None,
        span_s: float | None,
        max_tokens: int,
        seed: int = 0,
        ramp_s: float = 0.0,
    ) -> None:
        if requests is None and span_s is None:
            raise ConfigError("a closed loop needs a number of requests or a duration")
        self._source = source
        self._clients = clients
        self._left = requests
        self._until_ms = float("inf") if span_s is None else 1e3 * span_s
        self._ramp_ms = 1e3 * ramp_s
        self._speller = Speller(max_tokens)
        self._random = np.random.default_rng(seed)
        self._drawn: list[RequestShape] = []
        self._shapes = iter(self._drawn)
        self.shares_prefixes = _shares(self._next())

    @property
    def span_ms(self) -> float:
        return self._until_ms

    def _next(self) -> RequestShape:
        shape = next(self._shapes, None)
        if shape is None:
            self._shapes = iter(self._source.draw(_DRAWN, self._random))
            shape = next(self._shapes)
        return shape

    def _one(self, at_ms: float, client: int) -> list[Send]:
        if at_ms >= self._until_ms or self._left == 0:
            return []
        if self._left is not None:
            self._left -= 1
        return [_send(at_ms, self._next(), self._speller, client)]

    def first(self) -> list[Send]:
        clients = self._clients if self._left is None else min(self._clients, self._left)
        gap_ms = self._ramp_ms / max(1, clients)
        return [send for client in range(clients) for send in self._one(gap_ms * client, client)]

    def followers(self, send: Send, answer_ids: Sequence[int], now_ms: float) -> list[Send]:
        following = _next_turn(send, answer_ids, now_ms, self._speller)
        return self._one(now_ms, send.client) if following is None else [following]
