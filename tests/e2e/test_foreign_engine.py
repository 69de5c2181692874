"""The gateway alone, in front of a `scalellm serve` that it knows only as an OpenAI endpoint."""

import http.client
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from scalellm.controller.deployment import free_port

from ..integration.served import Serve, own_environment
from ..integration.supervised import until
from .wire import call

QUESTION: Any = [{"role": "user", "content": "What is the capital of France?"}]
ANSWER = "The capital of France is Paris."


def _is_ready(url: str) -> bool:
    try:
        return bool(call(url, "/ready").status == http.client.OK)
    except ConnectionError:
        return False


@pytest.fixture
def gateway(server: Serve, tmp_path: Path) -> Iterator[str]:
    """URL of a gateway that serves as `far` what the server calls `demo`."""
    port = free_port("127.0.0.1", 0)
    config = tmp_path / "gateway.toml"
    config.write_text(
        f'port = {port}\n[[models]]\nname = "far"\n'
        f'[[models.upstreams]]\nurl = "{server.url}"\nmodel = "demo"\n'
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "scalellm", "gateway", "--config", str(config)],
        env=own_environment(),
    )
    url = f"http://127.0.0.1:{port}"
    try:
        until(lambda: _is_ready(url))
        yield url
    finally:
        process.terminate()
        process.wait()


@pytest.fixture
def far(gateway: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=gateway + "/v1", api_key="any", max_retries=0) as made:
        yield made


def test_whole_and_streamed_answers_are_the_servers_own(far: openai.OpenAI) -> None:
    assert [model.id for model in far.models.list().data] == ["far"]
    whole = far.chat.completions.create(model="far", messages=QUESTION, temperature=0)
    assert whole.choices[0].message.content == ANSWER
    assert whole.model == "far"
    assert whole.usage is not None and whole.usage.completion_tokens > 0
    chunks = list(
        far.chat.completions.create(model="far", messages=QUESTION, temperature=0, stream=True)
    )
    assert all(chunk.choices and chunk.model == "far" for chunk in chunks)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == ANSWER
    completed = far.completions.create(model="far", prompt="The capital of", temperature=0)
    assert completed.choices[0].text


def test_usage_is_told_to_whom_asks_and_always_counted(far: openai.OpenAI, gateway: str) -> None:
    *_, last = far.chat.completions.create(
        model="far",
        messages=QUESTION,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    assert last.usage is not None and not last.choices
    for _ in far.chat.completions.create(
        model="far", messages=QUESTION, temperature=0, stream=True
    ):
        pass
    counted = 2 * last.usage.completion_tokens
    line = f'scalellm_output_tokens_total{{model="far"}} {counted}'
    until(lambda: line in call(gateway, "/metrics").body.decode())


def test_what_the_server_refuses_is_told_in_its_words(far: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="temperature: got 9"):
        far.chat.completions.create(model="far", messages=QUESTION, temperature=9)
    with pytest.raises(openai.NotFoundError, match="served are"):
        far.chat.completions.create(model="near", messages=QUESTION)


def test_a_client_that_leaves_is_cancelled_there(far: openai.OpenAI) -> None:
    # The server's fixture waits until nothing runs there.
    stream = far.completions.create(
        model="far",
        prompt="Once",
        max_tokens=400,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    next(iter(stream))
    stream.close()
