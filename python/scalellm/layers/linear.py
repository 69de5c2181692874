"""Linear layers, also several that share an input and are multiplied as one."""

from collections.abc import Mapping
from typing import Self

import torch
from torch import Tensor

from scalellm.kernels.exchange import Exchange
from scalellm.kernels.linear import Matrix, linear, linear_silu_and_mul, logits, logits_among
from scalellm.kernels.quantise import Activations
from scalellm.layers.weights import MatrixSpec, Use, WeightSource


class Linear:
    """y = x W^T + b: [T, k] -> [T, n]; where ranks divide k, x has a rank's part of it."""

    def __init__(
        self,
        weight: Matrix,
        bias: Tensor | None = None,
        ranks: int = 0,
        exchange: Exchange | None = None,
    ) -> None:
        self.weight = weight  # [n, k]
        self.bias = bias  # [n]
        # With whom to add products up: 0 and None for nobody.
        self.ranks, self.exchange = ranks, exchange

    @classmethod
    def load(
        cls,
        source: WeightSource,
        parts: Mapping[str, int],
        k: int,
        use: Use,
        bias: bool = False,
        heads: tuple[int, ...] = (),
        divided: bool = True,
    ) -> Self:
        """Stack the layers `parts` (name: output width) along their outputs, in their order.

        `heads` of each part; `divided`: by ranks, as `use` says."""
        spec = MatrixSpec(tuple(parts.items()), k, use, heads, divided)
        biases: Tensor | None = None
        if bias:
            biases = torch.empty(spec.n, dtype=source.dtype, device=source.device)
            first = 0
            for name, outputs in spec.parts:
                source.fill(biases[first : first + outputs], f"{name}.bias")
                first += outputs
            rows = spec.rows_of(source.shard)
            biases = torch.cat([biases[part.start : part.stop] for part in rows])
        if use is Use.ROW and divided:
            shard = source.shard
            return cls(source.matrix(spec), biases, shard.address, shard.exchange)
        return cls(source.matrix(spec), biases)

    def __call__(self, x: Activations) -> Tensor:
        if self.exchange is None:
            return linear(x, self.weight, self.bias, self.ranks)
        total = self.exchange.sum(linear(x, self.weight))
        return total if self.bias is None else total.add_(self.bias)


class GatedLinear(Linear):
    """silu(gate x) * (up x), gate and up multiplied as one: [T, k] -> [T, n / 2]."""

    def gated(self, x: Activations) -> Activations:
        return linear_silu_and_mul(x, self.weight, self.bias)


class OutputLayer:
    """Hidden states to logits: [n, k] -> [n, vocab_size] fp32."""

    def __init__(
        self, source: WeightSource, name: str, vocab_size: int, k: int, tied: Tensor | None
    ) -> None:
        """`tied`: the embedding's table, where the model has but one for both."""
        self.weight = source.matrix(MatrixSpec(((name, vocab_size),), k, Use.OUTPUT), tied)
        self.shard = source.shard
        self.bounds = source.shard.id_bounds(vocab_size)

    def __call__(self, x: Activations) -> Tensor:
        shard = self.shard
        if shard.exchange is not None:
            return shard.exchange.columns(logits(x, self.weight), self.bounds)
        if shard.ranks > 1:
            return logits_among(x, self.weight, self.bounds, shard.rank, shard.address)
        return logits(x, self.weight)


class Embedding:
    """Rows of a table by token id: [T] int64 -> [T, d]; of ids that ranks divide, a rank's."""

    def __init__(self, source: WeightSource, name: str, vocab_size: int, d: int) -> None:
        self.weight = source.table(f"{name}.weight", vocab_size, d)
        shard = source.shard
        self.exchange, self.first = shard.exchange, shard.id_bounds(vocab_size)[shard.rank]

    def __call__(self, token_ids: Tensor) -> Tensor:
        if self.exchange is None:
            return self.weight.index_select(0, token_ids)
        row = token_ids - self.first
        elsewhere = (row < 0) | (row >= len(self.weight))
        found = self.weight.index_select(0, row.masked_fill(elsewhere, 0))
        return self.exchange.sum(found.masked_fill_(elsewhere[:, None], 0))
