"""OpenAI's own client against a served model: every form of request and answer it knows."""

import asyncio
import math
from typing import Any

import openai
import pytest

from ..integration.served import Serve
from ..integration.supervised import until
from .wire import is_at_rest, load

QUESTION: Any = [{"role": "user", "content": "What is the capital of France?"}]
ANSWER = "The capital of France is Paris."


def test_lists_the_model(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert (model.id, model.object, model.owned_by) == ("demo", "model", "scalellm")
    assert client.models.retrieve("demo") == model


def test_chat(client: openai.OpenAI) -> None:
    done = client.chat.completions.create(model="demo", messages=QUESTION, temperature=0)
    (choice,) = done.choices
    assert choice.message.role == "assistant"
    assert choice.message.content == ANSWER
    assert choice.finish_reason == "stop"
    assert done.object == "chat.completion"
    assert done.usage is not None
    assert done.usage.completion_tokens > 0
    assert done.usage.total_tokens == done.usage.prompt_tokens + done.usage.completion_tokens


def test_a_stream_has_the_same_text_and_its_usage(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="demo", messages=QUESTION, temperature=0)
    chunks = list(
        client.chat.completions.create(
            model="demo",
            messages=QUESTION,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    *told, last = chunks
    assert {chunk.id for chunk in chunks} == {last.id}
    assert told[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in told) == ANSWER
    reasons = [chunk.choices[0].finish_reason for chunk in told]
    assert reasons == [None] * (len(told) - 1) + ["stop"]
    assert last.choices == [] and last.usage is not None and whole.usage is not None
    assert last.usage.completion_tokens == whole.usage.completion_tokens
    assert last.usage.prompt_tokens == whole.usage.prompt_tokens


def test_async_chat_and_stream(server: Serve) -> None:
    async def run() -> tuple[str, str]:
        async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="any") as client:
            whole = await client.chat.completions.create(
                model="demo", messages=QUESTION, temperature=0
            )
            stream = await client.chat.completions.create(
                model="demo", messages=QUESTION, temperature=0, stream=True
            )
            pieces = [chunk.choices[0].delta.content or "" async for chunk in stream]
            return whole.choices[0].message.content or "", "".join(pieces)

    assert asyncio.run(run()) == (ANSWER, ANSWER)


def test_completions_of_several_prompts(client: openai.OpenAI) -> None:
    prompts = ["Once upon a time", "The capital of France", "One day"]
    done = client.completions.create(model="demo", prompt=prompts, temperature=0, max_tokens=6)
    assert [choice.index for choice in done.choices] == [0, 1, 2]
    for prompt, choice in zip(prompts, done.choices, strict=True):
        alone = client.completions.create(model="demo", prompt=prompt, temperature=0, max_tokens=6)
        assert alone.choices[0].text == choice.text != ""
    assert done.usage is not None
    assert done.usage.completion_tokens <= 18


def test_completions_default_to_sixteen_tokens(client: openai.OpenAI) -> None:
    done = client.completions.create(
        model="demo", prompt="Once", extra_body={"ignore_eos": True}, stream=False
    )
    assert done.choices[0].finish_reason == "length"
    assert done.usage is not None and done.usage.completion_tokens == 16


def test_completions_stream_and_echo(client: openai.OpenAI) -> None:
    fields: Any = {"model": "demo", "prompt": "Once upon", "temperature": 0, "max_tokens": 8}
    whole = client.completions.create(**fields)
    pieces = [chunk.choices[0].text for chunk in client.completions.create(stream=True, **fields)]
    assert "".join(pieces) == whole.choices[0].text
    echoed = client.completions.create(echo=True, **fields)
    assert echoed.choices[0].text == "Once upon" + whole.choices[0].text


def test_n_choices_differ_by_draw_and_share_the_prompt(client: openai.OpenAI) -> None:
    asked: Any = {
        "model": "demo",
        "messages": [{"role": "user", "content": "Tell me a story."}],
        "n": 4,
        "seed": 3,
        "max_tokens": 24,
        "temperature": 1.5,
    }
    first, second = (client.chat.completions.create(**asked) for _ in range(2))
    texts = [choice.message.content for choice in first.choices]
    assert [choice.index for choice in first.choices] == [0, 1, 2, 3]
    assert len(set(texts)) > 1
    assert texts == [choice.message.content for choice in second.choices]
    one = client.chat.completions.create(**{**asked, "n": 1})
    assert one.usage is not None and first.usage is not None
    assert first.usage.prompt_tokens == one.usage.prompt_tokens


def test_streamed_choices_are_told_apart(client: openai.OpenAI) -> None:
    texts, reasons = ["", "", ""], ["", "", ""]
    for chunk in client.completions.create(
        model="demo", prompt="Once upon a time", n=3, seed=5, max_tokens=12, stream=True
    ):
        (choice,) = chunk.choices
        texts[choice.index] += choice.text
        reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    whole = client.completions.create(
        model="demo", prompt="Once upon a time", n=3, seed=5, max_tokens=12
    )
    assert texts == [choice.text for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]


def test_a_stop_string_is_cut_off(client: openai.OpenAI) -> None:
    fields: Any = {"model": "demo", "messages": QUESTION, "temperature": 0}
    stopped = client.chat.completions.create(stop=["of France", "never"], **fields)
    assert stopped.choices[0].message.content == "The capital "
    assert stopped.choices[0].finish_reason == "stop"
    stream = client.chat.completions.create(stop="of France", stream=True, **fields)
    pieces = [chunk.choices[0].delta.content or "" for chunk in stream]
    assert "".join(pieces) == "The capital "


def test_chat_logprobs(client: openai.OpenAI) -> None:
    fields: Any = {"model": "demo", "messages": QUESTION, "temperature": 0}
    done = client.chat.completions.create(logprobs=True, top_logprobs=3, **fields)
    assert done.choices[0].logprobs is not None
    content = done.choices[0].logprobs.content
    assert content is not None and done.usage is not None
    assert len(content) == done.usage.completion_tokens  # the token that ends the answer, too
    assert b"".join(bytes(token.bytes or []) for token in content[:-1]).decode() == ANSWER
    for token in content:
        assert token.logprob <= 0
        assert [top.logprob for top in token.top_logprobs] == sorted(
            (top.logprob for top in token.top_logprobs), reverse=True
        )
        assert len(token.top_logprobs) == 3
        assert token.top_logprobs[0].token == token.token  # greedy
        assert sum(math.exp(top.logprob) for top in token.top_logprobs) <= 1 + 1e-4
    streamed: list[Any] = []
    for chunk in client.chat.completions.create(
        logprobs=True, top_logprobs=3, stream=True, **fields
    ):
        found = chunk.choices[0].logprobs
        streamed += (found.content or []) if found else []
    assert [token.token for token in streamed] == [token.token for token in content]


def test_completion_logprobs_with_echo_cover_the_prompt(client: openai.OpenAI) -> None:
    done = client.completions.create(
        model="demo", prompt="Once upon a time", echo=True, logprobs=2, max_tokens=3, temperature=0
    )
    found = done.choices[0].logprobs
    assert found is not None and found.tokens and found.token_logprobs and found.text_offset
    assert done.usage is not None
    assert len(found.tokens) == len(found.token_logprobs) == len(found.text_offset)
    assert len(found.tokens) == done.usage.total_tokens
    assert found.token_logprobs[0] is None
    assert all(value <= 0 for value in found.token_logprobs[1:])
    assert "".join(found.tokens).startswith("Once upon a time")


ERRORS: list[tuple[dict[str, Any], type[openai.APIStatusError], str]] = [
    ({"model": "other"}, openai.NotFoundError, "model"),
    ({"temperature": -1}, openai.BadRequestError, "temperature"),
    ({"messages": []}, openai.BadRequestError, "messages"),
    ({"max_tokens": 99999}, openai.BadRequestError, "max_tokens"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, openai.BadRequestError, "tools"),
    ({"stream": True, "n": 0}, openai.BadRequestError, "n"),
]


@pytest.mark.parametrize(("fields", "error", "param"), ERRORS, ids=lambda value: str(value)[:24])
def test_bad_input_raises_the_clients_error_class(
    client: openai.OpenAI,
    fields: dict[str, Any],
    error: type[openai.APIStatusError],
    param: str,
) -> None:
    create: Any = client.chat.completions.create
    with pytest.raises(error) as raised:
        create(**{"model": "demo", "messages": QUESTION, **fields})
    assert raised.value.param == param
    assert raised.value.request_id
    assert isinstance(raised.value.body, dict) and param in raised.value.body["message"]


def test_unknown_model_cannot_be_retrieved(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_headers(client: openai.OpenAI) -> None:
    answer = client.chat.completions.with_raw_response.create(
        model="demo",
        messages=QUESTION,
        max_tokens=1,
        extra_headers={"x-request-id": "mine-1"},
        extra_body={"frobnicate": 1},
    )
    assert answer.headers["x-request-id"] == "mine-1"
    assert "frobnicate" in answer.headers["x-scalellm-warning"]
    stages = dict(
        part.strip().split(";dur=") for part in answer.headers["server-timing"].split(",")
    )
    assert {"parse", "tokenise", "queue", "prefill", "total"} <= stages.keys()
    assert all(float(value) >= 0 for value in stages.values())


def test_a_client_that_leaves_or_times_out_ends_its_request(
    client: openai.OpenAI, server: Serve
) -> None:
    long: Any = {
        "model": "demo",
        "prompt": "Once upon a time",
        "max_tokens": 2000,
        "extra_body": {"ignore_eos": True},
    }
    generated = load(server.url)["output_tokens_total"]
    with client.completions.create(stream=True, **long) as stream:
        next(iter(stream))
        assert load(server.url)["generations_in_flight"] == 1
    until(lambda: is_at_rest(server.url))
    with pytest.raises(openai.APITimeoutError):
        # A tenth of a millisecond a token: a step takes longer on any machine.
        client.with_options(timeout=0.2).completions.create(**long)
    until(lambda: is_at_rest(server.url))
    assert load(server.url)["output_tokens_total"] - generated < 4000
