"""What requests look like before they are spelled: lengths, shared beginnings, turns.

Source.draw ──> RequestShape ──> Speller.spell (prompts.py) ──> Prompt ──> load generator
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from scalellm.bench.lengths import Lengths
from scalellm.bench.prefix import BLOCK_TOKENS, reused_share, shared_prefixes
from scalellm.bench.shapes import RequestShape, TurnShape


class Source(Protocol):
    def draw(self, number: int, random: np.random.Generator) -> list[RequestShape]:
        """`number` requests in the order in which they are sent."""
        ...

    def describe(self) -> dict[str, Any]:
        """JSON-ready."""
        ...


@dataclass(frozen=True, slots=True)
class Synthetic:
    """Lengths from distributions; `prefix_reuse` of the prompts' tokens repeat earlier ones."""

    input: Lengths
    output: Lengths
    prefix_reuse: float = 0.0
    name: str = "fixed"

    def draw(self, number: int, random: np.random.Generator) -> list[RequestShape]:
        inputs = self.input.draw(number, random)
        outputs = self.output.draw(number, random)
        blocks: Sequence[tuple[int, ...]] = [()] * number
        block_tokens = BLOCK_TOKENS
        if self.prefix_reuse:
            # Short prompts get smaller blocks, so that there is something to share.
            mean_tokens = sum(inputs) // max(number, 1)
            block_tokens = max(1, min(BLOCK_TOKENS, mean_tokens // 8))
            blocks = shared_prefixes(inputs, self.prefix_reuse, block_tokens, random)
        return [
            RequestShape(*asked, block_tokens=block_tokens)
            for asked in zip(inputs, outputs, blocks, strict=True)
        ]

    def describe(self) -> dict[str, Any]:
        return {
            "kind": self.name,
            "input": self.input.describe(),
            "output": self.output.describe(),
            "prefix_reuse": self.prefix_reuse,
        }


@dataclass(frozen=True, slots=True)
class Conversations:
    """Chats of `turns` requests; each takes one of `systems` shared system prompts."""

    input: Lengths
    output: Lengths
    turns: int = 4
    systems: int = 4
    system_tokens: int = 256
    think_s: float = 0.0

    def draw(self, number: int, random: np.random.Generator) -> list[RequestShape]:
        return [self._conversation(random) for _ in range(number)]

    def _conversation(self, random: np.random.Generator) -> RequestShape:
        inputs = self.input.draw(self.turns, random)
        outputs = self.output.draw(self.turns, random)
        think_s = random.exponential(self.think_s, self.turns)
        return RequestShape(
            inputs[0],
            outputs[0],
            system_id=int(random.integers(self.systems)) if self.system_tokens else None,
            system_tokens=self.system_tokens,
            turns=tuple(
                TurnShape(inputs[at], outputs[at], float(think_s[at]))
                for at in range(1, self.turns)
            ),
        )

    def describe(self) -> dict[str, Any]:
        return {
            "kind": "conversations",
            "input": self.input.describe(),
            "output": self.output.describe(),
            "turns": self.turns,
            "systems": self.systems,
            "system_tokens": self.system_tokens,
            "think_s": self.think_s,
        }


@dataclass(frozen=True, slots=True)
class Recorded:
    """Requests of a trace or a file of prompts, in its order, from the first again at its end."""

    shapes: tuple[RequestShape, ...]
    kind: str
    name: str

    def draw(self, number: int, random: np.random.Generator) -> list[RequestShape]:
        del random  # a recording leaves nothing to chance
        return [self.shapes[at % len(self.shapes)] for at in range(number)]

    def describe(self) -> dict[str, Any]:
        return {"kind": self.kind, "file": self.name, "requests": len(self.shapes)}


def describe_shapes(shapes: Sequence[RequestShape]) -> dict[str, Any]:
    """What was drawn in the end: means, percentiles, reuse."""

    def of(values: list[int]) -> dict[str, float]:
        p50, p90 = np.percentile(values, [50, 90])
        return {"mean": float(np.mean(values)), "p50": float(p50), "p90": float(p90)}

    found: dict[str, Any] = {
        "input_tokens": of([shape.input_tokens for shape in shapes]),
        "output_tokens": of([shape.output_tokens for shape in shapes]),
    }
    if any(shape.blocks for shape in shapes):
        found["prefix_reuse"] = reused_share(
            [shape.blocks for shape in shapes],
            [shape.input_tokens for shape in shapes],
            shapes[0].block_tokens,
        )
    return found
