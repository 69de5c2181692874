"""A model as its matrices, heads and layers: what decides how long a step must take.

Free of torch, so that a machine can be told what it would reach without loading anything.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Self

if TYPE_CHECKING:
    from scalellm.models.config import ModelConfig

Precision = Literal["bf16", "int8", "int4"]
PRECISIONS: tuple[Precision, ...] = ("bf16", "int8", "int4")
_BF16_BYTES = 2.0
# int4: groups of 32 weights share a bf16 scale.
_WEIGHT_BYTES = {"bf16": _BF16_BYTES, "int8": 1.0, "int4": 0.5 + _BF16_BYTES / 32}
_SCALE_BYTES = 4  # of an int8 channel, and of an int8 key or value: f32


@dataclass(frozen=True, slots=True)
class MatrixShape:
    """A weight [n, k] that so many layers have one of; with experts one for each of them."""

    name: str
    n: int
    k: int
    layers: int
    gated: bool = False  # gate rows, then as many up rows: silu(gate x) * (up x)
    row_parallel: bool = False  # devices would divide its inputs
    experts: int = 1
    experts_per_token: int = 1

    def weight_bytes(self, precision: Precision) -> float:
        """Of one of them, its scales included."""
        scales = _SCALE_BYTES * self.n if precision == "int8" else 0
        return self.n * self.k * _WEIGHT_BYTES[precision] + scales

    def experts_hit(self, rows: int) -> float:
        """Expected number of experts that `rows` tokens choose, each at random."""
        missed = 1.0 - self.experts_per_token / self.experts
        return self.experts * (1.0 - missed**rows)


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A decoder; `experts` 0 where every layer has one MLP."""

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    experts: int = 0
    experts_per_token: int = 0
    expert_intermediate: int = 0
    sparse_layers: int = 0

    @classmethod
    def of_config(cls, name: str, config: "ModelConfig") -> Self:
        moe = config.moe
        return cls(
            name,
            layers=config.num_layers,
            hidden=config.hidden_size,
            heads=config.num_heads,
            kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            intermediate=config.intermediate_size,
            vocab=config.vocab_size,
            experts=moe.num_experts if moe else 0,
            experts_per_token=moe.experts_per_token if moe else 0,
            expert_intermediate=moe.intermediate_size if moe else 0,
            sparse_layers=sum(moe.sparse_layers) if moe else 0,
        )

    @property
    def matrices(self) -> tuple[MatrixShape, ...]:
        """All that every token of a prompt goes through, in their order."""
        inner = self.heads * self.head_dim
        qkv = inner + 2 * self.kv_heads * self.head_dim
        found = [
            MatrixShape("qkv", qkv, self.hidden, self.layers),
            MatrixShape("o", self.hidden, inner, self.layers, row_parallel=True),
        ]
        dense, sparse = self.layers - self.sparse_layers, self.sparse_layers
        if dense:
            found += _mlp("", self.hidden, self.intermediate, dense)
        if sparse:
            chosen = (self.experts, self.experts_per_token)
            found += _mlp("expert ", self.hidden, self.expert_intermediate, sparse, *chosen)
        return tuple(found)

    @property
    def output(self) -> MatrixShape:
        """Hidden states to logits: of the rows that a token is drawn for."""
        return MatrixShape("lm_head", self.vocab, self.hidden, 1)

    def weight_bytes(self, precision: Precision) -> float:
        """What all matrices take in memory; without the embedding's table."""
        return sum(
            matrix.layers * matrix.experts * matrix.weight_bytes(precision)
            for matrix in (*self.matrices, self.output)
        )

    @property
    def embedding_bytes(self) -> float:
        return self.vocab * self.hidden * _BF16_BYTES

    def kv_bytes_per_token(self, precision: Precision = "bf16") -> float:
        """Of all layers; int8 has a scale for each token and head."""
        head = self.head_dim * _WEIGHT_BYTES[precision]
        if precision == "int8":
            head += _SCALE_BYTES
        return 2 * self.layers * self.kv_heads * head

    def attention_ops(self, pairs: int) -> float:
        """Of `pairs` of a query with a key it sees: two products of a head's width, in each."""
        return 4.0 * self.layers * self.heads * self.head_dim * pairs


def _mlp(
    prefix: str, hidden: int, inner: int, layers: int, experts: int = 1, per_token: int = 1
) -> list[MatrixShape]:
    return [
        MatrixShape(f"{prefix}gate_up", 2 * inner, hidden, layers, True, False, experts, per_token),
        MatrixShape(f"{prefix}down", hidden, inner, layers, False, True, experts, per_token),
    ]


QWEN3_0_6B = ModelShape("Qwen3-0.6B", 28, 1024, 16, 8, 128, 3072, 151_936)
# What people know the sizes of.
KNOWN_SHAPES = (
    QWEN3_0_6B,
    ModelShape("Qwen3-1.7B", 28, 2048, 16, 8, 128, 6144, 151_936),
    ModelShape("Qwen3-4B", 36, 2560, 32, 8, 128, 9728, 151_936),
    ModelShape("Llama-3.1-8B", 32, 4096, 32, 8, 128, 14_336, 128_256),
)
