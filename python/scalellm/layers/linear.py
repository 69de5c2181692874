"""Linear layers, also several that share an input and are multiplied as one."""

from collections.abc import Mapping

import torch
from torch import Tensor

from scalellm.kernels.linear import linear
from scalellm.layers.weights import WeightSource, take


class Linear:
    """y = x W^T + b: [T, k] -> [T, n]."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.weight = weight  # [n, k]
        self.bias = bias  # [n]

    @classmethod
    def load(cls, source: WeightSource, name: str, k: int, n: int, bias: bool = False) -> "Linear":
        return cls.load_merged(source, {name: n}, k, bias)

    @classmethod
    def load_merged(
        cls, source: WeightSource, parts: Mapping[str, int], k: int, bias: bool = False
    ) -> "Linear":
        """Stack the layers `parts` (name: output width) along their outputs, in their order."""
        n = sum(parts.values())
        weight = torch.empty(n, k, dtype=source.dtype, device=source.device)
        biases = torch.empty(n, dtype=source.dtype, device=source.device) if bias else None
        first = 0
        for name, width in parts.items():
            source.fill(weight[first : first + width], f"{name}.weight")
            if biases is not None:
                source.fill(biases[first : first + width], f"{name}.bias")
            first += width
        return cls(weight, biases)

    def __call__(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class Embedding:
    """Rows of a table by token id: [T] int64 -> [T, d]."""

    def __init__(self, source: WeightSource, name: str, vocab_size: int, d: int) -> None:
        self.weight = take(source, f"{name}.weight", vocab_size, d)

    def __call__(self, token_ids: Tensor) -> Tensor:
        return self.weight.index_select(0, token_ids)
