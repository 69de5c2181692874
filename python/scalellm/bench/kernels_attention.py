"""Times attention over the paged cache: many short sequences, one long one, whole prompts.

Storing the step's keys and values is part of it, as in a step.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from scalellm import _core
from scalellm.bench.floor import Cost
from scalellm.bench.model_shape import ModelShape
from scalellm.bench.timing import Timed, copies_of, median_s
from scalellm.kernels.attention.packed import KV_TYPES, PackedStep
from scalellm.kernels.linear.packed import aligned_bytes

_BLOCK_TOKENS = 16
_SPREAD = 7_368_787  # a prime: blocks of a sequence lie far apart, as they do after a while
# Of cached keys and values, by four bytes: bf16 one halves; for int8 60, with a scale of 0.0115.
_FILL = {"bfloat16": 0x3F003F00, "int8": 0x3C3C3C3C}


@dataclass(frozen=True, slots=True)
class AttentionCase:
    """`sequences` of `tokens` each, of which the last `new` are computed."""

    sequences: int
    tokens: int
    new: int

    @property
    def name(self) -> str:
        return "decode" if self.new == 1 else "prefill"

    @property
    def pairs(self) -> int:
        """A query with each key it sees."""
        before = self.tokens - self.new
        return self.sequences * (self.new * before + self.new * (self.new + 1) // 2)


CASES = (
    AttentionCase(64, 160, 1),
    AttentionCase(64, 1024, 1),
    AttentionCase(1, 8192, 1),
    AttentionCase(1, 128, 128),
    AttentionCase(1, 512, 512),
    AttentionCase(1, 2048, 2048),
)


def time_attention(shape: ModelShape, seconds: float) -> Iterator[Timed]:
    """One layer of each case with keys and values of each type."""
    for kv in KV_TYPES:
        for case in CASES:
            yield _time(shape, case, kv, seconds)


def step_of(case: AttentionCase) -> PackedStep:
    """A step of the case's sequences, whose blocks are spread over the cache."""
    each = -(-case.tokens // _BLOCK_TOKENS)
    total = case.sequences * each
    spans = [
        (index * case.new, case.tokens - case.new, case.new, index * each)
        for index in range(case.sequences)
    ]
    tables = torch.arange(total) * _SPREAD % total
    return PackedStep(torch.tensor(spans, dtype=torch.int64), tables.to(torch.int32))


def _time(shape: ModelShape, case: AttentionCase, kv: str, seconds: float) -> Timed:
    step = step_of(case)
    code = [KV_TYPES.index(kv), _BLOCK_TOKENS, shape.kv_heads, shape.head_dim]
    layer_bytes = step.tables.numel() * _core.cpu_kv_block_bytes(code)
    caches = [aligned_bytes(layer_bytes) for _ in range(copies_of(layer_bytes))]
    for cache in caches:
        cache.view(torch.int32).fill_(_FILL[kv])
    rows = case.sequences * case.new
    columns = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
    generator = torch.Generator().manual_seed(rows)
    qkv = torch.rand(rows, columns, generator=generator).sub_(0.5).bfloat16()
    angles = torch.full((rows, shape.head_dim), 0.5)
    out = torch.zeros(rows, shape.heads * shape.head_dim, dtype=torch.bfloat16)

    def all_in_turn() -> None:
        for cache in caches:
            _core.cpu_attention(
                (qkv.data_ptr(), rows, columns),
                shape.heads,
                (0, 0),
                0.0,
                (angles.data_ptr(), shape.head_dim),
                (cache.data_ptr(), cache.numel()),
                code,
                (step.spans.data_ptr(), step.spans.shape[0]),
                (step.tables.data_ptr(), step.tables.numel()),
                shape.head_dim**-0.5,
                0,
                out.data_ptr(),
            )

    time_s = median_s(all_in_turn, seconds) / len(caches)
    # Keys and values that a prompt just wrote are still in a cache.
    read_bytes = float(layer_bytes) if case.new == 1 else 0.0
    cost = Cost(read_bytes, shape.attention_ops(case.pairs) / shape.layers, "bf16")
    size = f"{case.sequences} x {case.tokens}" if case.new == 1 else f"{case.tokens} tokens"
    return Timed(f"{kv} {case.name}", size, time_s, cost)
