"""Linear layers, also several that share an input and are multiplied as one."""

from collections.abc import Mapping
from typing import Self

import torch
from torch import Tensor

from scalellm.kernels.linear import Matrix, linear, linear_silu_and_mul, logits
from scalellm.kernels.quantise import Activations
from scalellm.layers.weights import MatrixSpec, Use, WeightSource


class Linear:
    """y = x W^T + b: [T, k] -> [T, n]."""

    def __init__(self, weight: Matrix, bias: Tensor | None = None) -> None:
        self.weight = weight  # [n, k]
        self.bias = bias  # [n]

    @classmethod
    def load(
        cls,
        source: WeightSource,
        parts: Mapping[str, int],
        k: int,
        use: Use,
        bias: bool = False,
    ) -> Self:
        """Stack the layers `parts` (name: output width) along their outputs, in their order."""
        spec = MatrixSpec(tuple(parts.items()), k, use)
        biases: Tensor | None = None
        if bias:
            biases = torch.empty(spec.n, dtype=source.dtype, device=source.device)
            first = 0
            for name, outputs in spec.parts:
                source.fill(biases[first : first + outputs], f"{name}.bias")
                first += outputs
        return cls(source.matrix(spec), biases)

    def __call__(self, x: Activations) -> Tensor:
        return linear(x, self.weight, self.bias)


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

    def __call__(self, x: Activations) -> Tensor:
        return logits(x, self.weight)


class Embedding:
    """Rows of a table by token id: [T] int64 -> [T, d]."""

    def __init__(self, source: WeightSource, name: str, vocab_size: int, d: int) -> None:
        self.weight = source.table(f"{name}.weight", vocab_size, d)

    def __call__(self, token_ids: Tensor) -> Tensor:
        return self.weight.index_select(0, token_ids)
