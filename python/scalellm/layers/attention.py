"""Self-attention over the paged KV cache."""

from dataclasses import dataclass

import torch
from torch import Tensor

from scalellm.kernels.attention import paged_attention, write_kv
from scalellm.kernels.rotary import apply_rotary
from scalellm.layers.linear import Linear
from scalellm.layers.norm import RMSNorm
from scalellm.layers.step import Angles, Step
from scalellm.layers.weights import WeightSource


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """What tells one family's attention from another's."""

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm_eps: float | None = None  # normalise each head of queries and keys before turning


class Attention:
    """[T, hidden] -> [T, hidden]: project, turn, store keys and values, attend, project back."""

    def __init__(
        self,
        source: WeightSource,
        name: str,
        shape: AttentionShape,
        layer: int,
        window: int | None,
    ) -> None:
        self.shape = shape
        self.layer = layer
        self.window = window
        d = shape.head_dim
        self.qkv = Linear.load_merged(
            source,
            {
                f"{name}.q_proj": shape.num_heads * d,
                f"{name}.k_proj": shape.num_kv_heads * d,
                f"{name}.v_proj": shape.num_kv_heads * d,
            },
            shape.hidden_size,
            shape.qkv_bias,
        )
        self.output = Linear.load(
            source, f"{name}.o_proj", shape.num_heads * d, shape.hidden_size, shape.output_bias
        )
        self.query_norm: RMSNorm | None = None
        self.key_norm: RMSNorm | None = None
        if shape.qk_norm_eps is not None:
            self.query_norm = RMSNorm(source, f"{name}.q_norm", d, shape.qk_norm_eps)
            self.key_norm = RMSNorm(source, f"{name}.k_norm", d, shape.qk_norm_eps)

    def __call__(self, x: Tensor, step: Step, angles: Angles) -> Tensor:
        shape, tokens = self.shape, x.shape[0]
        heads = self.qkv(x).view(tokens, -1, shape.head_dim)
        sizes = [shape.num_heads, shape.num_kv_heads, shape.num_kv_heads]
        query, key, value = torch.split(heads, sizes, dim=1)
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        query = apply_rotary(query, angles.cos, angles.sin)
        key = apply_rotary(key, angles.cos, angles.sin)

        cache = step.cache.layers[self.layer]
        write_kv(cache, key, value, step.attention)
        attended = paged_attention(
            query, cache, step.attention, scale=shape.head_dim**-0.5, window=self.window
        )
        return self.output(attended.view(tokens, -1))
