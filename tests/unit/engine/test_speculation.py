"""Prompt lookup: what is drafted, and how much of it."""

import pytest

from scalellm.engine.speculation import NGRAM_TOKENS, PromptLookup, row_share
from scalellm.engine.step_time import StepShape, StepTime


def test_what_followed_the_last_ids_before_is_drafted() -> None:
    text = [1, 2, 3, 4, 5, 6, 9, 1, 2, 3]
    assert PromptLookup().draft(text, 2, 0.0) == [4, 5]


def test_the_latest_place_counts() -> None:
    text = [1, 2, 3, 7, 1, 2, 3, 8, 1, 2, 3]
    assert PromptLookup().draft(text, 1, 0.0) == [8]


def test_a_text_that_repeats_itself_goes_on_repeating() -> None:
    assert PromptLookup().draft([1, 2, 1, 2, 1, 2], 5, 0.0) == [1, 2, 1, 2, 1]


@pytest.mark.parametrize("text", [[1], [1, 2, 3], [1, 2, 3, 4, 5, 6], [1, 2, 9, 1, 2]])
def test_nothing_is_drafted_where_the_last_ids_are_new(text: list[int]) -> None:
    assert PromptLookup().draft(text, 4, 0.0) == []


def test_a_long_prompt_is_indexed_in_parts() -> None:
    text = [*range(10, 10 + NGRAM_TOKENS), 7, *range(1000, 9000), *range(10, 10 + NGRAM_TOKENS)]
    lookup = PromptLookup()
    found = [lookup.draft(text, 1, 0.0) for _ in range(6)]
    assert found[0] == [] and found[-1] == [7]


def test_right_drafts_become_longer_and_wrong_ones_end() -> None:
    text = [1, 2, 3] * 10
    right, wrong = PromptLookup(), PromptLookup()
    assert len(right.draft(text, 8, 0.1)) == 3  # half of them right: 1/2, 1/4, 1/8 are worth it
    for _ in range(20):
        right.learn(4, 4)
        wrong.learn(4, 0)
    assert len(right.draft(text, 8, 0.1)) == 8
    assert wrong.draft(text, 8, 0.1) == []
    waited = 0
    while not wrong.draft(text, 8, 0.1):
        waited += 1
    assert 20 < waited < 200


def test_a_row_that_costs_as_much_as_a_token_is_not_worth_a_doubtful_draft() -> None:
    assert PromptLookup().draft([1, 2, 3] * 4, 8, 0.6) == []


def test_a_row_is_cheap_beside_few_streams_and_dear_beside_many() -> None:
    times = StepTime()
    for _ in range(40):
        for tokens in (16, 64, 256):
            times.observe(StepShape().with_span(0, tokens), 20.0 + tokens)
        for streams in (1, 8, 32):
            times.observe(StepShape(streams, streams * 100.0, streams), 20.0 + streams)
    one = row_share(times, StepShape(1, 100.0, 1))
    many = row_share(times, StepShape(64, 6400.0, 64))
    assert one < 0.1 < 0.5 < many < 1.0
    assert row_share(times, StepShape()) == 0.0
