"""The questions by which a demo model is judged, each with its one right answer."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from scalellm.demo import arithmetic, chat, facts, stories
from scalellm.demo.arithmetic import Sum
from scalellm.demo.corpus import Message, conversation
from scalellm.demo.facts import Turn

SUM_KINDS = (
    "plain",
    "any phrasing",
    "number only",
    "told as a story",
    "late in a conversation",
)
TALK: dict[str, Callable[[random.Random], Turn]] = {
    "counting": facts.counting_turn,
    "days, months, letters": facts.calendar_turn,
    "colours": facts.colour_turn,
    "sounds of animals": facts.sound_turn,
    "is it the capital": facts.capital_check_turn,
    "small talk": chat.small_talk_turn,
    "repeating words": chat.echo_turn,
    "sums out of reach": arithmetic.too_hard_turn,
    "unknown things": chat.unknown_turn,
}


@dataclass(frozen=True, slots=True)
class Case:
    """A conversation that ends with a question, and the one right answer to it."""

    messages: tuple[Message, ...]
    answer: str


def sum_cases(sums: Sequence[Sum], kind: str, rng: random.Random) -> list[Case]:
    """The sums asked in one of ``SUM_KINDS``; those with results below 0 make no story."""
    cases = []
    for asked in sums:
        before: list[Message] = []
        text, answer = f"What is {asked.left} {asked.operator} {asked.right}?", f"{asked.equation}."
        if kind == "any phrasing":
            text = arithmetic.question(rng, asked)
        elif kind == "number only":
            text, answer = arithmetic.terse_question(rng, asked), str(asked.result)
        elif kind == "told as a story":
            if asked.result < 0:
                continue
            text, answer = arithmetic.word_problem(rng, asked)
        elif kind == "late in a conversation":
            before = conversation(rng, "held_out", num_turns=4)
            while is_terse(before):
                before = conversation(rng, "held_out", num_turns=4)
            text = arithmetic.question(rng, asked)
        cases.append(Case((*before, Message("user", text)), answer))
    return cases


def is_terse(messages: Sequence[Message]) -> bool:
    return messages[0].role == "system" and "number" in messages[0].content


def fact_cases() -> dict[str, list[Case]]:
    """Every fact of the tables."""
    turns = facts.table_turns()
    countries, words = len(facts.CAPITALS), len(facts.OPPOSITES)
    return {
        "capitals of countries": turn_cases(turns[:countries]),
        "countries of capitals": turn_cases(turns[countries : 2 * countries]),
        "opposites": turn_cases(turns[-words:]),
    }


def talk_cases(rng: random.Random, count: int) -> dict[str, list[Case]]:
    """``count`` random questions of every other kind."""
    return {name: turn_cases([draw(rng) for _ in range(count)]) for name, draw in TALK.items()}


def turn_cases(turns: Sequence[Turn]) -> list[Case]:
    return [Case((Message("user", question),), answer) for question, answer in turns]


def is_coherent(text: str) -> bool:
    """Whether a story keeps to two characters, one coloured thing and one place, and ends."""
    words = {word.strip('.,!?"') for word in text.split()}
    return (
        len(words & {*stories.GIRLS, *stories.BOYS}) == 2
        and len(words & set(stories.THINGS)) <= 1
        and len(words & set(stories.PLACES)) <= 1
        and len(words & set(stories.PETS)) <= 1
        and text.endswith((".", "!", '"'))
    )
