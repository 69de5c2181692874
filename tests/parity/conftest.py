"""Pairs of a tiny random model in transformers and the same weights in a SingleExecutor."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from scalellm.config import EngineConfig
from scalellm.executor.batch import Batch, Span
from scalellm.executor.single import SingleExecutor

VOCAB = 101
BLOCK = 4


@dataclass
class Pair:
    """The same model twice."""

    reference: Any
    executor: SingleExecutor
    folder: Path
    random: Random = field(default_factory=lambda: Random(7))

    def __post_init__(self) -> None:
        self.free = list(range(self.executor.num_blocks))
        self.random.shuffle(self.free)

    def ids(self, count: int) -> list[int]:
        return [self.random.randrange(VOCAB) for _ in range(count)]

    def blocks(self, tokens: int) -> list[int]:
        """KV blocks for that many tokens, scattered over the cache."""
        return [self.free.pop() for _ in range(-(-tokens // BLOCK))]

    def release(self, *tables: Sequence[int]) -> None:
        for table in tables:
            self.free.extend(table)

    def run(self, *spans: Span) -> list[Tensor]:
        """One step; each span's logits."""
        logits = self.executor.forward(Batch(spans))
        return list(logits.split([span.num_logits for span in spans]))

    def expected(self, ids: Sequence[int]) -> Tensor:
        """transformers' logits of every position, [len(ids), vocab], fp32."""
        with torch.inference_mode():
            logits: Tensor = self.reference(input_ids=torch.tensor([list(ids)])).logits[0]
        return logits.float()


def sharpen(model: Any) -> None:
    """Weights that give logits of unit size and norms and biases that matter.

    Fresh weights are so small that a missing bias or norm would pass unseen.
    """
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
            elif "norm" in name and name.endswith("weight"):
                parameter.add_(0.2 * noise)
            else:
                parameter.copy_(0.3 * noise)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small lose by threads, most of all beside other work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


MakePair = Callable[..., Pair]


@pytest.fixture(scope="module")
def make_pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MakePair]:
    """Make, or give again, the pair of a transformers configuration."""
    pairs: dict[tuple[str, str, int], Pair] = {}

    def make(config: Any, dtype: str = "float32", max_shard_size: str = "5GB") -> Pair:
        key = (config.to_json_string(), dtype, len(max_shard_size))
        if key not in pairs:
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(config).eval()
            sharpen(model)
            model = model.to(getattr(torch, dtype))
            folder: Path = tmp_path_factory.mktemp("model")
            model.save_pretrained(folder, max_shard_size=max_shard_size)
            engine = EngineConfig(
                model_path=folder,
                dtype=dtype,
                device="cpu",
                block_size=BLOCK,
                kv_cache_memory_bytes=2 << 20,
            )
            pairs[key] = Pair(model, SingleExecutor.load(engine), folder)
        return pairs[key]

    yield make
    for pair in pairs.values():
        pair.executor.close()
