"""What a blueprint would make of a load: time to first token, between tokens, and its capacity.

A replica that gets `r` requests a second, each of I prompt and O output tokens, spends the share
rho = r * prompt(I) of its time on prompts; what is left makes a token in step(n) / (1 - rho). In
the steady state it holds as many streams as arrive while one lasts:

    n = r * O * step(n) / (1 - rho)          step(n): of n streams with the mean context

The cost is a line that bends upwards, so n is found in closed form. There is no such n beyond
the rate at which all the replica's places are taken:

    capacity = n_max / (O * step(n_max) + n_max * prompt(I))
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from scalellm.controller.blueprint.cost import Calibration, ShapeCost
from scalellm.controller.blueprint.shape import Blueprint


@dataclass(frozen=True, slots=True)
class Demand:
    """A load, of all replicas together."""

    requests_s: float
    concurrency: float  # requests that are there now
    waiting: float
    prompt_tokens: tuple[float, ...]  # of equally likely requests
    output_tokens: float
    backlog_tokens: float = 0.0  # of prompts that wait to be computed
    seen_held_tokens: float = 0.0  # of the KV cache, by a stream, as measured; 0: not known

    @property
    def mean_prompt(self) -> float:
        return sum(self.prompt_tokens) / max(1, len(self.prompt_tokens))

    @property
    def context_tokens(self) -> float:
        """Of the mean stream, halfway through its answer."""
        return self.mean_prompt + self.output_tokens / 2

    @property
    def held_tokens(self) -> float:
        """What a stream takes of the KV cache: no less than it is seen to take now."""
        return max(self.context_tokens, self.seen_held_tokens)


@dataclass(frozen=True, slots=True)
class Outlook:
    """What one blueprint would make of a demand."""

    ttft_ms: tuple[float, ...]  # by prompt of the demand
    tbt_ms: float
    capacity_requests_s: float
    load: float  # requests_s / capacity; above 1 the queue grows
    requests_s: float  # that a closed loop of the demand's concurrency would get

    def request_ms(self, output_tokens: float) -> float:
        """Of the mean request, from its arrival to its end."""
        first_ms = sum(self.ttft_ms) / len(self.ttft_ms)
        return first_ms + max(0.0, output_tokens - 1) * self.tbt_ms


def predict(
    blueprint: Blueprint, demand: Demand, calibration: Calibration, horizon_s: float
) -> Outlook:
    """The outlook of the blueprint's groups together, each with its share of the capacity.

    Requests that pile up are counted as many as they are after `horizon_s`."""
    shapes = [(group.count, calibration.shapes[group.tp]) for group in blueprint.groups]
    capacities = [_capacity(shape, demand) for _, shape in shapes]
    total = sum(count * capacity for (count, _), capacity in zip(shapes, capacities, strict=True))
    found: list[tuple[int, float, Outlook]] = []
    for (count, shape), capacity in zip(shapes, capacities, strict=True):
        share = count * capacity / total
        outlook = _replica(shape, _share(demand, share / count), capacity, horizon_s)
        found.append((count, share, outlook))
    return _together(found, total, demand.requests_s, calibration.front_ms)


def _share(demand: Demand, share: float) -> Demand:
    return replace(
        demand,
        requests_s=demand.requests_s * share,
        concurrency=demand.concurrency * share,
        waiting=demand.waiting * share,
        backlog_tokens=demand.backlog_tokens * share,
    )


def _together(
    parts: Sequence[tuple[int, float, Outlook]],
    capacity: float,
    requests_s: float,
    front_ms: float,
) -> Outlook:
    """`parts`: a group's number of replicas, its share of the demand, and one replica's outlook."""
    ttft_ms = tuple(
        front_ms + sum(share * value for (_, share, _), value in zip(parts, values, strict=True))
        for values in zip(*(outlook.ttft_ms for _, _, outlook in parts), strict=True)
    )
    return Outlook(
        ttft_ms,
        sum(share * outlook.tbt_ms for _, share, outlook in parts),
        capacity,
        requests_s / capacity,
        sum(count * outlook.requests_s for count, _, outlook in parts),
    )


def _prompt_ms(shape: ShapeCost, demand: Demand) -> float:
    costs = [shape.cost.prompt_ms(tokens) for tokens in demand.prompt_tokens]
    return sum(costs) / max(1, len(costs))


def _capacity(shape: ShapeCost, demand: Demand) -> float:
    """Requests a second of one replica whose places are all taken."""
    streams = shape.streams(demand.held_tokens)
    decode_ms = demand.output_tokens * shape.cost.decode_ms(streams, demand.context_tokens)
    return 1e3 * streams / (decode_ms + streams * _prompt_ms(shape, demand))


def _replica(shape: ShapeCost, demand: Demand, capacity: float, horizon_s: float) -> Outlook:
    context, prompt_ms = demand.context_tokens, _prompt_ms(shape, demand)
    most = shape.streams(demand.held_tokens)
    load = demand.requests_s / capacity
    # Beyond its capacity requests pile up: in free places, which slows all, then in the queue.
    there = demand.concurrency + capacity * horizon_s * max(0.0, load - 1.0)
    steady = steady_streams(shape, demand) if load < 1 else 0.0
    streams = min(most, max(1.0, steady, there))
    prompt_share = min(0.9, min(demand.requests_s, capacity) * prompt_ms / 1e3)
    step_ms = shape.cost.decode_ms(streams, context)
    tbt_ms = step_ms / (1.0 - prompt_share)
    beside = 2.0 if streams > 1.5 else 1.0  # a prompt gets as much time as the streams beside it
    queue_ms = prompt_share / (1.0 - prompt_share) * prompt_ms / 2
    if streams > 1.5:
        queue_ms += step_ms / 2
    queue_ms += 1e3 * max(0.0, there - most) / capacity
    # Prompts that wait in the steady state, and for a place; or those that are there, if more.
    queue_ms = max(queue_ms, prompt_ms * demand.backlog_tokens / max(1.0, demand.mean_prompt))
    ttft_ms = tuple(
        queue_ms
        + shape.cost.base_ms
        + _steps_ms(shape, tokens)
        + beside * shape.cost.prompt_ms(tokens)
        for tokens in demand.prompt_tokens
    )
    closed = min(most, demand.concurrency)
    beside_ms = max(1.0, closed) * prompt_ms
    request_ms = demand.output_tokens * shape.cost.decode_ms(max(1.0, closed), context) + beside_ms
    return Outlook(ttft_ms, tbt_ms, capacity, load, 1e3 * closed / request_ms)


def _steps_ms(shape: ShapeCost, tokens: float) -> float:
    """A long prompt takes several steps, each with its own base."""
    return shape.cost.base_ms * math.floor(tokens / shape.max_num_batched_tokens)


def steady_streams(shape: ShapeCost, demand: Demand) -> float:
    """Streams that one replica holds in the steady state; infinite if there is none."""
    cost, context = shape.cost, demand.context_tokens
    prompt_share = demand.requests_s * _prompt_ms(shape, demand) / 1e3
    if prompt_share >= 1.0:
        return math.inf
    turn = demand.requests_s * demand.output_tokens / 1e3 / (1.0 - prompt_share)
    # Where the cost is the maximum of lines, so is what each of them would hold.
    return max(_root(turn, at_0, slope) for at_0, slope in cost.decode_lines(context))


def _root(turn: float, base: float, slope: float) -> float:
    """n = turn * (base + slope * n)"""
    left = 1.0 - turn * slope
    return turn * base / left if left > 0.0 else math.inf
