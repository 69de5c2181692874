"""The gateway's routing, called from Python."""

from typing import Any

import pytest

from scalellm._core import ReplicaLoad, Router, block_hashes
from scalellm.engine.kv_cache import extend_hashes

COST = (10.0, 0.1, 0.0, 0.5)  # fixed, token, attended, request, in ms


def test_hashes_are_those_of_the_engine() -> None:
    for salt in (b"", b"tenant"):
        expected: list[bytes] = []
        extend_hashes(expected, range(100), 16, salt)
        assert block_hashes(range(100), 16, salt) == expected


def test_the_router_is_the_gateways() -> None:
    router = Router("prefix")
    fleet = [ReplicaLoad(i, name=f"replica-{i}", block_size=16, cost=COST) for i in range(3)]
    hashes = block_hashes(range(160), 16)
    router.store(2, hashes[:5])
    route = router.pick(fleet, 160, 0.0, hashes=hashes, block_size=16, max_tokens=10)
    assert route is not None
    assert (route.index, route.policy, route.reason) == (2, "prefix", "prefix")
    assert route.cached_tokens == 80
    assert route.predicted_ms == pytest.approx(10 + 80 * 0.1 + 0.5)
    router.forget(2)
    router.remove(1, hashes)
    busy = [ReplicaLoad(i, backlog_tokens=1000 * (2 - i), cost=COST) for i in range(3)]
    route = router.pick(busy, 160, 10_000.0)
    assert route is not None
    assert (route.index, route.reason) == (2, "cold")
    assert router.pick([], 160, 0.0) is None


def test_measured_prompts_tell_the_speed_of_replicas_that_do_not() -> None:
    router = Router("least-load")
    fleet = [ReplicaLoad(0), ReplicaLoad(1)]
    assert router.predict_first_token_ms(fleet, 100, 0.0) is None
    router.observe_prefill(0, 100, 50.0, 0.0)
    router.observe_prefill(1, 100, 500.0, 0.0)
    router.observe_output(20, 0.0)
    assert router.predict_first_token_ms(fleet, 100, 0.0) == pytest.approx(50.0)
    route = router.pick(fleet, 100, 0.0)
    assert route is not None
    assert route.index == 0


def test_sessions_stay() -> None:
    fleet = [ReplicaLoad(i, cost=COST) for i in range(4)]
    routes = [Router("session").pick(fleet, 100, 0.0, session=f"s{i}") for i in (1, 1, 2, 3, 4, 5)]
    indices = [route.index for route in routes if route is not None]
    assert indices[0] == indices[1]
    assert len(set(indices)) > 1


def test_what_cannot_be_is_named() -> None:
    with pytest.raises(ValueError, match="least-load, prefix, shape, session"):
        Router("random")
    with pytest.raises(ValueError, match="16 bytes, not 3"):
        Router("prefix").store(0, [b"abc"])
    misspelt: dict[str, Any] = {"backlog": 3}
    with pytest.raises(TypeError, match="backlog"):
        ReplicaLoad(0, **misspelt)
