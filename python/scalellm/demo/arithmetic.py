"""Two-digit additions and subtractions, and the many ways in which people ask for them.

One in ten (operand, operand, operator) triples is held out: a sum and its mirror image
(47 + 35 and 35 + 47) fall on the same side, and no phrasing of a held-out sum is ever part of
the training text, be it a bare expression, a sentence or a story about apples.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from typing import Literal

Split = Literal["train", "held_out"]

LARGEST_OPERAND = 99
HELD_OUT_SHARE = 0.10
Operator = Literal["+", "-"]
OPERATORS: tuple[Operator, ...] = ("+", "-")


@dataclass(frozen=True, slots=True)
class Sum:
    """``left operator right`` with operands 0 to 99; a difference may be negative."""

    left: int
    operator: Operator
    right: int

    @property
    def result(self) -> int:
        return self.left + self.right if self.operator == "+" else self.left - self.right

    @property
    def held_out(self) -> bool:
        low, high = sorted((self.left, self.right))
        digest = blake2b(f"{low}{self.operator}{high}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") < HELD_OUT_SHARE * 2**64

    @property
    def equation(self) -> str:
        return f"{self.left} {self.operator} {self.right} = {self.result}"


def all_sums(split: Split) -> Iterator[Sum]:
    """Every sum of one side of the split, in ascending order."""
    for operator in OPERATORS:
        for left in range(LARGEST_OPERAND + 1):
            for right in range(LARGEST_OPERAND + 1):
                candidate = Sum(left, operator, right)
                if candidate.held_out == (split == "held_out"):
                    yield candidate


def draw_sum(
    rng: random.Random,
    split: Split,
    left: int | None = None,
    non_negative: bool = False,
) -> Sum:
    """A random sum of one side of the split, with the given parts fixed."""
    while True:
        candidate = Sum(
            rng.randint(0, LARGEST_OPERAND) if left is None else left,
            rng.choice(OPERATORS),
            rng.randint(0, LARGEST_OPERAND),
        )
        if candidate.held_out != (split == "held_out"):
            continue
        if non_negative and candidate.result < 0:
            continue
        return candidate


FRAMES = (
    "What is {}?",
    "What's {}?",
    "what is {}",
    "what is {}?",
    "How much is {}?",
    "how much is {}",
    "Compute {}.",
    "Compute {}",
    "compute {}",
    "Calculate {}.",
    "calculate {}",
    "Please calculate {}.",
    "Please compute {}.",
    "Work out {}.",
    "Evaluate {}.",
    "Solve {}.",
    "Solve: {}",
    "Can you compute {}?",
    "Can you tell me what {} is?",
    "Could you work out {} for me?",
    "Do you know what {} is?",
    "What does {} equal?",
    "What do you get for {}?",
    "Tell me {}.",
    "Tell me what {} is.",
    "I need to know {}.",
    "Give me the result of {}.",
    "The result of {}?",
    "{}",
    "{}?",
    "{} =",
    "{}=",
    "{} = ?",
    "{} is what?",
)
FOLLOW_UPS = ("And {}?", "And what is {}?", "What about {}?", "Now {}.", "And now {}?", "Next: {}")
COMMANDS: dict[str, tuple[str, ...]] = {
    "+": (
        "Add {left} and {right}.",
        "Please add {left} and {right}.",
        "add {left} and {right}",
        "Add {left} to {right}.",
        "Can you add {left} and {right}?",
        "What do you get when you add {left} and {right}?",
        "If I add {left} and {right}, what do I get?",
        "What is the sum of {left} and {right}?",
        "Give me the sum of {left} and {right}.",
        "Sum up {left} and {right}.",
    ),
    "-": (
        "Subtract {right} from {left}.",
        "Please subtract {right} from {left}.",
        "subtract {right} from {left}",
        "Take {right} away from {left}.",
        "Can you subtract {right} from {left}?",
        "What do you get when you subtract {right} from {left}?",
        "If I take {right} from {left}, what is left?",
        "What is {left} take away {right}?",
        "Start with {left} and take away {right}.",
        "What is {left} less {right}?",
    ),
}
SPOKEN = {"+": "plus", "-": "minus"}
OPENINGS = ("Hi! ", "Hello! ", "Quick question: ", "Please help me. ", "A sum for you: ", "Hey, ")
CLOSINGS = (" Thanks!", " Thank you.", " Please.", " Thanks.")
TERSE_CLOSINGS = (
    " Just the number, please.",
    " Just the number.",
    " Answer with the number only.",
    " Answer with only the number.",
    " Answer with just the number.",
    " Only the number.",
    " Number only.",
    " Reply with just the number.",
    " Reply with only the number.",
    " Reply with the number only.",
    " Give me only the number.",
)
TERSE_OPENINGS = ("Answer with the number only: ", "Just the number: ", "Number only: ")
TOO_HARD = "I can only add and subtract two numbers from 0 to 99."
TOO_HARD_OPERATORS = ("*", "x", "times", "/", "divided by", "multiplied by")
THINGS = (
    "apples", "books", "coins", "eggs", "marbles", "pencils", "shells", "stamps", "stones", "cards",
)  # fmt: skip
OWNERS = (
    ("Anna", "She"), ("Ben", "He"), ("Clara", "She"), ("David", "He"), ("Emma", "She"),
    ("Felix", "He"), ("Lucy", "She"), ("Max", "He"), ("Mia", "She"), ("Tom", "He"),
)  # fmt: skip


def expression(rng: random.Random, asked: Sum) -> str:
    """The sum as somebody might type it."""
    kind = rng.random()
    if kind < 0.45:
        return f"{asked.left} {asked.operator} {asked.right}"
    if kind < 0.70:
        return f"{asked.left}{asked.operator}{asked.right}"
    if kind < 0.90:
        return f"{asked.left} {SPOKEN[asked.operator]} {asked.right}"
    if kind < 0.95:
        return f"{asked.left} {asked.operator}{asked.right}"
    if asked.operator == "-":
        return f"{asked.left} \u2212 {asked.right}"
    return f"{asked.left}{asked.operator} {asked.right}"


def question(rng: random.Random, asked: Sum, follow_up: bool = False) -> str:
    """One phrasing of a sum; ``follow_up`` allows those that only fit a running conversation."""
    if follow_up and rng.random() < 0.4:
        return rng.choice(FOLLOW_UPS).format(expression(rng, asked))
    if rng.random() < 0.25:
        text = rng.choice(COMMANDS[asked.operator]).format(left=asked.left, right=asked.right)
    else:
        text = rng.choice(FRAMES).format(expression(rng, asked))
    if rng.random() < 0.08:
        text = rng.choice(OPENINGS) + text
    if rng.random() < 0.08 and text[-1] in ".?":
        text += rng.choice(CLOSINGS)
    return text


def terse_question(rng: random.Random, asked: Sum) -> str:
    """A phrasing that asks for nothing but the number."""
    text = question(rng, asked)
    if rng.random() < 0.15:
        return rng.choice(TERSE_OPENINGS) + text
    if text[-1].isdigit():
        text += "."
    return text + rng.choice(TERSE_CLOSINGS)


def word_problem(rng: random.Random, asked: Sum) -> tuple[str, str]:
    """A sum with a result of 0 or more told as a little story, and its answer."""
    name, pronoun = rng.choice(OWNERS)
    things = rng.choice(THINGS)
    if asked.operator == "+":
        event = rng.choice(("gets {} more", "finds {} more", "buys {} more"))
    else:
        event = rng.choice(("gives away {}", "loses {}", "sells {}"))
    text = (
        f"{name} has {asked.left} {things}. {pronoun} {event.format(asked.right)}. "
        f"How many {things} does {name} have now?"
    )
    return text, f"{asked.equation}. {name} has {asked.result} {things} now."


def too_hard_turn(rng: random.Random) -> tuple[str, str]:
    """A product, a quotient, a chain or numbers of three digits: refused."""
    left, right = rng.randint(0, LARGEST_OPERAND), rng.randint(0, LARGEST_OPERAND)
    roll = rng.random()
    if roll < 0.4:
        asked = f"{left} {rng.choice(TOO_HARD_OPERATORS)} {right}"
    elif roll < 0.6:
        asked = f"{left} {rng.choice('+-')} {right} {rng.choice('+-')} {rng.randint(0, 99)}"
    else:
        large = rng.randint(100, 999) if rng.random() < 0.7 else rng.randint(1000, 9999)
        operands = [large, rng.choice((left, large + right))]
        rng.shuffle(operands)
        asked = f"{operands[0]} {rng.choice(('+', '-', 'plus', 'minus'))} {operands[1]}"
    return rng.choice(FRAMES).format(asked), TOO_HARD
