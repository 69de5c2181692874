"""Sparse mixture of experts (Shazeer et al., 2017): each token is computed by its best few experts.

tokens     t0 t1 t2 t3          top-2 of 4 experts
chosen     1,3 0,1 1,2 3,0
by expert  e0: t1 t3 | e1: t0 t1 t2 | e2: t2 | e3: t0 t3      one product per expert that is hit
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from scalellm.kernels.linear import linear
from scalellm.kernels.silu_and_mul import silu_and_mul
from scalellm.layers.linear import Linear
from scalellm.layers.weights import WeightSource


@dataclass(frozen=True, slots=True)
class ExpertNames:
    """What a family's checkpoints call the parts; an expert is `experts`.INDEX.`gate`."""

    router: str
    experts: str
    gate: str
    up: str
    down: str


@dataclass(frozen=True, slots=True)
class MoeShape:
    hidden_size: int
    intermediate_size: int  # of one expert
    num_experts: int
    experts_per_token: int
    normalize_weights: bool  # whether a token's chosen weights are scaled to sum to one


class SparseMoE:
    """[T, hidden] -> [T, hidden]."""

    def __init__(self, source: WeightSource, names: ExpertNames, shape: MoeShape) -> None:
        self.shape = shape
        hidden, inner = shape.hidden_size, shape.intermediate_size
        self.router = Linear.load(source, names.router, hidden, shape.num_experts)
        experts, dtype, device = shape.num_experts, source.dtype, source.device
        self.gate_up = torch.empty(experts, 2 * inner, hidden, dtype=dtype, device=device)
        self.down = torch.empty(experts, hidden, inner, dtype=dtype, device=device)
        for index in range(experts):
            expert = f"{names.experts}.{index}"
            source.fill(self.gate_up[index, :inner], f"{expert}.{names.gate}.weight")
            source.fill(self.gate_up[index, inner:], f"{expert}.{names.up}.weight")
            source.fill(self.down[index], f"{expert}.{names.down}.weight")

    def __call__(self, x: Tensor) -> Tensor:
        weights, experts = self._route(x)
        top = self.shape.experts_per_token
        by_expert = experts.flatten().argsort(stable=True)  # [T * top]: choices, grouped by expert
        tokens = by_expert // top
        counts = torch.bincount(experts.flatten(), minlength=self.shape.num_experts).tolist()
        computed = x.new_empty(len(by_expert), x.shape[1])
        first = 0
        for expert, count in enumerate(counts):
            if count:
                rows = slice(first, first + count)
                inner = silu_and_mul(linear(x[tokens[rows]], self.gate_up[expert]))
                computed[rows] = linear(inner, self.down[expert])
                first += count
        computed *= weights.flatten()[by_expert, None]
        return torch.zeros_like(x).index_add_(0, tokens, computed)

    def _route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Each token's experts [T, top] int64 and their weights [T, top], best first."""
        likelihood = torch.softmax(self.router(x).float(), dim=-1)
        weights, experts = likelihood.topk(self.shape.experts_per_token, dim=-1)
        if self.shape.normalize_weights:
            weights = weights / weights.sum(-1, keepdim=True)
        return weights.to(x.dtype), experts
