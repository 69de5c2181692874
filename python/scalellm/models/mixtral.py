"""Mixtral (Jiang et al., 2024): Mistral's attention, and experts in every layer."""

from torch import Tensor

from scalellm.layers.attention import Attention
from scalellm.layers.moe import ExpertNames, MoeShape, SparseMoE
from scalellm.layers.norm import RMSNorm
from scalellm.layers.step import Step, chosen
from scalellm.layers.weights import WeightSource
from scalellm.models.config import ModelConfig


class MixtralBlock:
    """x + Attention(Norm(x)), then x + Experts(Norm(x))."""

    def __init__(self, config: ModelConfig, source: WeightSource, layer: int) -> None:
        name = f"model.layers.{layer}"
        hidden, eps = config.hidden_size, config.norm_eps
        self.attention_norm = RMSNorm(source, f"{name}.input_layernorm", hidden, eps)
        self.attention = Attention(
            source, f"{name}.self_attn", config.attention, layer, config.windows[layer]
        )
        self.experts_norm = RMSNorm(source, f"{name}.post_attention_layernorm", hidden, eps)
        moe = f"{name}.block_sparse_moe"
        names = ExpertNames(f"{moe}.gate", f"{moe}.experts", gate="w1", up="w3", down="w2")
        self.experts = SparseMoE(source, names, self.shape(config))

    @staticmethod
    def shape(config: ModelConfig) -> MoeShape:
        if config.experts is None:
            raise ValueError("a Mixtral configuration has experts")
        return config.experts

    def __call__(
        self, x: Tensor, delta: Tensor | None, step: Step, angles: Tensor, rows: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        x, normal = self.attention_norm(x, delta, self.attention.first)
        delta = self.attention(normal, step, angles, rows)
        x, normal = self.experts_norm(chosen(x, rows), delta, self.experts.first)
        return x, self.experts(normal, step)
