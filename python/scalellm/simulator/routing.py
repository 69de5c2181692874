"""The gateway's routing (crates/routing) over simulated replicas."""

from collections.abc import Sequence

from scalellm import _core
from scalellm.controller.blueprint.shape import MAX_DEVICES
from scalellm.engine.request import Request
from scalellm.simulator.replica import SimulatedReplica

_MAX_INDEXED = 128  # replicas that the router's index of prefixes tells apart
POLICIES = ("least-load", "prefix", "shape", "session")
_NEED_PREFIXES = ("prefix", "session")


class Routing:
    """One model's router; replicas are named by their place in the list."""

    def __init__(self, policy: str) -> None:
        self._router = _core.Router(policy)
        self._by_prefix = policy in _NEED_PREFIXES

    @property
    def most_replicas(self) -> int:
        return _MAX_INDEXED if self._by_prefix else MAX_DEVICES

    def pick(self, replicas: Sequence[SimulatedReplica], request: Request, now_ms: float) -> int:
        """The place of the replica for a request that is sent now."""
        if len(replicas) == 1:
            return 0
        hashes = request.block_hashes if self._by_prefix else None
        route = self._router.pick(
            [_load(index, replica) for index, replica in enumerate(replicas)],
            request.num_prompt_tokens,
            now_ms,
            max_tokens=request.max_tokens,
            hashes=hashes,
            block_size=replicas[0].shape.block_size,
        )
        return 0 if route is None else route.index

    def finished(self, request: Request, now_ms: float) -> None:
        self._router.observe_output(request.num_output_tokens, now_ms)

    def cached(self, index: int, replica: SimulatedReplica) -> None:
        """Tell what the replica's prefix cache has gained and lost."""
        stored, removed = replica.scheduler.kv.take_events()
        if self._by_prefix:
            self._router.store(index, [digest for _, digest in stored])
            self._router.remove(index, removed)

    def forget(self, replicas: int) -> None:
        """The first `replicas` places belong to new ones."""
        for index in range(replicas):
            self._router.forget(index)


def _load(index: int, replica: SimulatedReplica) -> _core.ReplicaLoad:
    scheduler, shape = replica.scheduler, replica.shape
    cost = shape.cost
    return _core.ReplicaLoad(
        index,
        running=scheduler.num_running,
        waiting=scheduler.num_waiting,
        backlog_tokens=scheduler.backlog_tokens,
        step_ms=replica.step_ms,
        steps=replica.steps,
        max_num_seqs=shape.max_num_seqs,
        tensor_parallel_size=shape.tp,
        block_size=shape.block_size,
        cost=(cost.base_ms, cost.per_token_ms, cost.per_context_ms, cost.per_sequence_ms),
        own_requests=scheduler.num_running + scheduler.num_waiting,
    )
