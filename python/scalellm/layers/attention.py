"""Self-attention over the paged KV cache."""

from dataclasses import dataclass

from torch import Tensor

from scalellm.kernels.attention import HeadNorm, Heads, attention
from scalellm.kernels.linear import Matrix
from scalellm.kernels.quantise import Activations
from scalellm.layers.linear import Linear
from scalellm.layers.step import Step, chosen
from scalellm.layers.weights import Use, WeightSource, take


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
        self.layer = layer
        d, hidden = shape.head_dim, shape.hidden_size
        widths = {
            f"{name}.q_proj": shape.num_heads * d,
            f"{name}.k_proj": shape.num_kv_heads * d,
            f"{name}.v_proj": shape.num_kv_heads * d,
        }
        heads = (shape.num_heads, shape.num_kv_heads, shape.num_kv_heads)
        self.qkv = Linear.load(source, widths, hidden, Use.COLUMN, shape.qkv_bias, heads)
        self.output = Linear.load(
            source, {f"{name}.o_proj": hidden}, shape.num_heads * d, Use.ROW, shape.output_bias
        )
        norm: HeadNorm | None = None
        if shape.qk_norm_eps is not None:
            norm = HeadNorm(
                take(source, f"{name}.q_norm.weight", d),
                take(source, f"{name}.k_norm.weight", d),
                shape.qk_norm_eps,
            )
        shard = source.shard
        heads_here = len(shard.heads(shape.num_heads))
        self.heads = Heads(heads_here, len(shard.heads(shape.num_kv_heads)), d, window, norm)

    @property
    def first(self) -> Matrix:
        """What its input is multiplied by."""
        return self.qkv.weight

    def __call__(self, x: Activations, step: Step, angles: Tensor, rows: Tensor | None) -> Tensor:
        """`angles` [T, r] fp32: cos and sin of the step's positions, from Rotary. Keys and values
        of all T are stored; what comes out is of `rows`."""
        cache = step.cache.layers[self.layer]
        mixed = attention(self.qkv(x), self.heads, angles, cache, step.attention)
        return self.output(chosen(mixed, rows))
