"""Triton's kernels beside their references: on a GPU where there is one, else interpreted.

The interpreter computes bf16 and rounds to fp8 wrongly (docs/gpu.md), so kernels are run in fp32
and fp16 here, and fp8 is compared by what it stands for.
"""

import threading
from collections import defaultdict
from dataclasses import replace

import pytest
import torch

from scalellm.kernels import device
from scalellm.kernels.quantise import Fp8Rows
from scalellm.layers.rotary import RopeConfig
from scalellm.models.config import ModelConfig, MoeConfig

HAS_GPU = torch.cuda.is_available()


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    if not HAS_GPU:
        monkeypatch.setattr(device, "on_gpu", lambda _x: True)
        torch.set_num_threads(1)


@pytest.fixture
def where() -> torch.device:
    return torch.device("cuda" if HAS_GPU else "cpu")


@pytest.fixture
def numbers(where):
    """Random numbers of a shape, the same in every run."""
    generator = torch.Generator().manual_seed(7)

    def draw(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(where, dtype)

    return draw


@pytest.fixture
def fp8_error():
    """Check fp8 rows against the numbers they stand for.

    Half the distance to the next number is 1/16 of it; the interpreter loses the carry into the
    exponent of one in fifty, which is half of it.
    """

    def check(rows: Fp8Rows, expected: torch.Tensor) -> None:
        error = (rows.dequantised() - expected.float()).abs()
        allowed = expected.abs() / 16 + expected.abs().amax(-1, keepdim=True) * 2**-15
        wrong = (error > allowed).float().mean().item()
        assert wrong <= (0.0 if HAS_GPU else 0.05)
        assert (error <= 8.1 * allowed).all()

    return check


DENSE = ModelConfig(
    architecture="Qwen3ForCausalLM",
    family="qwen3",
    vocab_size=67,
    hidden_size=32,
    intermediate_size=40,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    norm_eps=1e-6,
    rope=RopeConfig(10000.0, 16),
    max_position_embeddings=128,
    windows=(None, 8),
    tie_word_embeddings=True,
    qkv_bias=False,
    output_bias=False,
    mlp_bias=False,
    qk_norm=True,
    moe=None,
    checkpoint_dtype="float32",
    eos_token_ids=(0,),
)
SPARSE = replace(
    DENSE, family="mixtral", qk_norm=False, windows=(None, None),
    moe=MoeConfig(40, 4, 2, True, (True, True)),
)  # fmt: skip


@pytest.fixture
def shapes():
    """Models small enough to be interpreted, by name."""
    return {"dense": DENSE, "sparse": SPARSE}


class Turns:
    """Ranks as threads, of which one runs at a time and gives way where it exchanges: Triton's
    interpreter is no place for several."""

    def __init__(self, ranks):
        self.ranks, self.turn = ranks, 0
        self.changed = threading.Condition()
        self.brought = defaultdict(dict)  # round -> rank -> tensor

    def run(self, work):
        """What `work(rank, exchange)` returns for each rank."""
        found, errors = [None] * self.ranks, []

        def one(rank):
            exchange = Exchanged(self, rank)
            self.wait(rank)
            try:
                found[rank] = work(rank, exchange)
            except BaseException as error:
                errors.append(error)
            self.give_way(None)

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(self.ranks)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        return found

    def wait(self, rank):
        with self.changed:
            assert self.changed.wait_for(lambda: self.turn == rank, timeout=120)

    def give_way(self, rank):
        with self.changed:
            self.turn = (self.turn + 1) % self.ranks
            self.changed.notify_all()
        if rank is not None:
            self.wait(rank)


class Exchanged:
    def __init__(self, turns, rank):
        self.turns, self.rank, self.round = turns, rank, 0

    def all(self, x):
        brought = self.turns.brought[self.round]
        brought[self.rank] = x.clone()
        self.round += 1
        self.turns.give_way(self.rank)
        return [brought[rank] for rank in range(self.turns.ranks)]

    def sum(self, x):
        assert x.is_contiguous()
        return torch.stack(self.all(x)).sum(0)

    def columns(self, x, bounds):
        found = torch.cat(self.all(x), dim=1)
        assert found.shape[1] == bounds[-1]
        return found


@pytest.fixture
def on_ranks():
    """Run `work(rank, exchange)` as each of so many ranks, and give what they returned."""
    return lambda ranks, work: Turns(ranks).run(work)
