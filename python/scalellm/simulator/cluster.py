"""The gateway's and the controller's part: routing, the queue before the engines, switches.

    send --front--> held (while full or switching) --> routed --> replica ... --> served
                                                          ^                         |
                                                          '------ followers --------'

A switch: sends are held, every replica ends its step, the pause passes, and on the new replicas
what was running goes on with the tokens it had (its context is computed again), then what was held.
"""

import heapq
import itertools
import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial

from scalellm.controller.blueprint.cost import Calibration
from scalellm.controller.blueprint.journal import Policy
from scalellm.controller.blueprint.measured import Measured
from scalellm.controller.blueprint.shape import Blueprint
from scalellm.engine.kv_cache import extend_hashes
from scalellm.engine.request import Request
from scalellm.engine.step import Output
from scalellm.errors import ConfigError
from scalellm.simulator.metrics import Metrics
from scalellm.simulator.replica import SimulatedReplica
from scalellm.simulator.requests import Load, Send
from scalellm.simulator.routing import Routing

PLACES_PER_SLOT = 2.0  # as the gateway's own
MAX_QUEUED = 1024
_LOOK_EVERY_MS = 1000.0


@dataclass(slots=True)
class Served:
    """One request's life."""

    send: Send
    first_ms: float = math.nan
    end_ms: float = math.nan
    cached_tokens: int = 0  # of the prompt
    output_tokens: int = 0
    moves: int = 0
    failed: str = ""
    stopped_ms: float = math.nan  # while it is between two shapes

    @property
    def ttft_ms(self) -> float:
        return self.first_ms - self.send.at_ms

    @property
    def tbt_ms(self) -> float:
        """NaN for an answer of one token."""
        more = self.output_tokens - 1
        return (self.end_ms - self.first_ms) / more if more > 0 else math.nan


@dataclass(frozen=True, slots=True)
class Switch:
    at_ms: float
    done_ms: float
    blueprint: Blueprint
    moved: int  # requests that were running or waiting in the engines


@dataclass(slots=True)
class Run:
    """Everything that happened."""

    calibration: Calibration
    blueprint: Blueprint  # at the beginning
    served: list[Served] = field(default_factory=list)
    switches: list[Switch] = field(default_factory=list)
    gaps_ms: list[float] = field(default_factory=list)  # of moved requests, between two tokens
    span_ms: float = 0.0  # first send to last token
    busy_device_ms: float = 0.0
    steps: int = 0
    preemptions: int = 0
    prefix_hit_tokens: int = 0


@dataclass(slots=True)
class _Switching:
    began_ms: float
    blueprint: Blueprint
    moved: list[Request] = field(default_factory=list)
    stopped_ms: float = 0.0
    done_ms: float = math.inf


class Cluster:
    """One deployment and its load; `run` plays it to the last answer."""

    def __init__(
        self,
        load: Load,
        calibration: Calibration,
        blueprint: Blueprint,
        *,
        routing: str = "least-load",
        policy: Policy | None = None,
        exact: bool = False,
    ) -> None:
        """`policy` may change the blueprint; `exact` computes every step by itself."""
        self._load = load
        self._calibration = calibration
        self._policy = policy
        self._exact = exact
        self._routing = Routing(routing)
        most = self._routing.most_replicas
        if len(blueprint.replicas) > most:
            raise ConfigError(f"{blueprint}: {routing} tells at most {most} replicas apart")
        self._blueprint = blueprint
        self._replicas = self._make(blueprint)
        self._places = self._count_places()
        self._run = Run(calibration, blueprint)
        self._metrics = Metrics()
        self._measured = Measured()
        self._keys = itertools.count(1)
        self._order = itertools.count()
        self._sends: list[tuple[float, int, Send]] = []
        self._ends: list[tuple[float, int]] = []
        self._held: deque[Request] = deque()
        self._live: dict[int, Served] = {}
        self._in_engines = 0
        self._switching: _Switching | None = None

    def run(self) -> Run:
        run = self._run
        for send in self._load.first():
            self._push(send)
        begin_ms = self._sends[0][2].at_ms if self._sends else 0.0
        look_ms = begin_ms if self._policy else math.inf
        now_ms = begin_ms
        while self._sends or self._live:
            ends_ms = self._next_end()
            arrives_ms = self._sends[0][0] if self._sends else math.inf
            resumes_ms = self._switching.done_ms if self._switching else math.inf
            now_ms = min(ends_ms, arrives_ms, resumes_ms, look_ms)
            if now_ms == ends_ms:
                self._end_work(heapq.heappop(self._ends)[1], now_ms)
            elif now_ms == resumes_ms:
                self._resume(now_ms)
            elif now_ms == arrives_ms:
                self._arrive(heapq.heappop(self._sends)[2], now_ms)
            else:
                self._look(now_ms)
                look_ms += _LOOK_EVERY_MS
        run.span_ms = now_ms - begin_ms
        self._account(self._replicas)
        run.served.sort(key=lambda served: served.send.at_ms)
        return run

    # ------------------------------------------------------------ requests

    def _push(self, send: Send) -> None:
        at_ms = send.at_ms + self._calibration.front_ms
        heapq.heappush(self._sends, (at_ms, next(self._order), send))

    def _arrive(self, send: Send, now_ms: float) -> None:
        served = Served(send)
        self._run.served.append(served)
        if len(self._held) >= MAX_QUEUED:
            served.failed = "the queue was full"
            self._follow(served, (), now_ms)
            return
        request = Request(
            next(self._keys),
            send.prompt_ids,
            send.output_tokens,
            arrival_us=round(now_ms * 1e3),
        )
        self._live[request.key] = served
        self._held.append(request)
        self._let_in(now_ms)

    def _let_in(self, now_ms: float) -> None:
        """Route what is held while there are places."""
        while self._held and self._in_engines < self._places and self._switching is None:
            self._route(self._held.popleft(), now_ms)

    def _route(self, request: Request, now_ms: float) -> None:
        if self._load.shares_prefixes:
            size = self._replicas[0].shape.block_size
            extend_hashes(request.block_hashes, request.token_ids, size, b"")
        index = self._routing.pick(self._replicas, request, now_ms)
        replica = self._replicas[index]
        was_idle = replica.is_idle
        self._in_engines += 1
        outputs = replica.submit(request, now_ms)
        heapq.heappush(self._ends, (replica.ends_ms, index))
        if was_idle:
            self._change_pace(index, now_ms)
        self._take(outputs, now_ms)

    def _take(self, outputs: Iterable[Output], now_ms: float) -> None:
        for output in outputs:
            request = output.request
            served = self._live[request.key]
            if output.token_ids:
                if math.isnan(served.first_ms):
                    served.first_ms = now_ms
                    served.cached_tokens = request.cached_tokens
                if not math.isnan(served.stopped_ms):
                    gap_ms = now_ms - served.stopped_ms
                    self._run.gaps_ms.append(gap_ms)
                    self._metrics.went_on(gap_ms)
                    served.stopped_ms = math.nan
            if output.finish_reason is not None:
                self._finish(request, served, output.error or "", now_ms)

    def _finish(self, request: Request, served: Served, error: str, now_ms: float) -> None:
        del self._live[request.key]
        self._in_engines -= 1
        served.end_ms, served.failed = now_ms, error
        served.output_tokens = request.num_output_tokens
        self._metrics.ended(
            *(request.num_prompt_tokens, served.cached_tokens, served.output_tokens),
            *(served.ttft_ms, served.tbt_ms),
        )
        if not error:
            self._routing.finished(request, now_ms)
        self._follow(served, request.token_ids[request.num_prompt_tokens :], now_ms)

    def _follow(self, served: Served, answer_ids: Iterable[int], now_ms: float) -> None:
        for send in self._load.followers(served.send, tuple(answer_ids), now_ms):
            self._push(send)

    # ------------------------------------------------------------ replicas

    def _make(self, blueprint: Blueprint) -> list[SimulatedReplica]:
        return [
            SimulatedReplica(
                self._calibration.shapes[tp],
                prefix_caching=self._load.shares_prefixes,
                exact=self._exact,
                others_busy=partial(self._others_busy, index),
            )
            for index, tp in enumerate(blueprint.replicas)
        ]

    def _others_busy(self, index: int) -> int:
        """How many devices of other replicas compute now."""
        others = self._replicas[:index] + self._replicas[index + 1 :]
        return sum(found.shape.tp for found in others if not found.is_idle)

    def _change_pace(self, index: int, now_ms: float) -> None:
        """A replica began or ended computing: the next steps of others take another time."""
        for other, replica in enumerate(self._replicas):
            if other != index and replica.shape.beside > 1.0 and not replica.is_idle:
                replica.interrupt(now_ms)
                heapq.heappush(self._ends, (replica.ends_ms, other))

    def _count_places(self) -> int:
        return int(PLACES_PER_SLOT * sum(found.shape.max_num_seqs for found in self._replicas))

    def _next_end(self) -> float:
        """When the next replica's work ends; entries of work that ended sooner are dropped."""
        while self._ends:
            ends_ms, index = self._ends[0]
            if index < len(self._replicas) and self._replicas[index].ends_ms == ends_ms < math.inf:
                return ends_ms
            heapq.heappop(self._ends)
        return math.inf

    def _end_work(self, index: int, now_ms: float) -> None:
        replica = self._replicas[index]
        if self._switching is not None:
            self._stop(replica, now_ms)
            return
        outputs = replica.finish_work()
        heapq.heappush(self._ends, (replica.ends_ms, index))
        self._routing.cached(index, replica)
        if replica.is_idle:
            self._change_pace(index, now_ms)
        self._take(outputs, now_ms)
        self._let_in(now_ms)

    def _account(self, replicas: Iterable[SimulatedReplica]) -> None:
        for replica in replicas:
            self._run.busy_device_ms += replica.busy_ms * replica.shape.tp
            self._run.steps += replica.steps
            self._run.preemptions += replica.scheduler.num_preemptions
            self._run.prefix_hit_tokens += replica.scheduler.prefix_hit_tokens

    # ------------------------------------------------------------ switches

    def _look(self, now_ms: float) -> None:
        """Read the metrics as the controller does, and let the policy decide."""
        if self._policy is None:
            return
        reading = self._metrics.reading(now_ms, self._replicas, len(self._held))
        if self._switching is not None:
            self._measured.read(reading)
            return
        decision = self._policy.decide(self._measured.signals(reading, self._blueprint))
        if decision.switch:
            self.switch(decision.blueprint, now_ms)

    def switch(self, blueprint: Blueprint, now_ms: float) -> None:
        """Begin to change the shape."""
        self._switching = _Switching(now_ms, blueprint, stopped_ms=now_ms)
        for index, replica in enumerate(self._replicas):
            if replica.is_idle:
                self._stop(replica, now_ms)
            else:
                replica.interrupt(now_ms)
                heapq.heappush(self._ends, (replica.ends_ms, index))

    def _stop(self, replica: SimulatedReplica, now_ms: float) -> None:
        switching = self._switching
        if switching is None:
            return
        outputs, left = replica.stop()
        self._take(outputs, now_ms)
        for request in left:
            self._live[request.key].stopped_ms = now_ms
        switching.moved += left
        switching.stopped_ms = max(switching.stopped_ms, now_ms)
        if all(found.is_idle for found in self._replicas):
            switching.done_ms = switching.stopped_ms + self._calibration.switch_ms

    def _resume(self, now_ms: float) -> None:
        """The new replicas are there: send on what was moved, then what was held."""
        switching, self._switching = self._switching, None
        if switching is None:
            return
        self._account(self._replicas)
        self._ends.clear()
        self._routing.forget(max(len(self._replicas), len(switching.blueprint.replicas)))
        self._blueprint = switching.blueprint
        self._replicas = self._make(self._blueprint)
        self._places = self._count_places()
        moved = sorted(switching.moved, key=lambda request: request.order)
        self._in_engines -= len(moved)
        self._run.switches.append(
            Switch(switching.began_ms, now_ms, switching.blueprint, len(moved))
        )
        for request in moved:
            served = self._live.pop(request.key)
            served.moves += 1
            again = Request(
                next(self._keys),
                request.prompt_ids,
                request.max_tokens,
                resume_ids=request.token_ids[request.num_prompt_tokens :],
                arrival_us=request.arrival_us,
            )
            self._live[again.key] = served
            self._route(again, now_ms)
        self._let_in(now_ms)
