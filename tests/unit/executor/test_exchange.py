"""What ranks of a GPU do that no GPU is needed for: which sums go where, and what a death does."""

import threading
from types import SimpleNamespace

import pytest
import torch

from scalellm.errors import ConfigError
from scalellm.executor import tensor_parallel
from scalellm.executor.expert_use import ExpertTally, used_between
from scalellm.executor.tensor_parallel import TensorParallelExecutor
from scalellm.kernels.exchange.one_shot import MOST_BYTES, OneShot
from scalellm.loader.device import choose_device


@pytest.fixture
def one_shot(monkeypatch):
    """Of two ranks that always have the same, in place of torch's kernel."""
    buffer = torch.zeros(MOST_BYTES // 2, dtype=torch.bfloat16)

    def twice(part, operation, group):
        assert (operation, group) == ("sum", "the ranks")
        assert part.data_ptr() == buffer.data_ptr()
        return part * 2

    ops = SimpleNamespace(symm_mem=SimpleNamespace(one_shot_all_reduce=twice))
    monkeypatch.setattr(torch, "ops", ops)
    return OneShot(buffer, "the ranks")


def test_small_sums_go_through_memory_that_all_map(one_shot):
    x = torch.arange(48).bfloat16().view(3, 16)
    assert one_shot.takes(x)
    assert torch.equal(one_shot.sum(x), 2 * x)


@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(MOST_BYTES // 2 + 8, dtype=torch.bfloat16),
        torch.zeros(3, dtype=torch.bfloat16),
        torch.zeros(0, dtype=torch.bfloat16),
        torch.zeros(8),
    ],
    ids=["too large", "not aligned", "empty", "another type"],
)
def test_other_sums_do_not(x, one_shot):
    assert not one_shot.takes(x)


def test_ranks_have_a_gpu_each(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("cuda", 1, 2) == torch.device("cuda", 1)
    assert choose_device("auto", 0, 1, first=1) == torch.device("cuda", 1)
    with pytest.raises(ConfigError, match=r"size 4 needs as many GPUs; .* 2 here"):
        choose_device("auto", 0, 4)
    with pytest.raises(ConfigError, match=r"GPUs beyond the 2 of other replicas; .* 2 here"):
        choose_device("auto", 0, 1, first=2)


@pytest.mark.parametrize("hangs", [False, True])
def test_a_gpu_that_waits_for_a_dead_rank_ends_the_process(hangs, monkeypatch):
    told, ended, released = [], [], threading.Event()
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _d: released.wait() if hangs else None)
    monkeypatch.setattr(tensor_parallel, "_HUNG_S", 0.05)
    monkeypatch.setattr(tensor_parallel.os, "_exit", ended.append)
    executor = object.__new__(TensorParallelExecutor)
    executor.device = torch.device("cuda", 0)
    executor._seat = SimpleNamespace(give_up=lambda: told.append(True))
    executor._lost("rank 1 was killed by SIGKILL")
    released.set()
    assert (told, ended) == ([True], [1] if hangs else [])


def test_a_tally_is_what_layers_counted():
    tally = ExpertTally(3, 1, torch.device("cpu"))
    tally.counts += torch.tensor([2, 4, 5, 1, 0, 7])
    tally.look()
    assert tally.seen == (2, 4, 5, [1, 0, 7], 1)


def test_what_a_step_adds_to_the_experts_use():
    before, after = (2, 4, 5, [1, 0, 7], 1), (4, 8, 9, [2, 5, 9], 1)
    assert used_between(before, after) == (2, 4, 4, [1, 5, 2], 1)
    assert used_between(None, after) == after
    assert used_between(None, None) is None
