"""Rotary variants against transformers, in both spellings of config.json."""

import json

import pytest
import torch
from transformers import LlamaConfig, MixtralConfig

from scalellm.errors import ConfigError, ModelFileError
from scalellm.executor.batch import Span
from scalellm.loader.config import read_model_config

TINY = {
    "vocab_size": 101,
    "hidden_size": 64,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VARIANTS = {
    "default": {"rope_type": "default", "rope_theta": 500.0},
    "linear": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 500.0,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn-mscale": {
        "rope_type": "yarn",
        "rope_theta": 500.0,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "mscale": 0.8,
        "mscale_all_dim": 0.5,
        "truncate": False,
    },
    "longrope": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0 + i / 16 for i in range(16)],
        "long_factor": [2.0 + i for i in range(16)],
        "factor": 4.0,
        "original_max_position_embeddings": 192,
    },
}


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_equal_transformers_over_a_long_prompt(make_pair, name):
    pair = make_pair(LlamaConfig(**TINY, rope_parameters=VARIANTS[name]))
    native = "transformers" if name == "longrope" else "llama"
    assert pair.executor.model_config.family == native
    ids = pair.ids(150)
    table = pair.blocks(150)
    first = pair.run(Span(ids[:100], 0, table, 100))[0]
    rest = pair.run(Span(ids[100:], 100, table, 50))[0]
    torch.testing.assert_close(torch.cat([first, rest]), pair.expected(ids), atol=1e-4, rtol=0)
    pair.release(table)


@pytest.mark.parametrize("name", ["linear", "llama3", "yarn", "yarn-mscale"])
def test_variants_differ_from_default(make_pair, name):
    """Guards the test above: a variant without effect would pass it."""
    ids = make_pair(LlamaConfig(**TINY)).ids(150)
    theta = {"rope_type": "default", "rope_theta": VARIANTS[name]["rope_theta"]}
    plain = make_pair(LlamaConfig(**TINY, rope_parameters=theta)).expected(ids)
    stretched = make_pair(LlamaConfig(**TINY, rope_parameters=VARIANTS[name])).expected(ids)
    assert (plain - stretched).abs().max() > 0.05


def test_longrope_is_limited_to_the_context_of_its_short_factors(make_pair):
    pair = make_pair(LlamaConfig(**TINY, rope_parameters=VARIANTS["longrope"]))
    assert pair.executor.max_model_len == 192


def read(folder, **fields):
    raw = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **TINY, **fields}
    (folder / "config.json").write_text(json.dumps(raw))
    return read_model_config(folder)


def test_old_spelling_means_the_same(tmp_path):
    """rope_theta and rope_scaling beside each other, as before transformers 5."""
    new = read(tmp_path, rope_parameters=VARIANTS["llama3"])
    old = dict(VARIANTS["llama3"])
    theta = old.pop("rope_theta")
    old["type"] = old.pop("rope_type")
    assert read(tmp_path, rope_theta=theta, rope_scaling=old) == new


def test_missing_theta_is_the_familys_default(tmp_path):
    assert read(tmp_path).rope.theta == 10_000.0
    mixtral = read(tmp_path, architectures=["MixtralForCausalLM"], model_type="mixtral")
    assert mixtral.rope.theta == MixtralConfig().rope_parameters["rope_theta"]


def test_scaling_without_its_factor_is_named(tmp_path):
    broken = {k: v for k, v in VARIANTS["llama3"].items() if k != "low_freq_factor"}
    with pytest.raises(ModelFileError, match="low_freq_factor must be a number above 0, found no"):
        read(tmp_path, rope_parameters=broken)


def test_context_beyond_the_positions_is_refused(tmp_path):
    from scalellm.loader.load import check_max_model_len

    plain = read(tmp_path)
    with pytest.raises(ConfigError, match="--max-model-len 257 is more than the 256 positions"):
        check_max_model_len(257, plain)
    yarn = read(tmp_path, rope_parameters=VARIANTS["yarn"] | {"factor": 8.0})
    assert check_max_model_len(None, yarn) == 512
