"""Where the waits go: every request's stages, their means, 99th percentiles and shares.

    TTFT   accept .. route | link out | queue | prefill: phases of the steps | emit | link back |
           detokenise | serialise | write | what none of them has | the way to the client
    token  phases of the engine's steps between two tokens | the gateway falling behind | the way

The engine works on the next step while the gateway hands a token on, so between two tokens the
gateway's own work costs nothing as long as it keeps up; `Beside` says how much that is. Parts that
vanish are predicted to take their time with them, and nothing else (Amdahl's law).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from scalellm.bench.profile_told import RequestTimes

CLIENT, GATEWAY, LINK, ENGINE = "client", "gateway", "link", "engine"
_WAY = "socket and client"
_BEFORE_ENGINE = (
    ("accept", GATEWAY),
    ("auth", GATEWAY),
    ("body", GATEWAY),
    ("parse", GATEWAY),
    ("admission", GATEWAY),
    ("safety", GATEWAY),
    ("text_queue", GATEWAY),
    ("template", GATEWAY),
    ("tokenise", GATEWAY),
    ("route", GATEWAY),
    ("link_out", LINK),
    ("queue", ENGINE),
)
_AFTER_ENGINE = (("emit", ENGINE), ("link_back", LINK))
# In the order in which a step does them; others stand between forward and sample.
_STEP_ORDER = ("between steps", "schedule", "prepare", "forward", "sample", "hand over", "update")

# What the gateway tells of a request, and what its client measured.
Joined = tuple[RequestTimes, Mapping[str, Any]]
Parts = dict[tuple[str, str], float]  # (place, stage) -> milliseconds of one request


@dataclass(frozen=True, slots=True)
class Share:
    """One stage over all requests. `p99_ms` is absent where only the mean is known."""

    place: str
    stage: str
    mean_ms: float
    p99_ms: float | None
    share: float  # of what the client measured

    def without_ms(self, whole_ms: float) -> float:
        """What the client would wait if this stage took no time."""
        return max(0.0, whole_ms - self.mean_ms)


@dataclass(frozen=True, slots=True)
class Waterfall:
    """A wait as the client measured it, split into stages that add up to it."""

    whole_ms: float  # the client's mean
    inside_ms: float  # what gateway and engine account for
    shares: tuple[Share, ...]

    @property
    def inside_share(self) -> float:
        return self.inside_ms / self.whole_ms if self.whole_ms else 0.0

    @property
    def largest(self) -> Share | None:
        return max(self.shares, key=lambda share: share.mean_ms, default=None)


def first_token(requests: Sequence[Joined]) -> Waterfall:
    """The wait for the first token."""
    return _waterfall(requests, _first_token_parts, "ttft_ms")


def between_tokens(requests: Sequence[Joined]) -> Waterfall:
    """The time of one token after the first."""
    return _waterfall(requests, _token_parts, "tbt_ms")


def whole_answer(first: Waterfall, token: Waterfall, tokens: float) -> Waterfall:
    """First token and `tokens` - 1 more, by cause: a step's phase counts wherever it was spent."""
    more = max(0.0, tokens - 1.0)
    sums: dict[tuple[str, str], float] = {}
    for waterfall, times in ((first, 1.0), (token, more)):
        for share in waterfall.shares:
            key = (share.place, share.stage.removeprefix("prefill: ").removeprefix("step: "))
            sums[key] = sums.get(key, 0.0) + share.mean_ms * times
    whole_ms = first.whole_ms + more * token.whole_ms
    shares = tuple(
        Share(place, stage, ms, None, ms / whole_ms if whole_ms else 0.0)
        for (place, stage), ms in sums.items()
    )
    return Waterfall(whole_ms, first.inside_ms + more * token.inside_ms, shares)


def beside(requests: Sequence[RequestTimes]) -> dict[str, float]:
    """What the gateway does for a token while the engine computes the next, mean milliseconds."""
    found: dict[str, float] = {}
    for stage in ("detokenise", "serialise", "write"):
        per_token = [
            _ms(request["stages_us"].get(stage, 0)) / request["output_tokens"]
            for request in requests
            if request["output_tokens"]
        ]
        found[stage] = float(np.mean(per_token)) if per_token else 0.0
    return found


def _first_token_parts(request: RequestTimes) -> Parts | None:
    stages, first, engine = request["stages_us"], request["first"], request["engine"]
    if not first or not engine:
        return None
    written_us = first["written_us"] or first["handed_us"]
    parts: Parts = {}
    for stage, place in _BEFORE_ENGINE:
        if stage in stages:
            parts[place, stage] = _ms(stages[stage])
    parts |= _steps(engine["prefill_us"], "prefill: ", 1, stages.get("prefill", 0))
    for stage, place in _AFTER_ENGINE:
        parts[place, stage] = _ms(stages.get(stage, 0))
    parts[GATEWAY, "detokenise"] = _ms(first["detokenise_us"])
    parts[GATEWAY, "serialise"] = _ms(first["serialise_us"])
    parts[GATEWAY, "write"] = _ms(written_us - first["handed_us"])
    parts[GATEWAY, "between stages"] = _ms(written_us) - sum(parts.values())
    return parts


def _token_parts(request: RequestTimes) -> Parts | None:
    engine, tokens = request["engine"], request["longest_choice_tokens"]
    if not engine or engine["decode_us"] is None or tokens < 2:
        return None
    in_gateway_us = request["last_tokens_us"] - request["stages_us"]["first"]
    in_engine_us = engine["finished_us"] - engine["first_token_us"]
    parts = _steps(engine["decode_us"], "step: ", tokens - 1, in_engine_us)
    parts[GATEWAY, "falling behind"] = _ms(in_gateway_us - in_engine_us) / (tokens - 1)
    return parts


def _steps(phases_us: Mapping[str, int], prefix: str, times: int, whole_us: int) -> Parts:
    """A step's phases in order; what they lack of the whole is one of its own."""

    def order(phase: str) -> tuple[int, str]:
        name = phase.split("/")[0]
        return (_STEP_ORDER.index(name) if name in _STEP_ORDER else 3, phase)

    parts = {
        (ENGINE, prefix + phase): _ms(phases_us[phase]) / times
        for phase in sorted(phases_us, key=order)
    }
    parts[ENGINE, prefix + "not told"] = _ms(whole_us - sum(phases_us.values())) / times
    return parts


def _waterfall(
    requests: Sequence[Joined], parts_of: Callable[[RequestTimes], Parts | None], wait: str
) -> Waterfall:
    """Means over requests that both sides tell; a stage that one did not pass took it no time."""
    parts: list[Parts] = []
    waits_ms: list[float] = []
    for told, measured in requests:
        found = parts_of(told)
        if found is not None and measured[wait] is not None:
            way = {(CLIENT, _WAY): measured[wait] - sum(found.values())}
            parts.append(found | way)
            waits_ms.append(measured[wait])
    if not parts:
        return _all_unknown([measured[wait] for _, measured in requests if measured[wait]])
    names = list(dict.fromkeys(name for request in parts for name in request))
    # The way to the client is last, whatever stages some requests have alone.
    names.sort(key=lambda name: name[0] == CLIENT)
    times = np.array([[request.get(name, 0.0) for name in names] for request in parts])
    client_ms = float(np.mean(waits_ms))
    inside_ms = client_ms - float(times[:, -1].mean())

    def of_client(ms: float) -> float:
        return ms / client_ms if client_ms else 0.0

    shares = []
    for column, (place, stage) in enumerate(names):
        mean_ms = float(times[:, column].mean())
        p99_ms = float(np.percentile(times[:, column], 99))
        if stage.endswith("not told") and not times[:, column].any():
            continue
        shares.append(Share(place, stage, mean_ms, p99_ms, of_client(mean_ms)))
    return Waterfall(client_ms, inside_ms, tuple(shares))


def _all_unknown(waits_ms: Sequence[float]) -> Waterfall:
    """Of requests whose parts nobody tells."""
    if not waits_ms:
        return Waterfall(0.0, 0.0, ())
    mean_ms, p99_ms = float(np.mean(waits_ms)), float(np.percentile(waits_ms, 99))
    return Waterfall(mean_ms, 0.0, (Share(CLIENT, _WAY, mean_ms, p99_ms, 1.0),))


def _ms(us: float) -> float:
    return us / 1e3
