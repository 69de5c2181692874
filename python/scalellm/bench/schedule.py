"""What one level sends and when: shapes in order, and for an open loop their times."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from scalellm.bench.arrivals import parse_arrivals
from scalellm.bench.plan import CLIENTS, MAX_PROMPTS, TRACE, Client, Level, Workload
from scalellm.bench.shapes import RequestShape
from scalellm.bench.sources import Recorded
from scalellm.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Schedule:
    """The first `Level.warmup` shapes are the warm-up's; the others belong to `send_at_s`."""

    shapes: tuple[RequestShape, ...]
    send_at_s: tuple[float, ...] | None


def schedule(level: Level, workload: Workload, number: int) -> Schedule:
    """Draw level `number` of a run; equal seeds and numbers give equal schedules.

    Shapes beyond MAX_PROMPTS are not drawn: prompts are then sent again, from the first.
    Raises ConfigError for a level without sends.
    """
    random = np.random.default_rng((workload.seed, number))
    warmup = _mixed(workload, min(level.warmup, MAX_PROMPTS), random)
    # What the warm-up says must not warm a prefix cache for what is measured.
    warmup = [replace(shape, blocks=()) for shape in warmup]
    send_at_s = None
    if level.rate is None:
        measured = _mixed(workload, level.prompts_wanted(), random)
    elif level.arrivals == TRACE:
        measured, send_at_s = _trace(level, workload)
    elif level.arrivals == CLIENTS:
        measured, send_at_s = _clients(level, level.rate, workload.clients, random)
    else:
        arrivals = parse_arrivals(level.arrivals)
        found = arrivals.times_s(level.rate, random, level.requests, level.duration_s)
        send_at_s = [float(time_s) for time_s in found]
        measured = workload.requests.draw(min(len(send_at_s), MAX_PROMPTS), random)
    return Schedule((*warmup, *measured), None if send_at_s is None else tuple(send_at_s))


def trace_rate(shapes: Sequence[RequestShape], speed: float) -> float:
    """Mean requests a second of a trace that is played `speed` times as fast."""
    last_s = max(shape.offset_s or 0.0 for shape in shapes) / speed
    return len(shapes) / last_s if last_s > 0 else float(len(shapes))


def _trace(level: Level, workload: Workload) -> tuple[list[RequestShape], list[float]]:
    """The recording's own times, stretched so that its mean rate is the level's."""
    source = workload.requests
    if not isinstance(source, Recorded) or source.kind != "trace":
        raise ConfigError("arrivals: trace needs a trace")
    shapes = source.shapes
    stretch = trace_rate(shapes, 1.0) / (level.rate or 1.0)
    until_s = level.duration_s or float("inf")
    sends = [(shape, (shape.offset_s or 0.0) * stretch) for shape in shapes]
    sends = [(shape, at_s) for shape, at_s in sends if at_s < until_s][: level.requests]
    return [shape for shape, _ in sends], [at_s for _, at_s in sends]


def _clients(
    level: Level, rate: float, clients: Sequence[Client], random: np.random.Generator
) -> tuple[list[RequestShape], list[float]]:
    """All clients' sends by time; their rates are scaled so that they add up to `rate`."""
    scale = rate / sum(client.rate for client in clients)
    sends: list[tuple[float, RequestShape]] = []
    for client in clients:
        arrivals = parse_arrivals(client.arrivals)
        number, until_s = level.requests, level.duration_s
        times_s = arrivals.times_s(client.rate * scale, random, number, until_s)
        shapes = client.source.draw(min(len(times_s), MAX_PROMPTS), random)
        sends += [
            (float(time_s), replace(shapes[at % len(shapes)], client=client.name))
            for at, time_s in enumerate(times_s)
        ]
    sends.sort(key=lambda send: send[0])
    sends = sends[: level.requests]
    return [shape for _, shape in sends], [time_s for time_s, _ in sends]


def _mixed(workload: Workload, number: int, random: np.random.Generator) -> list[RequestShape]:
    """Requests without times: of the one source, or of each client by its share."""
    if number == 0 or not workload.clients:
        return workload.requests.draw(number, random)
    rates = np.array([client.rate for client in workload.clients])
    which = random.choice(len(rates), number, p=rates / rates.sum())
    drawn = [client.source.draw(number, random) for client in workload.clients]
    return [
        replace(drawn[client][at], client=workload.clients[client].name)
        for at, client in enumerate(which)
    ]
