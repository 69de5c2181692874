"""Qwen3-MoE (Yang et al., 2025): Qwen3's attention; layers have experts or one dense MLP."""

from torch import Tensor

from scalellm.layers.attention import Attention
from scalellm.layers.mlp import GatedMLP
from scalellm.layers.moe import ExpertNames, SparseMoE
from scalellm.layers.norm import RMSNorm
from scalellm.layers.step import Step, chosen
from scalellm.layers.weights import WeightSource
from scalellm.models.config import ModelConfig


class Qwen3MoeBlock:
    """x + Attention(Norm(x)), then x + Experts(Norm(x)) or x + MLP(Norm(x))."""

    def __init__(self, config: ModelConfig, source: WeightSource, layer: int) -> None:
        name = f"model.layers.{layer}"
        hidden, eps = config.hidden_size, config.norm_eps
        self.attention_norm = RMSNorm(source, f"{name}.input_layernorm", hidden, eps)
        self.attention = Attention(
            source, f"{name}.self_attn", config.attention, layer, config.windows[layer]
        )
        self.mlp_norm = RMSNorm(source, f"{name}.post_attention_layernorm", hidden, eps)
        mlp = f"{name}.mlp"
        self.mlp: SparseMoE | GatedMLP
        if (
            config.moe is not None
            and config.experts is not None
            and config.moe.sparse_layers[layer]
        ):
            names = ExpertNames(
                f"{mlp}.gate", f"{mlp}.experts", gate="gate_proj", up="up_proj", down="down_proj"
            )
            self.mlp = SparseMoE(source, names, config.experts)
        else:
            self.mlp = GatedMLP(source, mlp, hidden, config.intermediate_size)

    def __call__(
        self, x: Tensor, delta: Tensor | None, step: Step, angles: Tensor, rows: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        x, normal = self.attention_norm(x, delta, self.attention.first)
        delta = self.attention(normal, step, angles, rows)
        x, normal = self.mlp_norm(chosen(x, rows), delta, self.mlp.first)
        if isinstance(self.mlp, SparseMoE):
            return x, self.mlp(normal, step)
        return x, self.mlp(normal)
