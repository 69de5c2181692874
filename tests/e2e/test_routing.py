"""Two replicas: a conversation stays where its beginning is cached."""

import json
from collections.abc import Iterator

import pytest

from ..integration.served import Serve
from ..integration.supervised import until
from .wire import call

STORY = "Tell me a story about Mia, who has a red ball and a small dog, and goes out to play. " * 3


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serve]:
    folder = tmp_path_factory.mktemp("serve")
    made = Serve(folder, "--replicas", "2", "--kv-cache-memory", "64MiB")
    yield made
    made.close()


def turn(url: str, messages: list[dict[str, str]]) -> tuple[str, dict[str, str], int]:
    """The answer, the fields of its route, and how many prompt tokens were cached."""
    body = {"model": "demo", "messages": messages, "max_tokens": 24, "ignore_eos": True}
    reply = call(url, "/v1/chat/completions", body, headers={"x-scalellm-route": "1"})
    answer = json.loads(reply.body)
    fields = reply.headers["x-scalellm-route"].split("; ")
    cached = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
    text = answer["choices"][0]["message"]["content"]
    return text, dict(field.split("=", 1) for field in fields), cached


def metric(url: str, name: str, label: str = "") -> float:
    """The sum of a metric's lines that have the label."""
    lines = call(url, "/metrics").body.decode().splitlines()
    values = (line for line in lines if line.startswith(name + "{") and label in line)
    return sum(float(line.rsplit(" ", 1)[1]) for line in values)


def test_later_turns_go_to_the_replica_with_the_prefix(pair: Serve) -> None:
    until(lambda: metric(pair.url, "scalellm_replica_state", 'state="ready"') == 2)
    messages = [{"role": "user", "content": STORY}]
    text, first, cached = turn(pair.url, messages)
    assert (first["policy"], first["reason"], cached) == ("prefix", "cold", 0)
    for _ in range(3):
        until(lambda: metric(pair.url, "scalellm_prefix_blocks") > 0)
        messages += [
            {"role": "assistant", "content": text},
            {"role": "user", "content": "And then?"},
        ]
        text, route, cached = turn(pair.url, messages)
        assert (route["replica"], route["reason"]) == (first["replica"], "prefix")
        assert cached > 0
        # The gateway believed what the engine then found.
        assert abs(int(route["cached_tokens"]) - cached) <= 32
