"""Seeded random tensors of a Qwen3 or Mixtral shape, and their int8 form."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

_SEED = 0
# The standard deviation that transformers draws linear weights with.
_DEVIATION = 0.02
_INT8_MAX = 127


def quantise_channels(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[N, K] bf16 to [N, K] int8 and [N, 1] bf16 such that weight = int8 x scale."""
    wide = weight.float()
    scale = (wide.abs().amax(dim=1, keepdim=True) / _INT8_MAX).bfloat16()
    rounded = (wide / scale.float()).round().clamp(-_INT8_MAX, _INT8_MAX)
    return rounded.to(torch.int8), scale


def random_weights(shape: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a `shape` (a config.json) in order, bf16; the same on every machine."""
    source = torch.Generator().manual_seed(_SEED)

    def matrix(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=source).mul_(_DEVIATION).bfloat16()

    def norm(size: int) -> Tensor:
        return torch.ones(size, dtype=torch.bfloat16)

    width, inner = shape["hidden_size"], shape["intermediate_size"]
    head = shape.get("head_dim", width // shape["num_attention_heads"])
    experts = shape.get("num_local_experts", 0)
    queries = shape["num_attention_heads"] * head
    keys = shape["num_key_value_heads"] * head
    yield "model.embed_tokens.weight", matrix(shape["vocab_size"], width)
    for number in range(shape["num_hidden_layers"]):
        layer = f"model.layers.{number}."
        yield layer + "input_layernorm.weight", norm(width)
        yield layer + "self_attn.q_proj.weight", matrix(queries, width)
        yield layer + "self_attn.k_proj.weight", matrix(keys, width)
        yield layer + "self_attn.v_proj.weight", matrix(keys, width)
        yield layer + "self_attn.o_proj.weight", matrix(width, queries)
        if shape["model_type"] == "qwen3":
            yield layer + "self_attn.q_norm.weight", norm(head)
            yield layer + "self_attn.k_norm.weight", norm(head)
        yield layer + "post_attention_layernorm.weight", norm(width)
        if experts:
            yield layer + "block_sparse_moe.gate.weight", matrix(experts, width)
        for expert in range(experts):
            part = f"{layer}block_sparse_moe.experts.{expert}."
            yield part + "w1.weight", matrix(inner, width)
            yield part + "w2.weight", matrix(width, inner)
            yield part + "w3.weight", matrix(inner, width)
        if not experts:
            yield layer + "mlp.gate_proj.weight", matrix(inner, width)
            yield layer + "mlp.up_proj.weight", matrix(inner, width)
            yield layer + "mlp.down_proj.weight", matrix(width, inner)
    yield "model.norm.weight", norm(width)
    if not shape["tie_word_embeddings"]:
        yield "lm_head.weight", matrix(shape["vocab_size"], width)
