"""Tiny checkpoints written in the test, that each test then spoils in its own way."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

TINY = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 60,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "eos_token_id": 2,
    "dtype": "float32",
}


def tiny_weights() -> dict[str, torch.Tensor]:
    shapes = {"model.embed_tokens": (60, 16), "model.norm": (16,), "lm_head": (60, 16)}
    for layer in range(2):
        prefix = f"model.layers.{layer}"
        shapes |= {
            f"{prefix}.input_layernorm": (16,),
            f"{prefix}.post_attention_layernorm": (16,),
            f"{prefix}.self_attn.q_proj": (16, 16),
            f"{prefix}.self_attn.k_proj": (8, 16),
            f"{prefix}.self_attn.v_proj": (8, 16),
            f"{prefix}.self_attn.o_proj": (16, 16),
            f"{prefix}.mlp.gate_proj": (24, 16),
            f"{prefix}.mlp.up_proj": (24, 16),
            f"{prefix}.mlp.down_proj": (16, 24),
        }
    rng = torch.Generator().manual_seed(0)
    return {f"{name}.weight": torch.randn(shape, generator=rng) for name, shape in shapes.items()}


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small lose by threads, most of all beside other work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


MakeFolder = Callable[..., Path]


@pytest.fixture
def make_folder(tmp_path: Path) -> MakeFolder:
    """Write a folder: fields change config.json; `weights` replaces the tensors, None has none."""

    def make(
        weights: dict[str, torch.Tensor] | str | None = "tiny", shards: int = 1, **fields: object
    ) -> Path:
        config = {key: value for key, value in (TINY | fields).items() if value is not ...}
        (tmp_path / "config.json").write_text(json.dumps(config))
        if weights is None:
            return tmp_path
        tensors = tiny_weights() if isinstance(weights, str) else weights
        if shards == 1:
            save_file(tensors, tmp_path / "model.safetensors")
            return tmp_path
        names = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
        weight_map = {name: names[i % shards] for i, name in enumerate(tensors)}
        for file in names:
            part = {name: t for name, t in tensors.items() if weight_map[name] == file}
            save_file(part, tmp_path / file)
        index = {"metadata": {}, "weight_map": weight_map}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
        return tmp_path

    return make
