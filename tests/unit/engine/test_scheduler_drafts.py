"""Tokens guessed from the request's own text."""

from dataclasses import replace

from .machine import LIMITS, Machine, next_token


def test_text_that_repeats_itself_takes_fewer_steps_with_drafts() -> None:
    plain = Machine(replace(LIMITS, max_model_len=400), blocks=200, remembers=2)
    guessing = Machine(replace(LIMITS, max_model_len=400, max_drafts=7), 200, remembers=2)
    for machine in (plain, guessing):
        machine.add(1, [3, 4, 5], 300, eos_token_ids=frozenset())
        machine.run()
    assert plain.emitted == guessing.emitted
    assert len(plain.steps) == 300 and len(guessing.steps) < 120


def test_wrong_drafts_are_given_up_and_tried_again_later() -> None:
    machine = Machine(replace(LIMITS, max_model_len=2000, max_drafts=3), blocks=600)
    # The text repeats itself in places, but what follows is always new.
    machine.add(1, [token for token in range(1, 23) for _ in range(4)], 1)
    machine.run()
    request = machine.add(2, [5] * 8, 1200, eos_token_ids=frozenset())
    machine.run()
    drafted = [sum(span.num_drafts for span in step.spans) for step in machine.steps]
    assert request.num_output_tokens == 1200
    assert 0 < sum(drafted) < 120
    assert any(drafted[-400:])


def test_drafts_stay_within_the_step_and_the_answer() -> None:
    limits = replace(LIMITS, max_num_batched_tokens=12, max_drafts=7)
    machine = Machine(limits, blocks=200, remembers=2)
    for key in range(8):
        machine.add(key, [3, 4, 5], 60 + key, eos_token_ids=frozenset())
    machine.run()
    assert all(step.shape.tokens <= 12 for step in machine.steps)
    assert [len(machine.emitted[key]) for key in range(8)] == [60 + key for key in range(8)]
    assert any(span.num_drafts for step in machine.steps for span in step.spans)


def test_a_stop_among_accepted_drafts_ends_the_answer_there() -> None:
    context = [3, 4, 5]
    while len(context) < 63:
        context.append(next_token(context, remembers=2))
    text = context[3:]
    stopping = frozenset({text[45]})
    machine = Machine(replace(LIMITS, max_drafts=7), blocks=200, remembers=2)
    more = {"eos_token_ids": frozenset(), "stop_token_ids": stopping, "min_tokens": 40}
    machine.add(1, [3, 4, 5], 60, **more)
    machine.run()
    end = next(place for place in range(39, 60) if text[place] in stopping) + 1
    assert machine.emitted[1] == text[:end] and machine.done[1].finish_reason == "stop_token"
    assert any(span.num_drafts > 1 for step in machine.steps for span in step.spans)
