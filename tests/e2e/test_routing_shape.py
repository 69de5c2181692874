"""A wide replica beside a narrow one: who gets which request, by `--routing shape`."""

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from typing import Any

import pytest

from scalellm import _core
from scalellm.controller.gateway_view import parse_metrics

from ..integration.made_models import LARGER, made_model
from ..integration.served import Serve
from .wire import call

WIDTHS = (2, 1)  # of the replicas, as --replica names them
SHORT = "Once upon a time there was"
LONG = SHORT * 400
# What a clear case bears: a wide replica that were to win with so many requests does so with none.
BESIDE = 2
LEARN_S = 60.0


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serve]:
    folder = tmp_path_factory.mktemp("serve")
    model = made_model(folder / "model", **LARGER, max_position_embeddings=8192)
    made = Serve(
        folder,
        *("--replica", "tp=2,count=1", "--replica", "tp=1,count=1", "--devices", "3"),
        *("--cpu-threads", "3", "--routing", "shape", "--load-format", "dummy"),
        *("--kv-cache-memory", "256MiB", "--packed-cache", str(folder / "packed")),
        model=f"demo={model}",
    )
    yield made
    made.close()


def ask(served: Serve, prompt: str, seed: int = 0) -> tuple[dict[str, str], int, list[int]]:
    """The fields of the route, the prompt's tokens, and the ids of a sampled answer."""
    body = {
        "model": "demo",
        "prompt": prompt,
        "max_tokens": 16,
        "ignore_eos": True,
        "seed": seed,
        "return_token_ids": True,
    }
    reply = call(served.url, "/v1/completions", body, headers={"x-scalellm-route": "1"})
    assert reply.status == HTTPStatus.OK, reply.body
    answer = reply.json()
    fields = reply.headers["x-scalellm-route"].split("; ")
    route = dict(field.split("=", 1) for field in fields)
    return route, answer["usage"]["prompt_tokens"], answer["choices"][0]["token_ids"]


def replicas(served: Serve) -> list[dict[str, Any]]:
    found = json.loads(call(served.url, "/admin/v1/replicas").body)
    return sorted(found["models"][0]["replicas"], key=lambda one: str(one["address"]))


def learn(served: Serve) -> list[list[list[int]]]:
    """Each replica alone, so that it measures its steps; its answers.

    Until both have, a lonely request goes to the wide one whatever it costs."""
    answers = []
    for alone in replicas(served):
        for other in replicas(served):
            if other != alone:
                body = {"model": "demo", "address": other["address"]}
                reply = call(served.url, "/admin/v1/replicas/drain", body)
                assert reply.status == HTTPStatus.OK, reply.body
        routes, ids = [], []
        for at_once in (1, 2, 4, 1):
            with ThreadPoolExecutor(at_once) as clients:
                prompts = [SHORT * (1 + 32 * at) for at in range(at_once)]
                for route, _, found in clients.map(lambda prompt: ask(served, prompt), prompts):
                    routes.append(route)
                    ids.append(found)
        assert {(one["replica"], one["reason"]) for one in routes} == {(alone["name"], "only")}
        answers.append(ids)
        reply = call(served.url, "/admin/v1/reload", {})  # takes the draining back
        assert reply.status == HTTPStatus.OK, reply.body
    return answers


def policys_reason(served: Serve, prompt_tokens: int, beside: int) -> str:
    """What the policy says of the costs that the replicas tell, with requests `beside` on each."""
    samples = parse_metrics(call(served.url, "/metrics").body.decode())
    told = [one for one in samples if one.name == "scalellm_replica_step_cost_ms"]
    loads = []
    for at, (replica, width) in enumerate(zip(replicas(served), WIDTHS, strict=True)):
        of = {
            one.labels["of"]: one.value
            for one in told
            if one.labels["replica"] == replica["address"]
        }
        cost = (of["step"], of["token"], of["attended"], of["request"])
        loads.append(
            _core.ReplicaLoad(at, tensor_parallel_size=width, cost=cost, steps=1, running=beside)
        )
    route = _core.Router("shape").pick(loads, prompt_tokens, 0.0, max_tokens=16)
    assert route is not None
    return route.reason


def clear_cases(
    served: Serve, prompt: str, reason: str, replica: str, number: int
) -> list[tuple[int, list[int]]]:
    """Seeds and answers of requests for which the costs leave no doubt, and which went as they say.

    Measurements on a busy machine may turn at any time: what turned meanwhile says nothing."""
    found: list[tuple[int, list[int]]] = []
    end = time.monotonic() + LEARN_S
    tokens = ask(served, prompt)[1]

    def is_clear() -> bool:
        few, many = (tokens, BESIDE) if reason == "wide" else (tokens // 2, 0)
        return policys_reason(served, few, many) == reason

    while len(found) < number:
        if time.monotonic() > end:
            pytest.skip(f"others compute: nothing is clearly {reason}")
        if not is_clear():
            learn(served)
            continue
        route, _, ids = ask(served, prompt, seed=len(found))
        if is_clear():
            assert (route["policy"], route["reason"]) == ("shape", reason)
            assert route["replica"] == replica
            found.append((len(found), ids))
    return found


@pytest.mark.slow
@pytest.mark.needs("two-cores")
@pytest.mark.timeout(300)
def test_short_work_goes_to_the_wide_replica_and_long_work_to_the_narrow_one(both: Serve) -> None:
    wide, narrow = (one["name"] for one in replicas(both))
    by_wide, by_narrow = learn(both)
    assert by_wide == by_narrow
    answers = clear_cases(both, SHORT, "wide", wide, 3)
    clear_cases(both, LONG, "narrow", narrow, 1)

    body = {"model": "demo", "address": replicas(both)[0]["address"]}
    assert call(both.url, "/admin/v1/replicas/drain", body).status == HTTPStatus.OK
    for seed, ids in answers:
        route, _, others = ask(both, SHORT, seed)
        assert (route["reason"], route["replica"], others) == ("only", narrow, ids)
