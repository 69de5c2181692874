"""Sparse mixture of experts (Shazeer et al., 2017): each token is computed by its best few experts.

tokens     t0 t1 t2 t3          top-2 of 4 experts
chosen     1,3 0,1 1,2 3,0
by expert  e0: t1 t3 | e1: t0 t1 t2 | e2: t2 | e3: t0 t3      one product per expert that is hit
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from scalellm.kernels import device
from scalellm.kernels.linear import Matrix, all_packed, linear
from scalellm.kernels.linear.fp8 import Stacked, stack, unstack
from scalellm.kernels.moe import experts, stacked_experts
from scalellm.kernels.quantise import Activations, plain_rows
from scalellm.layers.linear import GatedLinear, Linear
from scalellm.layers.step import Step
from scalellm.layers.weights import Use, WeightSource


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


@dataclass(frozen=True, slots=True)
class Expert:
    gate_up: GatedLinear
    down: Linear


class SparseMoE:
    """[T, hidden] -> [T, hidden]."""

    def __init__(self, source: WeightSource, names: ExpertNames, shape: MoeShape) -> None:
        self.shape = shape
        hidden, inner = shape.hidden_size, shape.intermediate_size
        self.router = Linear.load(source, {names.router: shape.num_experts}, hidden, Use.ROUTER)
        self.experts = []
        self.ranks, self.exchange = source.shard.address, source.shard.exchange
        self.divides_experts = source.shard.expert_parallel
        self.shares = source.shard.expert_shares
        divided = not self.divides_experts
        held = source.shard.experts(shape.num_experts)
        self.first_expert = held.start
        for index in held:
            expert = f"{names.experts}.{index}"
            gate_and_up = dict.fromkeys((f"{expert}.{names.gate}", f"{expert}.{names.up}"), inner)
            self.experts.append(
                Expert(
                    GatedLinear.load(source, gate_and_up, hidden, Use.GATED, divided=divided),
                    Linear.load(
                        source,
                        {f"{expert}.{names.down}": hidden},
                        inner,
                        Use.ROW,
                        divided=divided,
                    ),
                )
            )
        self._stacked: tuple[Stacked, Stacked] | None = None
        if isinstance(self.router.weight, Tensor) and device.on_gpu(self.router.weight):
            self._stacked = self._stack()

    @property
    def first(self) -> Matrix:
        """What its input is multiplied by, beside the router."""
        return self.experts[0].gate_up.weight

    def __call__(self, x: Activations, step: Step) -> Tensor:
        if self._stacked is not None:
            top, normalise = self.shape.experts_per_token, self.shape.normalize_weights
            return self._summed(
                stacked_experts(
                    x,
                    self.router(x),
                    *self._stacked,
                    top,
                    normalise,
                    self.first_expert,
                    step.tally,
                    self.shares,
                )
            )
        x = plain_rows(x)
        gate_ups = [expert.gate_up.weight for expert in self.experts]
        downs = [expert.down.weight for expert in self.experts]
        if all_packed(gate_ups) and all_packed(downs):
            top, normalise = self.shape.experts_per_token, self.shape.normalize_weights
            among, logits = (self.ranks, self.divides_experts), self.router(x)
            if step.tally is not None:  # no plan counts for itself
                self._count(logits.topk(top).indices, step.tally)
            return experts(x, logits, gate_ups, downs, top, normalise, among)
        return self._summed(self._by_torch(x, step.tally))

    def _summed(self, part: Tensor) -> Tensor:
        """What all ranks have computed, where each has a part of the experts, or some of them."""
        return part if self.exchange is None else self.exchange.sum(part)

    def _stack(self) -> tuple[Stacked, Stacked]:
        """Each kind of weight of all experts as one tensor, of which theirs become parts."""
        stacked = []
        for part in ("gate_up", "down"):
            layers = [getattr(expert, part) for expert in self.experts]
            stacked.append(stack([layer.weight for layer in layers]))
            for layer, weight in zip(layers, unstack(stacked[-1]), strict=True):
                layer.weight = weight
        gate_ups, downs = stacked
        return gate_ups, downs

    def _by_torch(self, x: Tensor, tally: Tensor | None) -> Tensor:
        weights, chosen = self._route(x)
        top = self.shape.experts_per_token
        by_expert = chosen.flatten().argsort(stable=True)  # [T * top]: choices, grouped by expert
        tokens = by_expert // top
        counts = self._count(chosen, tally)
        computed = x.new_empty(len(by_expert), x.shape[1])
        first, mine = 0, range(self.first_expert, self.first_expert + len(self.experts))
        for expert, count in enumerate(counts):
            rows = slice(first, first + count)
            first += count
            if expert not in mine:
                computed[rows] = 0
            elif count:
                one = self.experts[expert - self.first_expert]
                inner = one.gate_up.gated(x[tokens[rows]])
                computed[rows] = linear(inner, one.down.weight)
        computed *= weights.flatten()[by_expert, None]
        return torch.zeros_like(x).index_add_(0, tokens, computed)

    def _count(self, chosen: Tensor, tally: Tensor | None) -> list[int]:
        """How many tokens chose each expert; a layer more in `tally`, as of Step."""
        counts: list[int] = torch.bincount(
            chosen.flatten(), minlength=self.shape.num_experts
        ).tolist()
        if tally is not None and len(chosen):
            each = len(counts) // self.shares if self.shares else 1
            busiest = max(sum(counts[i : i + each]) for i in range(0, len(counts), each))
            used = (1, sum(count > 0 for count in counts), busiest, *counts)
            tally += torch.tensor(used, device=tally.device)
        return counts

    def _route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Each token's experts [T, top] int64 and their weights [T, top], best first."""
        likelihood = torch.softmax(self.router(x).float(), dim=-1)
        weights, chosen = likelihood.topk(self.shape.experts_per_token, dim=-1)
        if self.shape.normalize_weights:
            weights = weights / weights.sum(-1, keepdim=True)
        return weights.to(x.dtype), chosen
