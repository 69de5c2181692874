"""What transformers' code cannot do over a paged cache is refused, and why."""

import json
import re

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from scalellm.config import EngineConfig
from scalellm.errors import ModelFileError, UnsupportedModelError
from scalellm.executor.single import SingleExecutor
from scalellm.loader.config import read_model_config
from scalellm.models.fallback import ATTENTION, TransformersModel, register_attention

TINY = {
    "vocab_size": 101,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}


def write(folder, architecture, model_type, **fields):
    raw = {"architectures": [architecture], "model_type": model_type, **TINY, **fields}
    (folder / "config.json").write_text(json.dumps(raw))
    return folder


@pytest.mark.parametrize(
    ("architecture", "model_type", "reason"),
    [
        ("NoSuchForCausalLM", "no_such", "no_such"),
        ("MambaForCausalLM", "mamba", "recurrent state"),
        ("BartForCausalLM", "bart", "encoder-decoder"),
        ("BloomForCausalLM", "bloom", "does not use transformers' attention interface"),
        ("BertModel", "vit", "no causal language model"),
    ],
)
def test_refusal_names_what_is_supported_and_the_reason(tmp_path, architecture, model_type, reason):
    with pytest.raises(UnsupportedModelError) as refused:
        read_model_config(write(tmp_path, architecture, model_type))
    message = str(refused.value)
    assert architecture in message
    assert "LlamaForCausalLM" in message and "Qwen3MoeForCausalLM" in message
    assert "transformers' own code does not do either" in message
    assert re.search(reason, message)


def test_code_in_the_checkpoint_is_not_run(tmp_path):
    (tmp_path / "configuration_own.py").write_text("raise SystemExit('was run')")
    auto_map = {"AutoConfig": "configuration_own.OwnConfig"}
    folder = write(tmp_path, "OwnForCausalLM", "own", auto_map=auto_map)
    with pytest.raises(UnsupportedModelError, match="OwnForCausalLM is not supported"):
        read_model_config(folder)


def tiny_llama():
    register_attention()
    torch.manual_seed(0)
    config = LlamaConfig(**TINY, intermediate_size=40)
    return AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION)


def test_verify_accepts_a_model_whose_state_is_all_in_the_cache():
    TransformersModel(tiny_llama()).verify()


def test_verify_refuses_state_outside_the_cache():
    """A convolution over neighbouring tokens, as some hybrids have, loses its past in a chunk."""

    class Shift(torch.nn.Module):
        def forward(self, x):
            return x + torch.nn.functional.pad(x, (0, 0, 1, 0))[:, :-1]

    model = tiny_llama()
    model.model.layers[1].mlp = Shift()
    with pytest.raises(UnsupportedModelError, match="keeps state outside the KV cache"):
        TransformersModel(model).verify()


def test_layers_of_different_shapes_are_refused():
    model = tiny_llama()
    other = LlamaConfig(**TINY, intermediate_size=40, num_key_value_heads=1)
    other._attn_implementation = ATTENTION
    model.model.layers[1].self_attn = type(model.model.layers[1].self_attn)(other, 1)
    with pytest.raises(UnsupportedModelError, match="different shapes"):
        TransformersModel(model)


def test_weights_that_do_not_fit_are_named(tmp_path):
    from safetensors.torch import load_file, save_file
    from transformers import GPTNeoXConfig

    config = GPTNeoXConfig(**TINY, intermediate_size=40, bos_token_id=0, eos_token_id=0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["gpt_neox.final_layer_norm.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelFileError, match=r"missing gpt_neox\.final_layer_norm\.weight"):
        SingleExecutor.load(EngineConfig(model_path=tmp_path, device="cpu"))


def test_dummy_weights_of_the_fallback_follow_the_seed(tmp_path):
    from scalellm.executor.batch import Batch, Span

    write(tmp_path, "GPTNeoXForCausalLM", "gpt_neox", intermediate_size=40)

    def logits(seed):
        engine = EngineConfig(
            model_path=tmp_path, load_format="dummy", device="cpu", dtype="float32", seed=seed
        )
        return SingleExecutor.load(engine).forward(Batch((Span([1, 2, 3], 0, [0], 1),)))

    assert torch.equal(logits(1), logits(1))
    assert not torch.equal(logits(1), logits(2))
