"""Sixty-four clients at once on one engine, and its end under load.

In float32: no answer should hang on how a bfloat16 product is rounded in a batch of another size.
"""

import asyncio
import signal
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import openai
import pytest

from ..integration.served import Serve
from ..integration.supervised import alive, descendants, until
from .wire import complete, is_at_rest, load

CROWD = 64
LENGTH = 16  # tokens of an answer
WORDS = ("Once", "One", "Mia", "The", "What", "A", "Tell", "Hello", "In", "Max", "It", "She")


@dataclass(frozen=True, slots=True)
class Asked:
    """One client's request."""

    prompt: str
    seed: int | None = None  # None: greedy
    max_tokens: int = LENGTH

    def fields(self) -> dict[str, Any]:
        return {
            "model": "demo",
            "prompt": self.prompt,
            "max_tokens": self.max_tokens,
            "temperature": 0 if self.seed is None else 1,
            "seed": self.seed,
            "extra_body": {"ignore_eos": True, "return_token_ids": True},
        }


@dataclass(frozen=True, slots=True)
class Got:
    """One stream: its ids, and how it ended; None when it did not."""

    token_ids: tuple[int, ...]
    finish_reason: str | None


@pytest.fixture(scope="module")
def crowded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serve]:
    made = Serve(
        tmp_path_factory.mktemp("serve"),
        *("--dtype", "float32", "--kv-cache-memory", "64MiB", "--drain-timeout", "120"),
    )
    yield made
    made.close()


@asynccontextmanager
async def client_of(server: Serve) -> AsyncIterator[openai.AsyncOpenAI]:
    made = openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="any", max_retries=0)
    async with made:
        yield made


async def read(client: openai.AsyncOpenAI, asked: Asked, leave_after: int | None = None) -> Got:
    """Read a stream to its end, or leave it once `leave_after` tokens are there."""
    ids: list[int] = []
    reason = None
    stream = await client.completions.create(stream=True, **asked.fields())
    async with stream:
        async for chunk in stream:
            (choice,) = chunk.choices
            found: list[int] = choice.model_dump()["token_ids"]
            ids += found
            reason = choice.finish_reason or reason
            if leave_after is not None and len(ids) >= leave_after:
                break
    return Got(tuple(ids), reason)


async def alone(client: openai.AsyncOpenAI, asked: list[Asked]) -> list[Got]:
    """One after the other."""
    return [await read(client, request) for request in asked]


def run(work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(work)


def greedy(count: int) -> list[Asked]:
    """Requests of different prompts, some of which begin alike."""
    words = [f"{first} {second.lower()}" for first in WORDS for second in WORDS]
    return [Asked(prompt) for prompt in words[:count]]


@pytest.fixture(scope="module")
def single(crowded: Serve) -> list[Got]:
    """What each of the crowd is told when nobody else is there."""

    async def told() -> list[Got]:
        async with client_of(crowded) as client:
            return await alone(client, greedy(CROWD))

    found: list[Got] = run(told())
    return found


def test_64_streams_are_what_each_would_be_alone(crowded: Serve, single: list[Got]) -> None:
    async def all_at_once() -> list[Got]:
        async with client_of(crowded) as client:
            return await asyncio.gather(*(read(client, one) for one in greedy(CROWD)))

    assert run(all_at_once()) == single
    assert {(len(got.token_ids), got.finish_reason) for got in single} == {(LENGTH, "length")}
    assert len({got.token_ids for got in single}) > CROWD // 2
    until(lambda: is_at_rest(crowded.url))


def test_a_seed_draws_the_same_alone_again_and_in_a_crowd(crowded: Serve) -> None:
    asked = [Asked("Once upon a time", seed) for seed in (0, 1, 2, -1, 2**63 - 1, 12345)]

    async def thrice() -> list[list[Got]]:
        async with client_of(crowded) as client:
            first, again = await alone(client, asked), await alone(client, asked)
            others = [read(client, one) for one in greedy(26)]
            crowd = await asyncio.gather(*(read(client, one) for one in asked), *others)
            return [first, again, crowd[: len(asked)]]

    first, again, crowd = run(thrice())
    assert first == again == crowd
    assert len({got.token_ids for got in first}) == len(asked)
    until(lambda: is_at_rest(crowded.url))


def test_half_of_the_crowd_leaves_and_the_rest_notices_nothing(
    crowded: Serve, single: list[Got]
) -> None:
    stay = greedy(CROWD // 2)
    leave = [Asked(one.prompt + " and", max_tokens=1500) for one in stay]

    async def half() -> tuple[list[Got], list[Got]]:
        async with client_of(crowded) as client:
            staying = [read(client, one) for one in stay]
            leaving = [read(client, one, leave_after=1 + i % 8) for i, one in enumerate(leave)]
            together = await asyncio.gather(*staying, *leaving)
            return together[: len(stay)], together[len(stay) :]

    before = load(crowded.url)["output_tokens_total"]
    stayed, left = run(half())
    assert stayed == single[: len(stay)]
    assert all(got.finish_reason is None for got in left)
    until(lambda: is_at_rest(crowded.url))
    generated = load(crowded.url)["output_tokens_total"] - before
    assert generated < len(leave) * 1500 / 4
    assert load(crowded.url)["waiting_requests"] == 0


def test_sigterm_under_load_loses_no_accepted_request(crowded: Serve) -> None:
    pids = descendants(crowded.process.pid)
    asked = [Asked(one.prompt, max_tokens=100) for one in greedy(16)]

    async def under_load() -> list[Got]:
        async with client_of(crowded) as client:
            running = [asyncio.create_task(read(client, one)) for one in asked]
            while load(crowded.url)["running_requests"] < len(asked):
                await asyncio.sleep(0.02)
            crowded.process.send_signal(signal.SIGTERM)
            while (refusal := await asyncio.to_thread(complete, crowded.url)).status == 200:
                await asyncio.sleep(0.02)
            assert refusal.status == 503
            assert refusal.error["code"] == "draining"
            assert int(refusal.headers["retry-after"]) > 0
            assert not any(task.done() for task in running)
            return await asyncio.gather(*running)

    got = run(under_load())
    assert [(len(one.token_ids), one.finish_reason) for one in got] == [(100, "length")] * 16
    assert crowded.process.wait(30) == 0, crowded.errors()[-2000:]
    until(lambda: not any(alive(pid) for pid in pids))
    assert list(crowded.runtime.iterdir()) == []
    assert "Traceback" not in crowded.errors()
