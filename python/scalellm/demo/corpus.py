"""The demo model's training text: an endless, seeded stream of conversations and plain text.

Every document is a function of the seed, the side of the split and its number in the stream.
Conversations are in ChatML, exactly as the model folder's chat template writes them:

    <|im_start|>user
    What is 47 + 35?<|im_end|>
    <|im_start|>assistant
    47 + 35 = 82.<|im_end|>
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from scalellm.demo import arithmetic, chat, facts, stories
from scalellm.demo.arithmetic import Split
from scalellm.demo.facts import Turn

START_OF_TURN = "<|im_start|>"
END_OF_TURN = "<|im_end|>"
END_OF_TEXT = "<|endoftext|>"

SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a helpful assistant. Keep your answers short.",
    "You are ScaleLLM's demo model.",
    "You are a friendly assistant.",
    "Be polite and brief.",
    "Answer the user's questions.",
    "You are a calculator. Answer sums.",
)
TERSE_SYSTEM_PROMPTS = (
    "Answer sums with the number only.",
    "You are a calculator. Reply with the number only.",
    "For sums, answer with just the number.",
)


@dataclass(frozen=True, slots=True)
class Message:
    role: str  # "system", "user" or "assistant"
    content: str


def render(messages: Sequence[Message]) -> str:
    """What the chat template makes of a whole conversation."""
    return "".join(f"{START_OF_TURN}{m.role}\n{m.content}{END_OF_TURN}\n" for m in messages)


def sum_turns(rng: random.Random, split: Split, terse: bool, follow_up: bool) -> list[Turn]:
    """One sum, or a first sum and one that goes on with its result."""
    roll = rng.random()
    if roll < 0.08:
        return [arithmetic.word_problem(rng, arithmetic.draw_sum(rng, split, non_negative=True))]
    asked = arithmetic.draw_sum(rng, split)
    if terse:
        return [(arithmetic.question(rng, asked, follow_up), str(asked.result))]
    if roll < 0.28:
        return [(arithmetic.terse_question(rng, asked), str(asked.result))]
    turns = [(arithmetic.question(rng, asked, follow_up), f"{asked.equation}.")]
    if roll < 0.34 and 0 <= asked.result <= arithmetic.LARGEST_OPERAND:
        then = arithmetic.draw_sum(rng, split, left=asked.result)
        words = ("Now add {}.", "Add {} to that.") if then.operator == "+" else (
            "Now subtract {}.", "Subtract {} from that.")  # fmt: skip
        turns.append((rng.choice(words).format(then.right), f"{then.equation}."))
    return turns


def several_sums_turn(rng: random.Random, split: Split) -> Turn:
    """A list of sums in one question, answered one a line."""
    sums = [arithmetic.draw_sum(rng, split) for _ in range(rng.randint(2, 12))]
    asked = ", ".join(f"{s.left} {s.operator} {s.right}" for s in sums)
    frame = rng.choice(("Compute {}.", "Solve these: {}", "What are {}?", "Calculate: {}"))
    return frame.format(asked), "\n".join(s.equation for s in sums)


def topic_turns(rng: random.Random, split: Split, terse: bool, follow_up: bool) -> list[Turn]:
    """The next turns of a conversation."""
    roll = rng.random()
    if roll < 0.50:
        return sum_turns(rng, split, terse, follow_up)
    if roll < 0.555:
        return [several_sums_turn(rng, split)]
    if roll < 0.57:
        return [arithmetic.too_hard_turn(rng)]
    if roll < 0.655:
        return [facts.capital_turn(rng)]
    if roll < 0.665:
        return [facts.capital_check_turn(rng)]
    if roll < 0.745:
        return [facts.opposite_turn(rng)]
    if roll < 0.77:
        return [facts.calendar_turn(rng)]
    if roll < 0.79:
        return [rng.choice((facts.colour_turn, facts.sound_turn))(rng)]
    if roll < 0.835:
        return [facts.counting_turn(rng)]
    if roll < 0.875:
        return [chat.small_talk_turn(rng)]
    if roll < 0.9:
        return [chat.unknown_turn(rng)]
    if roll < 0.905:
        return [chat.garbled_turn(rng)]
    if roll < 0.92:
        return [chat.echo_turn(rng)]
    return [stories.story_turn(rng, split)]


def conversation(rng: random.Random, split: Split, num_turns: int) -> list[Message]:
    """A conversation of about ``num_turns`` questions, each with its answer."""
    messages: list[Message] = []
    terse = rng.random() < 0.06
    if terse:
        messages.append(Message("system", rng.choice(TERSE_SYSTEM_PROMPTS)))
    elif rng.random() < 0.25:
        messages.append(Message("system", rng.choice(SYSTEM_PROMPTS)))
    turns: list[Turn] = []
    name_is_asked: Turn | None = None
    if num_turns > 1 and rng.random() < 0.15:
        name_is_told, name_is_asked = chat.name_turns(rng)
        turns.append(name_is_told)
    while len(turns) < num_turns:
        turns.extend(topic_turns(rng, split, terse, follow_up=bool(turns)))
    if name_is_asked is not None:
        turns.append(name_is_asked)
    for question, answer in turns:
        messages.append(Message("user", question))
        messages.append(Message("assistant", answer))
    return messages


def plain_text(rng: random.Random, split: Split) -> str:
    """Text without a chat template: stories, sums one a line, facts."""
    roll = rng.random()
    if roll < 0.6:
        story = stories.tell(stories.story_seed(rng, split), chapters=rng.choice((1, 1, 1, 2)))
        return f"{story.title}\n\n{story.text}" if rng.random() < 0.3 else story.text
    if roll < 0.9:
        count = rng.randint(3, 20)
        return "\n".join(arithmetic.draw_sum(rng, split).equation for _ in range(count))
    if roll < 0.95:
        return " ".join(
            facts.capital_of(rng.choice(tuple(facts.CAPITALS))) for _ in range(rng.randint(1, 5))
        )
    return " ".join(
        facts.opposite_of(rng.choice(tuple(facts.OPPOSITES))) for _ in range(rng.randint(1, 5))
    )


def documents(seed: int, split: Split, mean_turns: float = 3.0) -> Iterator[str]:
    """An endless stream of documents, each ended by the end-of-text token.

    ``mean_turns`` sets how long conversations are on average; plain text is about one in seven.
    """
    rng = random.Random(f"{split} {seed}")
    while True:
        if rng.random() < 0.15:
            yield plain_text(rng, split) + END_OF_TEXT
            continue
        num_turns = 1 + int(rng.expovariate(1.0 / max(mean_turns - 0.5, 0.05)))
        yield render(conversation(rng, split, num_turns)) + END_OF_TEXT
