"""The simulated comparison of routing policies."""

import bench_routing
import pytest


@pytest.mark.parametrize("name", bench_routing.POLICIES)
def test_every_request_is_answered_whatever_the_policy(name: str) -> None:
    requests = bench_routing.workload(40, 3.0, 1)
    fleet = bench_routing.simulate(requests, bench_routing.SLOWNESS, bench_routing.POLICIES[name]())
    assert sum(replica.requests for replica in fleet.replicas) == 40
    assert fleet.own_requests == [0, 0, 0, 0]
    assert fleet.own_tokens == [0, 0, 0, 0]
    for request in requests:
        assert request.given == request.output_tokens
        assert request.first_ms > request.arrival_ms
        assert request.cached < request.prompt_tokens


def test_by_prefix_more_is_found_and_answered_sooner_than_in_turn() -> None:
    requests = bench_routing.workload(300, 3.0, 1)
    by_prefix = bench_routing.measure(requests, bench_routing.SLOWNESS, "prefix")
    in_turn = bench_routing.measure(requests, bench_routing.SLOWNESS, "round robin")
    assert by_prefix["found"] > 0.9
    assert by_prefix["cached"] > 1.1 * in_turn["cached"]
    assert by_prefix["p99"] < in_turn["p99"] / 2


def test_a_hot_prefix_is_spread() -> None:
    requests = bench_routing.hot_prefix(400, 20.0, 1)
    assert bench_routing.measure(requests, (1.0,) * 4, "prefix")["most"] < 1.3
