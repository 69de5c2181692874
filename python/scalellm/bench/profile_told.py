"""What a gateway tells of its last requests and its engines' last steps.

    GET /admin/v1/profile                        the number of the next request to end
    GET /admin/v1/profile?from=N                 requests from that number on, as far as kept
    GET /admin/v1/profile?steps_after_us=T       steps that began after a Unix time

The gateway keeps both always (crates/gateway, recent.rs); asking is what costs.
"""

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scalellm.bench.target import TargetClient
from scalellm.errors import EndpointError

PATH = "/admin/v1/profile"
MAX_REQUESTS = 4096  # that a gateway keeps
_SETTLED_WITHIN_S = 5.0
_LOOK_EVERY_S = 0.05

RequestTimes = Mapping[str, Any]  # one request, as the gateway tells it
StepTimes = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class ReplicaSteps:
    """The kept steps of one replica, or why it did not tell them."""

    replica: str
    steps: tuple[StepTimes, ...]
    problem: str | None


def next_request(client: TargetClient, is_scalellm: bool) -> int | None:
    """The number of the request that ends next; None where nothing is told: not a ScaleLLM.

    Raises EndpointError where a ScaleLLM does not tell it to this client.
    """
    try:
        told = client.call("GET", PATH)
        return int(told["next"])
    except EndpointError as error:
        if is_scalellm:
            raise EndpointError(f"{error}; is it the endpoint's --admin-key?") from None
        return None
    except (KeyError, TypeError, ValueError):
        return None


def requests_since(client: TargetClient, first: int, ids: Collection[str]) -> list[RequestTimes]:
    """The requests of these ids, as far as they are told.

    A request's record is there a moment after its client has read the end, so this waits for them.
    """
    until = time.monotonic() + _SETTLED_WITHIN_S
    while True:
        told = client.call("GET", f"{PATH}?from={first}")["requests"]
        found = [request for request in told if request["id"] in ids and request["first"]]
        if len(found) >= len(ids) or time.monotonic() > until:
            return found
        time.sleep(_LOOK_EVERY_S)


def steps_since(client: TargetClient, after_us: int) -> list[ReplicaSteps]:
    told: Sequence[Any] = client.call("GET", f"{PATH}?steps_after_us={after_us}")["replicas"]
    return [
        ReplicaSteps(str(entry["replica"]), tuple(entry["steps"]), entry["problem"])
        for entry in told
    ]
