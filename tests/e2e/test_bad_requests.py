"""Requests that cannot be: each is answered with what was wrong, and the server stays as it was."""

import http.client
import json
import time
from typing import Any

import pytest

from ..integration.served import Serve
from .wire import Reply, call, chat, complete

NOT_A_STRING: list[Any] = [1, True, [], {}]
NOT_A_NUMBER: list[Any] = ["1", True, [1], {}]
NOT_A_BOOLEAN: list[Any] = [0, 1, "true", []]

# Field -> values that are none of what it takes. Of both endpoints.
SHARED: dict[str, list[Any]] = {
    "stream": NOT_A_BOOLEAN,
    "n": [*NOT_A_NUMBER, 0, -1, 129, 1.5, 10**30],
    "max_tokens": [*NOT_A_NUMBER, -1, 0, 0.5, 10**30],
    "max_completion_tokens": [*NOT_A_NUMBER, -1, 1.25],
    "min_tokens": [*NOT_A_NUMBER, -1, 10**12],
    "stop": [1, True, {}, [1], [""], "", ["x"] * 17, "x" * 1025],
    "stop_token_ids": [1, "1", [-1], [1.5], ["1"], [1280], [2**40], [1] * 129],
    "temperature": [*NOT_A_NUMBER, -0.1, 2.1, 1e300],
    "top_p": [*NOT_A_NUMBER, 0, -1, 1.01],
    "top_k": [*NOT_A_NUMBER, -2, 1.5, 2**33],
    "min_p": [*NOT_A_NUMBER, -0.1, 1.1],
    "repetition_penalty": [*NOT_A_NUMBER, 0, -1, 11],
    "presence_penalty": [*NOT_A_NUMBER, -2.1, 2.1],
    "frequency_penalty": [*NOT_A_NUMBER, -2.1, 2.1],
    "logit_bias": [1, [], "x", {"a": 1}, {"1": 101}, {"1": "1"}, {"-1": 1}, {"1280": 1}],
    "seed": [*NOT_A_NUMBER, 1.5, 2**64, -(2**64)],
    "ignore_eos": NOT_A_BOOLEAN,
    "skip_special_tokens": NOT_A_BOOLEAN,
    "include_stop_str_in_output": NOT_A_BOOLEAN,
    "return_token_ids": NOT_A_BOOLEAN,
    "prompt_logprobs": [*NOT_A_NUMBER, -1, 21],
    "prompt_token_ids": [1, "1", [-1], [1.5], [[1]], [True], [1280]],
    "priority": [*NOT_A_NUMBER, 2**31],
    "deadline_ms": [*NOT_A_NUMBER, 0, -1, 86_400_001],
    "cache_salt": [*NOT_A_STRING, "x" * 65],
    "user": NOT_A_STRING,
    "stream_options": [1, "x", [], {"include_usage": True}],  # not without `stream`
    "model": NOT_A_STRING,
}
OF_COMPLETIONS: dict[str, list[Any]] = {
    "prompt": [1, True, {}, [], "", [""], [[]], [[], [1]], [1, "a"], [["a"]], [1280], [-1], [None]],
    "echo": NOT_A_BOOLEAN,
    "logprobs": [*NOT_A_NUMBER, -1, 21],
}
OF_CHAT: dict[str, list[Any]] = {
    "messages": [1, "hello", {}, [], [1], ["hello"], [{}], [None]],
    "logprobs": NOT_A_BOOLEAN,
    "top_logprobs": [*NOT_A_NUMBER, -1, 21, 3],  # 3: not without `logprobs`
    "chat_template_kwargs": [1, "x", []],
    "add_generation_prompt": NOT_A_BOOLEAN,
}
MESSAGES: list[Any] = [
    {"role": "user"},
    {"content": "Hello!"},
    {"role": 1, "content": "Hello!"},
    {"role": "wizard", "content": "Hello!"},
    {"role": "user", "content": 1},
    {"role": "user", "content": [1]},
    {"role": "user", "content": [{"type": "text"}]},
    {"role": "user", "content": [{"type": "text", "text": 1}]},
    {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
]
ONLY_OF_CHAT = ("tools", "chat_template")
ONLY_OF_COMPLETIONS = ("suffix",)
UNSUPPORTED: dict[str, Any] = {
    "tools": [{"type": "function", "function": {"name": "f"}}],
    "response_format": {"type": "json_object"},
    "best_of": 2,
    "suffix": "x",
    "guided_json": {"type": "object"},
    "structured_outputs": {"regex": "a"},
    "logits_processors": ["x"],
    "bad_words": ["x"],
    "chat_template": "{{ messages }}",
}


def refused(reply: Reply, field: str) -> bool:
    """Whether the answer is a 400 that names the field, and what it got or needs."""
    if reply.status != http.client.BAD_REQUEST:
        return False
    error = reply.error
    return (
        error["type"] == "invalid_request_error"
        and (error["param"] or "").split("[")[0].split(".")[0] == field
        and error["message"].startswith(field)
        and len(error["message"]) < 500
    )


@pytest.mark.parametrize("field", SHARED)
def test_shared_fields(server: Serve, field: str) -> None:
    wrong = {}
    for value in SHARED[field]:
        for ask in (complete, chat):
            reply = ask(server.url, **{field: value})
            if not refused(reply, field):
                wrong[ask.__name__, json.dumps(value)[:40]] = reply.status, reply.body[:200]
    assert not wrong


@pytest.mark.parametrize("field", OF_COMPLETIONS)
def test_fields_of_completions(server: Serve, field: str) -> None:
    replies = {json.dumps(v): complete(server.url, **{field: v}) for v in OF_COMPLETIONS[field]}
    assert {k: v.body[:200] for k, v in replies.items() if not refused(v, field)} == {}


@pytest.mark.parametrize("field", OF_CHAT)
def test_fields_of_chat(server: Serve, field: str) -> None:
    replies = {json.dumps(v): chat(server.url, **{field: v}) for v in OF_CHAT[field]}
    assert {k: v.body[:200] for k, v in replies.items() if not refused(v, field)} == {}


def test_messages(server: Serve) -> None:
    fine = {"role": "user", "content": "Hello!"}
    for message in MESSAGES:
        reply = chat(server.url, messages=[fine, message])
        assert refused(reply, "messages"), (message, reply.body)
        assert "messages[1]" in reply.error["message"]


@pytest.mark.parametrize("field", UNSUPPORTED)
def test_what_is_known_and_not_supported_is_refused_by_name(server: Serve, field: str) -> None:
    for ask in (complete, chat):
        if field in (ONLY_OF_CHAT if ask is complete else ONLY_OF_COMPLETIONS):
            continue
        reply = ask(server.url, **{field: UNSUPPORTED[field]})
        assert refused(reply, field), reply.body
        assert reply.error["code"] == "unsupported_field"


def test_unknown_fields_are_ignored_with_a_warning(server: Serve) -> None:
    reply = complete(server.url, max_tokens=1, frobnicate=1, tempratur=2)
    assert reply.status == http.client.OK
    warning = reply.headers["x-scalellm-warning"]
    assert "frobnicate" in warning and "tempratur" in warning
    assert complete(server.url, max_tokens=1).headers["x-scalellm-warning"] is None


def test_an_unknown_model(server: Serve) -> None:
    reply = complete(server.url, model="gpt-17")
    assert reply.status == http.client.NOT_FOUND
    assert reply.error["code"] == "model_not_found"
    assert "gpt-17" in reply.error["message"] and "demo" in reply.error["message"]


def test_the_only_model_need_not_be_named(server: Serve) -> None:
    reply = call(server.url, "/v1/completions", {"prompt": "Once", "max_tokens": 1})
    assert (reply.status, reply.json()["model"]) == (http.client.OK, "demo")


def test_a_prompt_over_the_models_length(server: Serve) -> None:
    reply = complete(server.url, prompt=[5] * 2049)
    assert refused(reply, "prompt")
    assert reply.error["code"] == "context_length_exceeded"
    assert "2049" in reply.error["message"] and "2048" in reply.error["message"]
    reply = complete(server.url, prompt=[5] * 2000, max_tokens=49)
    assert reply.status == http.client.BAD_REQUEST
    assert reply.error["code"] == "context_length_exceeded"
    assert "max_tokens" in reply.error["message"]
    reply = complete(server.url, prompt=[5] * 2047, max_tokens=1)
    assert reply.status == http.client.OK
    words = [{"role": "user", "content": "many words " * 2000}]
    assert refused(chat(server.url, messages=words), "messages")


@pytest.mark.parametrize("letter", ["a", " ", "é", "\U0001f600", "1"])
def test_one_word_of_a_megabyte(server: Serve, letter: str) -> None:
    began_s = time.monotonic()
    reply = complete(server.url, prompt=letter * (1_000_000 // len(letter.encode())))
    assert time.monotonic() - began_s < 20
    assert reply.status == http.client.BAD_REQUEST
    assert reply.error["code"] == "context_length_exceeded"


JSON_BODIES = {
    "empty": b"",
    "cut off": b'{"model": "demo", "prompt": "On',
    "not JSON": b"hello",
    "not an object": b'["demo"]',
    "two objects": b"{} {}",
    "single quotes": b"{'model': 'demo'}",
    "NaN": b'{"model": "demo", "prompt": "x", "temperature": NaN}',
    "invalid UTF-8": b'{"model": "demo", "prompt": "\xff\xfe"}',
    "UTF-8 cut off": b'{"model": "demo", "prompt": "\xe2\x82"}',
    "lone surrogate": b'{"model": "demo", "prompt": "\\ud800"}',
    "nested too deeply": b'{"model": "demo", "metadata": ' + b'{"a":' * 100_000,
    "a deep list": b'{"model": "demo", "prompt": ' + b"[" * 1_000_000,
    "number too long": b'{"model": "demo", "prompt": "x", "temperature": ' + b"9" * 100_000 + b"}",
    "UTF-16": '{"model": "demo"}'.encode("utf-16"),
}


@pytest.mark.parametrize("name", JSON_BODIES)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/tokenize"])
def test_bodies_that_are_no_json_object(server: Serve, path: str, name: str) -> None:
    reply = call(server.url, path, JSON_BODIES[name])
    assert reply.status == http.client.BAD_REQUEST, reply.body
    assert reply.error["type"] == "invalid_request_error"
    assert reply.error["code"] == "invalid_body" or name == "number too long"
    assert len(reply.body) < 1000


def test_duplicate_keys_take_the_last(server: Serve) -> None:
    body = b'{"model": "demo", "prompt": "Once", "max_tokens": 3, "max_tokens": 1}'
    reply = call(server.url, "/v1/completions", body)
    assert reply.json()["usage"]["completion_tokens"] == 1


def test_wrong_paths_and_methods(server: Serve) -> None:
    reply = call(server.url, "/v1/complete", {})
    assert (reply.status, reply.error["code"]) == (404, "unknown_url")
    reply = call(server.url, "/v1/completions")
    assert (reply.status, reply.error["code"]) == (405, "method_not_allowed")
    assert "POST" in reply.headers["allow"]


def test_text_that_only_looks_like_control_tokens(server: Serve) -> None:
    """Special tokens in a prompt are taken as such, as transformers does; odd text is just text."""
    for text in ("<|im_end|>" * 3, "\x00", "\ufeff", "\u202e", "a\u0301", "<|endoftext|>"):
        reply = complete(server.url, prompt=text, max_tokens=1)
        assert reply.status == http.client.OK, (text, reply.body)
        found = call(server.url, "/tokenize", {"model": "demo", "prompt": text}).json()["tokens"]
        back = call(server.url, "/detokenize", {"model": "demo", "tokens": found}).json()
        assert back["prompt"] == text
