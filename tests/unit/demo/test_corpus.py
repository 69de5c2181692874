"""The demo model's training text: the same every time, and clear of the held-out sums."""

import random
import re
from collections.abc import Iterator
from itertools import islice

from hypothesis import given
from hypothesis import strategies as st

from scalellm.demo import arithmetic, exam, facts, stories
from scalellm.demo.arithmetic import Sum
from scalellm.demo.corpus import END_OF_TEXT, documents

NUM_DOCUMENTS = 4000
PLUS = re.compile(r"\+|\bplus\b|\b[Aa]dd|\b[Ss]um\b|gets|finds|buys")
MINUS = re.compile("-|\u2212|\\bminus\\b|[Ss]ubtract|[Tt]ake\\b|less\\b|gives away|loses|sells")
OTHER_PAIRS = re.compile(r"[Cc]ount |\d [*x/] \d|times|divided|multiplied")
EQUATION = re.compile(r"(\d+) ([+-]) (\d+) = (-?\d+)")


def training_text(seed: int) -> list[str]:
    return list(islice(documents(seed, "train"), NUM_DOCUMENTS))


def asked_sums(text: str) -> Iterator[Sum]:
    """Sums that users ask for, found by reading the questions rather than by generating them."""
    for question in re.findall(r"<\|im_start\|>user\n(.*?)<\|im_end\|>", text, flags=re.DOTALL):
        question = question.replace("A sum for you: ", "")
        numbers = [int(number) for number in re.findall(r"\d+", question)]
        if len(numbers) != 2 or max(numbers) > 99 or OTHER_PAIRS.search(question):
            continue
        if re.search("[Ss]ubtract .* from|[Tt]ake .* (from|away from)", question):
            numbers.reverse()
        adds, subtracts = bool(PLUS.search(question)), bool(MINUS.search(question))
        assert adds != subtracts, question
        yield Sum(numbers[0], "+" if adds else "-", numbers[1])


def test_the_same_seed_gives_the_same_text() -> None:
    assert training_text(5)[:200] == training_text(5)[:200]
    assert training_text(5)[:200] != training_text(6)[:200]


def test_no_held_out_sum_is_asked_or_answered_in_training() -> None:
    asked = answered = 0
    for document in training_text(5):
        for found in asked_sums(document):
            asked += 1
            assert not found.held_out, document
        for left, operator, right, result in EQUATION.findall(document):
            answered += 1
            equation = Sum(int(left), "+" if operator == "+" else "-", int(right))
            assert not equation.held_out, document
            assert equation.result == int(result), document
    assert asked > NUM_DOCUMENTS
    assert answered > NUM_DOCUMENTS


def test_the_held_out_side_asks_held_out_sums_only() -> None:
    for document in islice(documents(5, "held_out"), 500):
        assert all(found.held_out for found in asked_sums(document)), document


def test_one_in_ten_sums_is_held_out() -> None:
    held_out = list(arithmetic.all_sums("held_out"))
    training = list(arithmetic.all_sums("train"))
    assert len(held_out) + len(training) == 2 * 100 * 100
    assert 0.09 < len(held_out) / 20_000 < 0.11
    assert not {*held_out} & {*training}


numbers = st.integers(0, 99)


@given(left=numbers, right=numbers, operator=st.sampled_from(arithmetic.OPERATORS))
def test_mirrored_sums_are_on_the_same_side(
    left: int, right: int, operator: arithmetic.Operator
) -> None:
    assert Sum(left, operator, right).held_out == Sum(right, operator, left).held_out


@given(seed=st.integers(0, 10**6), left=numbers, right=numbers)
def test_every_phrasing_names_both_operands(seed: int, left: int, right: int) -> None:
    rng = random.Random(seed)
    for operator in arithmetic.OPERATORS:
        text = arithmetic.question(rng, Sum(left, operator, right))
        assert sorted(re.findall(r"\d+", text)) == sorted([str(left), str(right)])


def test_facts_are_unambiguous() -> None:
    assert len(set(facts.CAPITALS.values())) == len(facts.CAPITALS) >= 40
    assert len(facts.OPPOSITES) == 2 * len(facts.OPPOSITE_PAIRS) >= 80
    questions = [question for question, _ in facts.table_turns()]
    assert len(set(questions)) == len(questions)


@given(seed=st.integers(0, 10**9), chapters=st.integers(1, 3))
def test_a_story_keeps_to_its_two_characters(seed: int, chapters: int) -> None:
    story = stories.tell(seed, chapters)
    words = re.findall(r"\w+", story.text)
    assert {w for w in words if w in stories.GIRLS + stories.BOYS} == {story.hero, story.friend}
    assert len({w for w in words if w in stories.THINGS and w != "boat"}) <= 1
    assert len({w for w in words if w in stories.PLACES}) == 1
    assert "{" not in story.text
    assert stories.tell(seed, chapters) == story


@given(seed=st.integers(0, 10**9))
def test_the_exam_finds_stories_coherent_until_somebody_else_turns_up(seed: int) -> None:
    story = stories.tell(seed)
    assert exam.is_coherent(story.text)
    stranger = next(n for n in stories.GIRLS if n not in (story.hero, story.friend))
    assert not exam.is_coherent(f"{story.text} {stranger} smiled.")
    assert not exam.is_coherent(story.text[:-1])


def test_the_exam_asks_held_out_sums_in_every_kind() -> None:
    sums = list(arithmetic.all_sums("held_out"))[::50]
    for kind in exam.SUM_KINDS:
        cases = exam.sum_cases(sums, kind, random.Random(1))
        expected = [s for s in sums if s.result >= 0 or kind != "told as a story"]
        assert len(cases) == len(expected)
        assert all(str(s.result) in c.answer for s, c in zip(expected, cases, strict=True))


def test_stories_of_the_two_sides_have_different_seeds() -> None:
    rng = random.Random(1)
    assert all(stories.story_seed(rng, "train") % 10 != 9 for _ in range(1000))
    assert all(stories.story_seed(rng, "held_out") % 10 == 9 for _ in range(1000))


def test_documents_end_with_the_end_of_text_token() -> None:
    assert all(document.endswith(END_OF_TEXT) for document in training_text(5)[:500])
