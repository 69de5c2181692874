"""What quantisation costs the demo model: ``python -m scalellm.demo.quantised DIR``.

An answer is right if it is what greedy decoding would give, to the letter and to its end: if every
one of its tokens has the largest logit after those before it, which one forward pass tells. Losses
are those of `evaluate`, of held-out conversations' answers and of held-out plain text.
"""

import argparse
import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from scalellm.config import EngineConfig
from scalellm.demo import arithmetic, exam
from scalellm.demo.corpus import Message, render
from scalellm.demo.evaluate import SEED, answer_mask, held_out_losses
from scalellm.executor.batch import Batch, Span
from scalellm.executor.single import SingleExecutor

BLOCK = 16
BATCH_TOKENS = 4096


@dataclass(frozen=True, slots=True)
class Quality:
    """How good a model is at what the demo model learned."""

    sums_right: float  # share of held-out sums
    answer_loss: float  # nats a token
    plain_loss: float

    def __str__(self) -> str:
        return (
            f"sums {self.sums_right:.2%}, "
            f"loss of answers {self.answer_loss:.5f}, of plain text {self.plain_loss:.5f}"
        )


class Engine:
    """A model folder in the engine, as `quantization` and `kv_cache_dtype` say."""

    def __init__(self, folder: Path, quantization: str, kv_cache_dtype: str = "auto") -> None:
        from transformers import AutoTokenizer

        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self._executor = SingleExecutor.load(
            EngineConfig(
                model_path=folder,
                device="cpu",
                dtype="bfloat16",
                quantization=quantization,
                kv_cache_dtype=kv_cache_dtype,
                block_size=BLOCK,
                kv_cache_memory_bytes=64 << 20,
            )
        )

    def ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def logits(self, text: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids [T] of a text and the logits [T, vocabulary], fp32, that follow each."""
        ids = self.ids(text)
        (logits,) = self.forward([ids])
        return torch.tensor(ids), logits

    def forward(self, texts: Sequence[Sequence[int]]) -> tuple[torch.Tensor, ...]:
        """The logits [T, vocabulary] of each text's ids."""
        spans = []
        first_block = 0
        for ids in texts:
            blocks = -(-len(ids) // BLOCK)
            table = range(first_block, first_block + blocks)
            spans.append(Span(ids, 0, table, len(ids)))
            first_block += blocks
        logits = self._executor.forward(Batch(tuple(spans)))
        return torch.split(logits.clone(), [len(ids) for ids in texts])


def share_right(engine: Engine, cases: Sequence[exam.Case]) -> float:
    """Of the cases, those that greedy decoding answers to the letter."""
    right = 0
    texts = [engine.ids(render([*c.messages, Message("assistant", c.answer)])) for c in cases]
    for batch in _batches(texts):
        for ids, logits in zip(batch, engine.forward(batch), strict=True):
            mask = answer_mask(ids, engine.tokenizer)
            last = len(mask) - 1 - mask[::-1].index(True)
            first = last + 1 - mask[last::-1].index(False)
            expected = torch.tensor(ids[first : last + 1])
            right += torch.equal(logits[first - 1 : last].argmax(dim=1), expected)
    return right / len(cases)


def _batches(texts: Sequence[Sequence[int]]) -> Iterator[list[Sequence[int]]]:
    batch: list[Sequence[int]] = []
    for ids in texts:
        if sum(map(len, batch)) + len(ids) > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(ids)
    yield batch


def quality(engine: Engine, stride: int = 1, documents: int = 400) -> Quality:
    """On every ``stride``-th held-out sum in every kind of phrasing, and that many documents."""
    sums = list(arithmetic.all_sums("held_out"))[::stride]
    rng = random.Random(SEED)
    cases = [case for kind in exam.SUM_KINDS for case in exam.sum_cases(sums, kind, rng)]
    return Quality(share_right(engine, cases), *held_out_losses(engine, documents))


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what quantisation costs a demo model.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--stride", type=int, default=1, help="ask every n-th held-out sum only")
    arguments = parser.parse_args()
    for weights, kv in itertools.product(("none", "int8", "int4"), ("auto", "int8")):
        found = quality(Engine(arguments.folder, weights, kv), arguments.stride)
        print(f"weights {weights}, keys and values {kv}: {found}", flush=True)


if __name__ == "__main__":
    main()
