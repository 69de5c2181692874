"""A model's description, family-neutral: what config.json says, checked and completed."""

from dataclasses import dataclass

from scalellm.kernels.attention import KVGeometry
from scalellm.layers.attention import AttentionShape
from scalellm.layers.moe import MoeShape
from scalellm.layers.rotary import RopeConfig


@dataclass(frozen=True, slots=True)
class MoeConfig:
    """The experts of a mixture model."""

    num_experts: int
    experts_per_token: int
    intermediate_size: int  # of one expert
    normalize_weights: bool
    sparse_layers: tuple[bool, ...]  # per layer: experts, or one dense MLP


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """One model; made by `loader.config.read_model_config`."""

    architecture: str  # as config.json names it, e.g. "Qwen3ForCausalLM"
    family: str  # a key of models.registry.FAMILIES, or "transformers" for the fallback
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    rope: RopeConfig
    windows: tuple[int | None, ...]  # per layer: sliding window in tokens, None for all of the past
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    moe: MoeConfig | None
    checkpoint_dtype: str | None  # "bfloat16" etc.
    eos_token_ids: tuple[int, ...]

    @property
    def attention(self) -> AttentionShape:
        return AttentionShape(
            hidden_size=self.hidden_size,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            qkv_bias=self.qkv_bias,
            output_bias=self.output_bias,
            qk_norm_eps=self.norm_eps if self.qk_norm else None,
        )

    @property
    def experts(self) -> MoeShape | None:
        if self.moe is None:
            return None
        return MoeShape(
            hidden_size=self.hidden_size,
            intermediate_size=self.moe.intermediate_size,
            num_experts=self.moe.num_experts,
            experts_per_token=self.moe.experts_per_token,
            normalize_weights=self.moe.normalize_weights,
        )

    @property
    def kv_geometry(self) -> KVGeometry:
        return KVGeometry(
            num_layers=self.num_layers,
            num_kv_heads=self.num_kv_heads,
            key_dim=self.head_dim,
            value_dim=self.head_dim,
            windows=self.windows,
        )
