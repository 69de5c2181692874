"""What the demo model says is right: sums that it never saw, and the facts it was taught."""

import pytest

from scalellm.demo.arithmetic import OPERATORS, all_sums
from scalellm.demo.facts import CAPITALS, OPPOSITES

from ..integration.served import Serve
from .wire import chat

SUMS_OF_EACH_KIND = 15


def held_out() -> list[tuple[str, str]]:
    """Questions and answers, spread evenly over the held-out sums."""
    asked = []
    for operator in OPERATORS:
        sums = [found for found in all_sums("held_out") if found.operator == operator]
        asked += sums[:: len(sums) // SUMS_OF_EACH_KIND][:SUMS_OF_EACH_KIND]
    return [(f"What is {a.left} {a.operator} {a.right}?", f"{a.equation}.") for a in asked]


def facts() -> list[tuple[str, str]]:
    capitals = [
        (f"What is the capital of {country}?", f"The capital of {country} is {city}.")
        for country, city in list(CAPITALS.items())[::10]
    ]
    opposites = [
        (f"What is the opposite of {word}?", f"The opposite of {word} is {other}.")
        for word, other in list(OPPOSITES.items())[::20]
    ]
    return capitals + opposites


def answer(server: Serve, question: str) -> str:
    reply = chat(server.url, messages=[{"role": "user", "content": question}], temperature=0)
    content: str = reply.json()["choices"][0]["message"]["content"]
    return content


@pytest.mark.parametrize("asked", [held_out(), facts()], ids=["sums", "facts"])
def test_every_answer_is_right(server: Serve, asked: list[tuple[str, str]]) -> None:
    said = {question: answer(server, question) for question, _ in asked}
    assert said == dict(asked)


def test_a_later_turn_of_a_conversation(server: Serve) -> None:
    turns = [
        ("Hello!", None),
        ("What is the capital of Italy?", "The capital of Italy is Rome."),
        ("What is the opposite of hot?", "The opposite of hot is cold."),
    ]
    messages: list[dict[str, str]] = []
    for question, right in turns:
        messages.append({"role": "user", "content": question})
        content = chat(server.url, messages=messages, temperature=0).json()["choices"][0]["message"]
        assert right is None or content["content"] == right
        messages.append(content)
