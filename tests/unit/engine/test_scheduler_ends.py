"""How requests end, and what is refused at the door."""

from dataclasses import replace

import pytest

from scalellm.engine.request import Request
from scalellm.engine.step import Limits

from .machine import LIMITS, Machine, next_token


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "the prompt is empty; it must have at least 1 token"),
        ([1] * 128, "the prompt has 128 tokens; at most 127 fit"),
    ],
)
def test_what_can_never_run_ends_with_a_clear_error(prompt: list[int], message: str) -> None:
    machine = Machine()
    request = machine.add(1, prompt, 5)
    machine.collect()
    assert request.finish_reason == "error" and message in str(machine.errors[1])


def test_a_cache_smaller_than_the_model_length_bounds_prompt_and_output() -> None:
    machine = Machine(blocks=4)
    machine.add(1, [1] * 16, 5)
    machine.add(2, [1] * 10, 50, eos_token_ids=frozenset())
    machine.run()
    assert "at most 15 fit" in str(machine.errors[1])
    assert machine.done[2].finish_reason == "length" and len(machine.emitted[2]) == 6


def test_a_full_queue_refuses() -> None:
    machine = Machine(replace(LIMITS, max_waiting=2))
    for key in range(3):
        machine.add(key, [1], 1)
    machine.collect()
    assert "queue is full: 2 requests" in str(machine.errors[2])


def test_cancel_works_in_every_state() -> None:
    machine = Machine(replace(LIMITS, max_num_seqs=1))
    for key in (1, 2):
        machine.add(key, [key] * 30, 9)
    scheduler = machine.scheduler
    step = scheduler.schedule(0)
    scheduler.cancel(2, 0)
    scheduler.cancel(1, 0)
    scheduler.cancel(77, 0)
    assert set(scheduler.requests) == {1}, "blocks being written must not be given away"
    scheduler.update(step, machine.compute(step), 0)
    scheduler.cancel(1, 0)
    machine.collect()
    assert {key: r.finish_reason for key, r in machine.done.items()} == {
        1: "cancelled",
        2: "cancelled",
    }
    assert machine.kv.num_used == 0 and machine.emitted[1] == []


def test_deadlines_end_waiting_and_running_requests() -> None:
    machine = Machine(replace(LIMITS, max_num_seqs=1))
    machine.add(1, [1], 90, deadline_us=1100, eos_token_ids=frozenset())
    machine.add(2, [1], 90, deadline_us=1050)
    machine.run()
    assert {r.key: (r.finish_reason, r.finished_us) for r in machine.done.values()} == {
        2: ("deadline", 1050),
        1: ("deadline", 1100),
    }


def test_a_failed_step_ends_its_requests_and_nobody_else() -> None:
    machine = Machine(replace(LIMITS, max_num_seqs=2))
    for key in (1, 2, 3):
        machine.add(key, [key] * 5, 2)
    step = machine.scheduler.schedule(0)
    machine.scheduler.fail(step, "the device is gone", 0)
    machine.collect()
    assert machine.errors == {1: "the device is gone", 2: "the device is gone"}
    machine.run()
    assert len(machine.emitted[3]) > 0 and machine.kv.num_used == 0


def test_an_error_of_one_row_ends_that_request_alone() -> None:
    machine = Machine()
    for key in (1, 2):
        machine.add(key, [key] * 5, 3, eos_token_ids=frozenset())
    step = machine.scheduler.schedule(0)
    machine.scheduler.update(step, [None, 4], 0, errors={1: "logits are not finite"})
    machine.collect()
    assert machine.errors == {1: "logits are not finite"} and machine.emitted[2] == [4]


def test_resumed_ids_count_as_output() -> None:
    machine = Machine()
    request = machine.add(1, [1, 2], 3, resume_ids=[5, 6], eos_token_ids=frozenset())
    done = machine.add(2, [1, 2], 2, resume_ids=[5, 6])
    machine.run()
    assert machine.emitted[1] == [next_token([1, 2, 5, 6])] and request.finish_reason == "length"
    assert machine.emitted[2] == [] and done.finish_reason == "length"


def test_min_tokens_keeps_stop_ids_from_ending_a_request() -> None:
    request = Request(1, [1], 9, min_tokens=2, stop_token_ids=frozenset({7}))
    request.token_ids += [7]
    assert request.finish_after_last(100) is None
    request.token_ids += [7]
    assert request.finish_after_last(100) == "stop_token"


def test_prompt_logprobs_ask_for_every_position_once_and_never_skip_any() -> None:
    machine = Machine(replace(LIMITS, max_num_batched_tokens=16))
    machine.add(1, [3] * 40, 1)
    machine.run()
    machine.add(2, [3] * 40, 1, prompt_logprobs=1)
    rows = []
    while machine.scheduler.requests:
        step = machine.step()
        rows.append((step.spans[0].start, step.spans[0].num_logits))
    assert rows == [(0, 16), (16, 16), (32, 8)]


def test_schedule_before_update_is_refused() -> None:
    machine = Machine()
    machine.add(1, [1], 1)
    machine.scheduler.schedule(0)
    with pytest.raises(RuntimeError, match=r"before the last step's update"):
        machine.scheduler.schedule(0)


def test_a_token_budget_below_the_batch_is_refused() -> None:
    with pytest.raises(ValueError, match="at least max_num_seqs, 8"):
        Limits(8, 4, 100, 1.0)
