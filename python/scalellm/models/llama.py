"""Llama 2, 3, 3.1 and later (Touvron et al., 2023; Grattafiori et al., 2024)."""

from torch import Tensor

from scalellm.layers.attention import Attention
from scalellm.layers.mlp import GatedMLP
from scalellm.layers.norm import RMSNorm
from scalellm.layers.step import Step, chosen
from scalellm.layers.weights import WeightSource
from scalellm.models.config import ModelConfig


class LlamaBlock:
    """x + Attention(Norm(x)), then x + MLP(Norm(x))."""

    def __init__(self, config: ModelConfig, source: WeightSource, layer: int) -> None:
        name = f"model.layers.{layer}"
        hidden, eps = config.hidden_size, config.norm_eps
        self.attention_norm = RMSNorm(source, f"{name}.input_layernorm", hidden, eps)
        self.attention = Attention(
            source, f"{name}.self_attn", config.attention, layer, config.windows[layer]
        )
        self.mlp_norm = RMSNorm(source, f"{name}.post_attention_layernorm", hidden, eps)
        self.mlp = GatedMLP(
            source, f"{name}.mlp", hidden, config.intermediate_size, config.mlp_bias
        )

    def __call__(
        self, x: Tensor, delta: Tensor | None, step: Step, angles: Tensor, rows: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        x, normal = self.attention_norm(x, delta, self.attention.first)
        delta = self.attention(normal, step, angles, rows)
        x, normal = self.mlp_norm(chosen(x, rows), delta, self.mlp.first)
        return x, self.mlp(normal)
