"""Requests of every kind that a replay could get wrong, and what of the answers must not change."""

import json
import urllib.parse
from dataclasses import dataclass, field
from http.client import HTTPConnection
from typing import Any

TIMEOUT_S = 120.0
_PROMPTS = ("Once upon a time", "There was a little dog", "The", "One day Tom", "Anna went to")


_STREAMED = {"stream": True, "stream_options": {"include_usage": True}}
_CHATS = (
    {"temperature": 0.0},
    {"temperature": 1.0, "n": 2, "logprobs": True, "top_logprobs": 2},
    {"temperature": 0.9, "stop": [" and"], "min_tokens": 80},
)


def requests(model: str = "demo") -> list[dict[str, Any]]:
    """Bodies for /v1/completions and, with messages, for chat: greedy and sampled, streamed and
    not."""
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 1.0},
        {"temperature": 1.0, "n": 3},
        {"temperature": 0.9, "top_p": 0.9, "logprobs": 3},
        {"temperature": 0.8, "top_k": 20, "stop": [" the", "Then"], "min_tokens": 60},
        {"temperature": 1.1, "frequency_penalty": 0.7, "presence_penalty": 0.4},
        {"temperature": 1.0, "repetition_penalty": 1.2, "min_p": 0.02},
        {"temperature": 1.0, "min_tokens": 100, "ignore_eos": False, "logprobs": 0},
        {"temperature": 0.0, "logit_bias": {"5": 1.5, "9": -100}, "stop_token_ids": [7]},
    ]
    made = []
    for number, kind in enumerate(kinds):
        for streamed in (True, False):
            body = {
                "model": model,
                "prompt": _PROMPTS[(number + streamed) % len(_PROMPTS)],
                "max_tokens": 250,
                "ignore_eos": True,
                "seed": 1000 + number,
                "return_token_ids": True,
            } | kind
            made.append(body | (_STREAMED if streamed else {}))
    for number, kind in enumerate(_CHATS):
        for streamed in (True, False):
            body = {
                "model": model,
                "messages": [{"role": "user", "content": f"Tell me a story of {number} dogs."}],
                "max_tokens": 200,
                "ignore_eos": True,
                "seed": 2000 + number,
                "return_token_ids": True,
            } | kind
            made.append(body | (_STREAMED if streamed else {}))
    return made


@dataclass(slots=True)
class Choice:
    """One choice, put together from its parts."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    tokens: list[str] = field(default_factory=list)
    token_logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[Any] = field(default_factory=list)
    text_offset: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: str | int | None = None

    def add(self, part: dict[str, Any]) -> None:
        assert self.finish_reason is None, f"a part came after the end: {part}"
        self.text += part["text"]
        self.token_ids += part["token_ids"]
        for name, values in (part["logprobs"] or {}).items():
            getattr(self, name).extend(values or [])
        self.finish_reason = part["finish_reason"]
        self.stop_reason = part["stop_reason"]


@dataclass(slots=True)
class Answer:
    """All that a client may rely on."""

    choices: dict[int, Choice]
    prompt_tokens: int
    completion_tokens: int


def ask(url: str, body: dict[str, Any]) -> tuple[Answer, int]:
    """The whole answer, and how often a choice of it was replayed.

    Raises AssertionError for anything but a complete answer."""
    parts = urllib.parse.urlsplit(url)
    assert parts.hostname
    connection = HTTPConnection(parts.hostname, parts.port, timeout=TIMEOUT_S)
    try:
        headers = {"Content-Type": "application/json"}
        path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
        connection.request("POST", path, json.dumps(body), headers)
        response = connection.getresponse()
        raw = response.read().decode()
    finally:
        connection.close()
    assert response.status == 200, raw
    if not body.get("stream"):
        told = json.loads(raw)
        answer = _put_together([told], told["usage"])
        assert int(response.headers["x-scalellm-replays"] or 0) == told["usage"].get("replays", 0)
        return answer, told["usage"].get("replays", 0)
    frames = raw.split("\n\n")
    assert frames[-2:] == ["data: [DONE]", ""], raw[-500:]
    events = [json.loads(frame.removeprefix("data: ")) for frame in frames[:-2]]
    usage = events[-1]["usage"]
    return _put_together(events, usage), usage.get("replays", 0)


def undisturbed_answers(url: str, model: str = "demo") -> list[Answer]:
    """The answer of every request of the workload, while nothing happens."""
    answers = []
    for body in requests(model):
        answer, replays = ask(url, body)
        assert replays == 0
        answers.append(answer)
    return answers


def _put_together(events: list[dict[str, Any]], usage: dict[str, Any]) -> Answer:
    choices: dict[int, Choice] = {}
    for event in events:
        for part in event["choices"]:
            choices.setdefault(part["index"], Choice()).add(_as_of_completions(part))
    assert choices and all(choice.finish_reason for choice in choices.values())
    ids = sum(len(choice.token_ids) for choice in choices.values())
    assert ids == usage["completion_tokens"] > 0
    return Answer(dict(sorted(choices.items())), usage["prompt_tokens"], usage["completion_tokens"])


def _as_of_completions(part: dict[str, Any]) -> dict[str, Any]:
    """A chat's part, as a completion would have it."""
    said = part.get("delta") or part.get("message")
    if said is None and "text" in part:
        return part
    told = (part["logprobs"] or {}).get("content") or []
    logprobs = {
        "tokens": [one["token"] for one in told],
        "token_logprobs": [one["logprob"] for one in told],
        "top_logprobs": [one["top_logprobs"] for one in told],
    }
    text, ids = (said or {}).get("content") or "", part.get("token_ids") or []  # the role has none
    return {"stop_reason": None, **part, "text": text, "token_ids": ids, "logprobs": logprobs}
