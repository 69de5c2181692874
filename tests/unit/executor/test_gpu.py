"""Recorded decode steps and the step ahead, with a model that needs no GPU."""

import numpy as np
import pytest
import torch

from scalellm.config import EngineConfig
from scalellm.executor.batch import Batch, Span
from scalellm.executor.dry_step import (
    RESERVE_BYTES,
    UNCOUNTED_BYTES,
    dry_batch,
    gpu_kv_budget,
)
from scalellm.executor.gpu import MOST_AHEAD, GpuSteps
from scalellm.executor.graphs import LADDER, DecodeGraphs, size_for
from scalellm.executor.inputs import build_arrays
from scalellm.kernels.attention import KVCache, KVGeometry

VOCAB, BLOCK, BLOCKS = 97, 4, 64
CPU = torch.device("cpu")
BROKEN = 13  # the id whose logits are not finite


class Counting:
    """Its next id depends on the id and its position; it remembers what it was given."""

    geometry = KVGeometry(1, 1, 4, 4, (None,))

    def __init__(self):
        self.seen = []

    def forward(self, token_ids, step):
        self.seen.append((token_ids.tolist(), step))
        rows = step.logit_rows.long()
        ids, positions = token_ids.long()[rows], step.positions.long()[rows]
        logits = torch.zeros(len(rows), VOCAB)
        logits[torch.arange(len(rows)), (7 * ids + 3 * positions) % VOCAB] = 1.0
        logits[ids == BROKEN] = torch.nan
        return logits

    @staticmethod
    def after(token_id, position):
        return (7 * token_id + 3 * position) % VOCAB


def draw(scores):
    best = scores.max(-1)
    return torch.where(best.values.isfinite(), best.indices, -1).int()


@pytest.fixture
def model():
    return Counting()


@pytest.fixture
def recorded():
    return []


@pytest.fixture
def steps(model, recorded):
    cache = KVCache.allocate(model.geometry, BLOCKS, BLOCK, torch.float32, CPU)

    def record(work):  # to repeat it is to call it
        recorded.append(work)
        return work

    return GpuSteps(model, cache, CPU, draw, DecodeGraphs(model, cache, 64, draw, record))


def arrays(*spans):
    return build_arrays(Batch(spans), BLOCK, BLOCKS)


def decode(token_id, start, blocks=None):
    return Span([token_id], start, blocks or list(range(start // BLOCK + 1)), 1)


def test_a_step_is_recorded_once_for_each_size(steps, recorded):
    for count in (1, 3, 4, 3):
        batch = arrays(*[decode(i + 1, 5) for i in range(count)])
        expected = [Counting.after(i + 1, 5) for i in range(count)]
        assert steps.forward(batch).argmax(-1).tolist() == expected
    assert len(recorded) == 2


def test_a_wider_table_is_another_step(steps, recorded):
    steps.forward(arrays(decode(1, 5)))
    steps.forward(arrays(decode(1, 16 * BLOCK, list(range(17)))))
    assert len(recorded) == 2


def test_what_fills_a_step_up_stores_and_attends_to_nothing(steps, model):
    steps.forward(arrays(*[decode(i, 9) for i in range(3)]))
    steps.forward(arrays(decode(1, 5), decode(2, 6), decode(4, 7)))
    paged = model.seen[-1][1].attention
    assert paged.slots.tolist() == [5, 6, 7, -1]
    assert paged.spans.tolist() == [[0, 5, 1], [1, 6, 1], [2, 7, 1], [0, 0, 0]]
    assert model.seen[-1][0] == [1, 2, 4, 0]


def test_prompts_and_steps_beyond_the_ladder_are_not_recorded(steps, recorded):
    assert steps.greedy(arrays(Span([1, 2], 0, [0], 1)), True) == [Counting.after(2, 1)]
    steps.forward(arrays(*[decode(1, 2)] * 65))
    assert not recorded


def test_prompts_are_planned_for_what_computes_them_and_decodes_are_not(model):
    class Planner:
        def __init__(self):
            self.planned = []

        def plan(self, spans, tables, block_size):
            self.planned.append((spans.tolist(), tables.tolist(), block_size))
            return self

    cache, planner = KVCache.allocate(model.geometry, BLOCKS, BLOCK, torch.float32, CPU), Planner()
    graphs = DecodeGraphs(model, cache, 64, draw, lambda work: work)
    steps = GpuSteps(model, cache, CPU, draw, graphs, prompts=planner)
    steps.forward(arrays(decode(1, 5), Span([1, 2, 3], 0, [7], 1)))
    assert planner.planned == [([[0, 5, 1, 0], [1, 0, 3, 2]], [0, 1, 7], BLOCK)]
    assert model.seen[-1][1].attention.prompts is planner
    steps.forward(arrays(decode(1, 6)))
    assert model.seen[-1][1].attention.prompts is None
    assert len(planner.planned) == 1


def run(steps, starts, count, **more):
    """Greedy ids of `count` steps of sequences that begin with their own number."""
    ids, found = [i + 1 for i in range(len(starts))], []
    for index in range(count):
        spans = [decode(token, start + index) for token, start in zip(ids, starts, strict=True)]
        ids = steps.greedy(arrays(*spans), **{"followed": True, **more})
        found.append(ids)
    return found


def expected(starts, count):
    ids, found = [i + 1 for i in range(len(starts))], []
    for index in range(count):
        ids = [Counting.after(t, s + index) for t, s in zip(ids, starts, strict=True)]
        found.append(ids)
    return found


def test_the_step_ahead_is_taken_where_tables_have_room(steps):
    """From position 0 on, in blocks of 4: steps 1 to 3 of each block were started before."""
    assert run(steps, [0], 8) == expected([0], 8)
    assert steps.steps_ahead == 6


def test_two_sequences_ahead(steps):
    assert run(steps, [0, 5], 6) == expected([0, 5], 6)
    assert steps.steps_ahead == 3


def test_nothing_is_started_ahead_of_a_sequences_end_or_for_many(steps, model):
    run(steps, [0], 3, followed=False)
    run(steps, [0] * (MOST_AHEAD + 1), 3)
    assert steps.steps_ahead == 0
    assert len(model.seen) == 6


@pytest.mark.parametrize(
    "other",
    [
        (decode(Counting.after(1, 0), 1),),
        (decode(5, 1), decode(Counting.after(2, 0), 1)),
        (decode(Counting.after(1, 0), 1), decode(Counting.after(2, 0), 1, [3])),
        (decode(Counting.after(1, 0), 1), decode(Counting.after(2, 0), 2)),
    ],
    ids=["one is gone", "another id", "another block", "another position"],
)
def test_a_step_that_was_not_foreseen_is_computed(other, steps):
    steps.greedy(arrays(decode(1, 0), decode(2, 0)), True)
    found = steps.greedy(arrays(*other), True)
    assert found == [Counting.after(span.token_ids[0], span.start) for span in other]
    assert steps.steps_ahead == 0


def test_a_grown_table_is_the_same_step(steps):
    steps.greedy(arrays(decode(1, 0)), True)
    steps.greedy(arrays(decode(Counting.after(1, 0), 1, [0, 9])), True)
    assert steps.steps_ahead == 1


def test_a_prompt_between_forgets_the_step_ahead(steps):
    steps.greedy(arrays(decode(1, 0)), True)
    steps.greedy(arrays(Span([1, 2], 0, [5], 1)), True)
    steps.greedy(arrays(decode(Counting.after(1, 0), 1)), True)
    assert steps.steps_ahead == 0


def test_a_row_without_an_id_is_none_and_is_not_followed(steps, model):
    assert steps.greedy(arrays(decode(BROKEN, 0), decode(2, 0)), True) == [
        None, Counting.after(2, 0),
    ]  # fmt: skip
    assert min(model.seen[-1][0]) == 0  # an id of the embedding, whatever comes of it
    steps.greedy(arrays(decode(Counting.after(2, 0), 1)), True)
    assert steps.steps_ahead == 0


def test_sizes():
    assert size_for(1, 64) == 1
    assert size_for(33, 64) == 40
    assert size_for(65, 64) is None
    assert list(LADDER) == sorted(LADDER)


def test_the_dry_step_has_all_tokens_and_logits():
    config = EngineConfig(max_num_batched_tokens=100, max_num_seqs=50, block_size=16)
    batch = dry_batch(config, 40)
    assert [len(span.token_ids) for span in batch.spans] == [40, 40, 20]
    assert batch.num_logits == 50
    blocks = np.concatenate([np.array(span.block_table) for span in batch.spans])
    assert blocks.tolist() == list(range(8))


def test_the_kv_cache_gets_what_is_left():
    free, total, own = 100 << 30, 140 << 30, 40 << 30
    kept = RESERVE_BYTES + UNCOUNTED_BYTES
    assert gpu_kv_budget(free, total, own, 0.9, 3 << 30) == (83 << 30) - kept
    assert gpu_kv_budget(1 << 30, total, own, 0.9, 1 << 30) == 0


def test_replicas_that_share_a_gpu_get_their_shares_whoever_comes_first():
    """The second one finds little free, and that is no reason to take less than its share."""
    total, own, step = 140 << 30, 20 << 30, 2 << 30
    first = gpu_kv_budget(total - own - UNCOUNTED_BYTES, total, own, 0.45, step)
    free = total - 2 * (own + UNCOUNTED_BYTES) - first
    assert gpu_kv_budget(free, total, own, 0.45, step) == first
    assert 2 * (own + UNCOUNTED_BYTES + first + step) < total
    # Somebody else has most of what is free.
    assert gpu_kv_budget(4 << 30, total, own, 0.45, step) == (2 << 30) - RESERVE_BYTES
