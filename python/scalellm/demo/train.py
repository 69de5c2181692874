"""Trains the demo model: ``python -m scalellm.demo.train --out DIR``.

Writes a Hugging Face folder (config, bf16 weights, tokenizer, chat template) from a fixed seed,
on the CPU. ``python -m scalellm.demo.evaluate DIR`` then measures it and writes its card.
"""

import argparse
import json
import math
import random
import resource
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from scalellm.demo import arithmetic
from scalellm.demo.corpus import (
    END_OF_TEXT,
    END_OF_TURN,
    START_OF_TURN,
    Message,
    documents,
    render,
)
from scalellm.demo.network import Network, Shape
from scalellm.demo.tokenizer import save_tokenizer, train_tokenizer


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything that decides the weights, up to the rounding of the machine's kernels."""

    seed: int = 20261121
    steps: int = 3000
    peak_learning_rate: float = 2e-3
    warmup_steps: int = 60
    decay_share: float = 0.4  # the last part of the steps, in which the rate falls to zero
    weight_decay: float = 0.05
    question_weight: float = 0.1  # of the loss on tokens that nobody can predict
    result_weight: float = 3.0  # of the loss on the result of a sum
    autocast: bool = True  # matrix products in bf16, everything else in fp32


@dataclass(frozen=True, slots=True)
class RowKind:
    """Rows of equal length, filled with documents one after the other."""

    length: int
    rows: int
    share: float  # of the steps
    mean_turns: float


ROW_KINDS = (
    RowKind(length=128, rows=32, share=0.72, mean_turns=1.5),
    RowKind(length=448, rows=8, share=0.20, mean_turns=6.0),
    RowKind(length=1536, rows=2, share=0.08, mean_turns=30.0),
)


def token_id(tokenizer: Tokenizer, token: str) -> int:
    number = tokenizer.token_to_id(token)
    if number is None:
        raise ValueError(f"the tokenizer has no token {token!r}")
    return number


class Packer:
    """Rows of token ids with the weight of each token as a target, from a document stream."""

    def __init__(self, tokenizer: Tokenizer, seed: int, kind: RowKind, recipe: Recipe) -> None:
        self._tokenizer = tokenizer
        self._documents = documents(seed, "train", kind.mean_turns)
        self._kind = kind
        self._recipe = recipe
        self._start_of_turn = token_id(tokenizer, START_OF_TURN)
        self._end_of_turn = token_id(tokenizer, END_OF_TURN)
        self._assistant = token_id(tokenizer, "assistant")
        (self._equals,) = tokenizer.encode(" =").ids
        digits = set(tokenizer.encode("0123456789").ids)
        self._result_tokens = digits | set(tokenizer.encode("- - ").ids)
        self._unpredictable_starts = digits | {self._start_of_turn}

    def batch(self) -> tuple[Tensor, Tensor]:
        """Ids [rows, length + 1] and weights of the same shape."""
        rows = [self._row() for _ in range(self._kind.rows)]
        return torch.tensor([ids for ids, _ in rows]), torch.tensor([w for _, w in rows])

    def _row(self) -> tuple[list[int], list[float]]:
        ids: list[int] = []
        weights: list[float] = []
        length = self._kind.length + 1
        while len(ids) < length:
            document = self._tokenizer.encode(next(self._documents)).ids
            ids += document
            weights += self.weights(document)
        return ids[:length], weights[:length]

    def weights(self, ids: list[int]) -> list[float]:
        """The weight of each token as a target.

        1 for answers and stories; less for what the user says, who speaks, and the operands in
        lists of sums, which nobody can predict; more for the results of sums.
        """
        low, high = self._recipe.question_weight, self._recipe.result_weight
        weights = []
        weight = low if ids[0] in self._unpredictable_starts else 1.0
        in_result = False
        for index, token in enumerate(ids):
            if token == self._start_of_turn:
                weight = low
            in_result = in_result and token in self._result_tokens
            weights.append(high if in_result else weight)
            in_result = in_result or token == self._equals
            if token == self._end_of_turn:
                weight = low
            if index >= 2 and ids[index - 2] == self._start_of_turn:
                # The answer begins after "<|im_start|>", "assistant" and the line's end.
                answers = ids[index - 1] == self._assistant
                weight = 1.0 if answers else low
                in_result = answers and self._is_bare_number(ids, index + 1)
        return weights

    def _is_bare_number(self, ids: list[int], start: int) -> bool:
        end = ids.index(self._end_of_turn, start)
        return self._result_tokens.issuperset(ids[start:end])


def learning_rate(recipe: Recipe, step: int) -> float:
    """Linear warm-up, a constant rate, then a cosine down to zero."""
    decay_from = recipe.steps * (1 - recipe.decay_share)
    if step < recipe.warmup_steps:
        return recipe.peak_learning_rate * (step + 1) / recipe.warmup_steps
    if step < decay_from:
        return recipe.peak_learning_rate
    progress = (step - decay_from) / (recipe.steps - decay_from)
    return recipe.peak_learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def batches(tokenizer: Tokenizer, recipe: Recipe) -> Iterator[tuple[Tensor, Tensor]]:
    rng = random.Random(recipe.seed)
    packers = [
        Packer(tokenizer, recipe.seed + number, kind, recipe)
        for number, kind in enumerate(ROW_KINDS, start=1)
    ]
    shares = [kind.share for kind in ROW_KINDS]
    for _ in range(recipe.steps):
        yield rng.choices(packers, shares)[0].batch()


@torch.no_grad()
def held_out_accuracy(network: Network, tokenizer: Tokenizer, recipe: Recipe) -> float:
    """Share of held-out sums whose whole answer greedy decoding would give (teacher forced)."""
    rng = random.Random(recipe.seed)
    right = 0
    sums = rng.sample(list(arithmetic.all_sums("held_out")), 400)
    conversations = []
    for asked in sums:
        answer = Message("assistant", f"{asked.equation}.")
        question = Message("user", arithmetic.question(rng, asked))
        conversations.append(tokenizer.encode(render([question, answer])).ids)
    longest = max(map(len, conversations))
    ids = torch.tensor([c + [0] * (longest - len(c)) for c in conversations])
    best = network(ids).argmax(dim=-1)
    start = token_id(tokenizer, START_OF_TURN)
    for row, conversation in enumerate(conversations):
        answer_from = len(conversation) - conversation[::-1].index(start) + 2
        answer_to = len(conversation) - 1
        right += (
            best[row, answer_from - 1 : answer_to - 1].tolist()
            == conversation[answer_from:answer_to]
        )
    return right / len(sums)


def make_optimizers(network: Network, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon (K. Jordan, 2024) for the layers' matrices, AdamW for embedding and norms."""
    matrices = [p for p in network.model.layers.parameters() if p.dim() == 2]
    norms = [p for p in network.parameters() if p.dim() == 1]
    return [
        torch.optim.Muon(
            matrices,
            lr=recipe.peak_learning_rate,
            weight_decay=recipe.weight_decay,
            adjust_lr_fn="match_rms_adamw",
        ),
        torch.optim.AdamW(
            [network.model.embed_tokens.weight, *norms],
            lr=recipe.peak_learning_rate,
            betas=(0.9, 0.98),
            weight_decay=0.0,
            fused=True,
        ),
    ]


def train(tokenizer: Tokenizer, shape: Shape, recipe: Recipe) -> Network:
    torch.manual_seed(recipe.seed)
    network = Network(shape)
    optimizers = make_optimizers(network, recipe)
    started, tokens, mean_loss = time.monotonic(), 0, 0.0
    for step, (ids, weights) in enumerate(batches(tokenizer, recipe)):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(recipe, step)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=recipe.autocast):
            logits = network(ids[:, :-1])
        losses = F.cross_entropy(
            logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
        )
        target_weights = weights[:, 1:].flatten()
        loss = (losses * target_weights).sum() / target_weights.sum()
        network.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        tokens += weights.numel()
        mean_loss += (loss.item() - mean_loss) * max(0.02, 1 / (step + 1))
        if (step + 1) % 100 == 0 or step + 1 == recipe.steps:
            elapsed = time.monotonic() - started
            used = resource.getrusage(resource.RUSAGE_SELF)
            accuracy = held_out_accuracy(network, tokenizer, recipe)
            print(
                f"step {step + 1:5d}  loss {mean_loss:.4f}  held-out sums {accuracy:.1%}  "
                f"{tokens / 1e6:.2f} M tokens  {elapsed:.0f} s  "
                f"{used.ru_utime + used.ru_stime:.0f} s CPU",
                flush=True,
            )
    return network


def save(network: Network, tokenizer: Tokenizer, shape: Shape, folder: Path) -> None:
    """Writes the Hugging Face folder; the weights in bf16."""
    save_tokenizer(tokenizer, folder, shape.max_position_embeddings)
    end_of_turn = token_id(tokenizer, END_OF_TURN)
    end_of_text = token_id(tokenizer, END_OF_TEXT)
    config = shape.config(eos_token_id=end_of_turn, pad_token_id=end_of_text)
    write_json(folder / "config.json", config)
    write_json(
        folder / "generation_config.json",
        {"eos_token_id": [end_of_turn, end_of_text], "pad_token_id": end_of_text},
    )
    weights = {
        name: parameter.detach().to(torch.bfloat16).contiguous()
        for name, parameter in network.state_dict().items()
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def write_json(path: Path, value: dict[str, object]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Train ScaleLLM's demo model on the CPU.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--steps", type=int, default=Recipe().steps)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    recipe, shape = Recipe(steps=arguments.steps), Shape()
    tokenizer = train_tokenizer(shape.vocab_size, recipe.seed)
    network = train(tokenizer, shape, recipe)
    save(network, tokenizer, shape, arguments.out)


if __name__ == "__main__":
    main()
