"""config.json: read into one description, and its mistakes named."""

import json

import pytest
from transformers import MixtralConfig, Qwen2Config, Qwen3Config, Qwen3MoeConfig

from scalellm.errors import ModelFileError, UnsupportedModelError
from scalellm.loader.config import read_model_config


def test_fields(make_folder):
    config = read_model_config(make_folder(weights=None, dtype="bfloat16"))
    assert config.family == "llama"
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (4, 2, 4)
    assert config.checkpoint_dtype == "bfloat16"
    assert config.eos_token_ids == (2,)
    assert config.windows == (None, None)
    assert config.moe is None


def test_older_name_of_dtype(make_folder):
    folder = make_folder(weights=None, dtype=..., torch_dtype="float16")
    assert read_model_config(folder).checkpoint_dtype == "float16"


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        (None, 3, (3,)),
        ({"eos_token_id": [4, 5]}, 3, (4, 5)),
        ({"eos_token_id": 7}, None, (7,)),
        ({}, [1, 2], (1, 2)),
        ({"eos_token_id": [4, 600]}, 3, (4,)),
        (None, None, ()),
    ],
)
def test_end_of_sequence_ids(make_folder, generation, config, expected):
    folder = make_folder(weights=None, eos_token_id=config)
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    assert read_model_config(folder).eos_token_ids == expected


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\xff"])
def test_damaged_file(make_folder, text):
    folder = make_folder(weights=None)
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ModelFileError, match=r"config\.json"):
        read_model_config(folder)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": ...}, "hidden_size must be a whole number of at least 1, found nothing"),
        ({"hidden_size": "16"}, 'hidden_size must be a whole number of at least 1, found "16"'),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be"),
        ({"num_hidden_layers": True}, "num_hidden_layers must be"),
        ({"vocab_size": 1.5}, "vocab_size must be"),
        ({"num_key_value_heads": 3}, r"num_key_value_heads must be a divisor of num_attention"),
        ({"rms_norm_eps": -1}, "rms_norm_eps must be a number above 0"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings must be true or false"),
        ({"architectures": None}, "architectures must be a list"),
        ({"architectures": []}, "architectures must be a list"),
        ({"rope_scaling": 3}, "must be an object"),
    ],
)
def test_wrong_fields_are_named(make_folder, fields, message):
    with pytest.raises(ModelFileError, match=message):
        read_model_config(make_folder(weights=None, **fields))


def test_unknown_architecture_says_what_is_supported(make_folder):
    folder = make_folder(
        weights=None, architectures=["FrobnicatorForCausalLM"], model_type="frobnicator"
    )
    with pytest.raises(UnsupportedModelError) as refused:
        read_model_config(folder)
    message = str(refused.value)
    assert "FrobnicatorForCausalLM is not supported" in message
    for name in ("LlamaForCausalLM", "MixtralForCausalLM", "Qwen3MoeForCausalLM"):
        assert name in message
    assert "transformers' own code does not do either" in message


def test_quantised_checkpoint_is_refused_by_name(make_folder):
    folder = make_folder(weights=None, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(UnsupportedModelError, match="is quantised"):
        read_model_config(folder)


@pytest.mark.parametrize("name", ["mixtral", "qwen2", "qwen3", "qwen3_moe"])
def test_silence_means_what_transformers_takes_it_for(tmp_path, name):
    """A config.json with the required fields alone."""
    reference = {
        "mixtral": MixtralConfig,
        "qwen2": Qwen2Config,
        "qwen3": Qwen3Config,
        "qwen3_moe": Qwen3MoeConfig,
    }[name]
    required = {
        "vocab_size": 64,
        "hidden_size": 256,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "max_position_embeddings": 512,
    }
    theirs = reference(**required)
    architecture = reference.__name__.replace("Config", "ForCausalLM")
    raw = {"architectures": [architecture], "model_type": name, **required}
    if name in ("qwen2", "qwen3"):  # their default of 32 kv heads does not divide 8 heads
        raw["num_key_value_heads"] = 8
    (tmp_path / "config.json").write_text(json.dumps(raw))
    ours = read_model_config(tmp_path)
    head_dim = getattr(theirs, "head_dim", None) or 32
    assert ours.head_dim == head_dim
    assert ours.norm_eps == theirs.rms_norm_eps
    assert ours.rope.theta == theirs.rope_parameters["rope_theta"]
    assert ours.tie_word_embeddings == theirs.tie_word_embeddings
    assert ours.windows == (theirs.sliding_window,) * 2
    if ours.moe is not None:
        assert ours.num_kv_heads == theirs.num_key_value_heads
        assert ours.moe.num_experts == theirs.num_local_experts
        assert ours.moe.experts_per_token == theirs.num_experts_per_tok
