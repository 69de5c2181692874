"""config.json to ModelConfig."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from scalellm.errors import ModelFileError, ModelNotFoundError, UnsupportedModelError
from scalellm.layers.rotary import ROPE_KINDS, RopeConfig, yarn_attention_factor
from scalellm.loader.quantised import Scheme, read_scheme
from scalellm.models.config import ModelConfig, MoeConfig
from scalellm.models.registry import ARCHITECTURES

# What transformers assumes where config.json is silent.
_DEFAULT_THETA = {"mixtral": 1e6}
_DEFAULT_EPS = {"mixtral": 1e-5}
_DEFAULT_KV_HEADS = {"mistral": 8, "mixtral": 8, "qwen3_moe": 4}
_DEFAULT_HEAD_DIM = {"qwen3": 128}


def read_model_config(folder: Path) -> ModelConfig:
    """Describe the model in a Hugging Face folder.

    `family` is "transformers" where the architecture, or a setting of it, has no code of its own
    here. Raises ModelNotFoundError without a config.json, ModelFileError if it is damaged,
    UnsupportedModelError for what cannot be served.
    """
    if not folder.is_dir():
        raise ModelNotFoundError(f"model folder {folder} does not exist")
    if not (folder / "config.json").is_file():
        raise ModelNotFoundError(f"{folder} is no model folder: it has no config.json")
    fields = Fields(folder / "config.json", read_json(folder / "config.json"))
    scheme = read_quantisation(folder)
    architecture = _architecture(fields)
    family = ARCHITECTURES.get(architecture)
    config = None
    if family is not None:
        config = _native(fields, architecture, family)
    if config is None:
        if scheme is not None:
            raise UnsupportedModelError(
                f"{folder}: the checkpoint is quantised ({scheme.description}), and "
                f"{architecture}, which transformers' code runs, is only served from numbers"
            )
        from scalellm.loader.fallback import read_fallback_config

        config = read_fallback_config(folder, architecture)
    return replace(config, eos_token_ids=_eos_token_ids(folder, fields, config.vocab_size))


def read_quantisation(folder: Path) -> Scheme | None:
    """How a folder's matrices are quantised, as config.json says; None if they are not.

    Raises UnsupportedModelError, which names a method that this version does not read."""
    raw = read_json(folder / "config.json").get("quantization_config")
    return None if raw is None else read_scheme(folder / "config.json", raw)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ModelFileError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelFileError(f"{path}: {error}") from None
    if not isinstance(value, dict):
        raise ModelFileError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


class Fields:
    """Typed access to config.json, with errors that name the file and the field."""

    def __init__(self, path: Path, raw: Mapping[str, Any]) -> None:
        self.path = path
        self.raw = raw

    def error(self, name: str, wanted: str) -> ModelFileError:
        found = json.dumps(self.raw[name]) if name in self.raw else "nothing"
        return ModelFileError(f"{self.path}: {name} must be {wanted}, found {found}")

    def integer(self, name: str, default: int | None = None, minimum: int = 1) -> int:
        value = self.raw.get(name)
        if value is None:
            value = default
        if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
            raise self.error(name, f"a whole number of at least {minimum}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        value = self.raw.get(name)
        if value is None:
            value = default
        if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
            raise self.error(name, "a number above 0")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self.raw.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.error(name, "true or false")
        return value


def _architecture(fields: Fields) -> str:
    names = fields.raw.get("architectures")
    if isinstance(names, list) and names and all(isinstance(name, str) for name in names):
        return str(names[0])
    raise fields.error("architectures", "a list that names the model's class")


def _native(fields: Fields, architecture: str, family: str) -> ModelConfig | None:
    """A family with code of its own, or None if a setting asks for more than that code does."""
    heads = fields.integer("num_attention_heads")
    hidden = fields.integer("hidden_size")
    layers = fields.integer("num_hidden_layers")
    kv_heads = fields.integer("num_key_value_heads", _DEFAULT_KV_HEADS.get(family, heads))
    head_dim = fields.integer("head_dim", _DEFAULT_HEAD_DIM.get(family, hidden // heads))
    if heads % kv_heads:
        raise fields.error("num_key_value_heads", f"a divisor of num_attention_heads ({heads})")
    max_position = fields.integer("max_position_embeddings")
    rope = _rope(fields, family, head_dim, max_position)
    if rope is None or fields.raw.get("hidden_act", "silu") != "silu":
        return None
    attention_bias = family in ("llama", "qwen3", "qwen3_moe") and fields.flag(
        "attention_bias", False
    )
    return ModelConfig(
        architecture=architecture,
        family=family,
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden,
        intermediate_size=fields.integer("intermediate_size"),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        norm_eps=fields.number("rms_norm_eps", _DEFAULT_EPS.get(family, 1e-6)),
        max_position_embeddings=max_position,
        tie_word_embeddings=fields.flag("tie_word_embeddings", False),
        rope=rope,
        windows=_windows(fields, family, layers),
        qkv_bias=family == "qwen2" or attention_bias,
        output_bias=attention_bias,
        mlp_bias=family == "llama" and fields.flag("mlp_bias", False),
        qk_norm=family in ("qwen3", "qwen3_moe"),
        moe=_moe(fields, family, layers),
        checkpoint_dtype=checkpoint_dtype(fields.raw),
        eos_token_ids=(),
    )


def _rope(fields: Fields, family: str, head_dim: int, max_position: int) -> RopeConfig | None:
    """Either spelling: rope_parameters (transformers 5), or rope_theta and rope_scaling."""
    raw = fields.raw.get("rope_parameters") or fields.raw.get("rope_scaling") or {}
    if not isinstance(raw, dict):
        raise fields.error("rope_parameters", "an object")
    scaling = Fields(fields.path, raw)
    theta = fields.number("rope_theta", _DEFAULT_THETA.get(family, 10_000.0))
    kind = raw.get("rope_type") or raw.get("type") or "default"
    partial = raw.get("partial_rotary_factor", fields.raw.get("partial_rotary_factor"))
    if kind not in ROPE_KINDS or partial not in (None, 1.0) or head_dim % 2:
        return None
    rope = RopeConfig(theta=scaling.number("rope_theta", theta), dim=head_dim, kind=kind)
    if kind == "default":
        return rope
    original = fields.raw.get("original_max_position_embeddings") or max_position
    rope = replace(
        rope, original_max_position=scaling.integer("original_max_position_embeddings", original)
    )
    factor = scaling.number("factor", max_position / rope.original_max_position)
    rope = replace(rope, factor=factor)
    if kind == "llama3":
        low, high = scaling.number("low_freq_factor"), scaling.number("high_freq_factor")
        if not low < high:
            raise scaling.error("high_freq_factor", f"above low_freq_factor ({low:g})")
        return replace(rope, low_freq_factor=low, high_freq_factor=high)
    if kind == "yarn":
        temperature = yarn_attention_factor(factor, raw.get("mscale"), raw.get("mscale_all_dim"))
        return replace(
            rope,
            beta_fast=scaling.number("beta_fast", 32.0),
            beta_slow=scaling.number("beta_slow", 1.0),
            attention_factor=scaling.number("attention_factor", temperature),
            truncate=scaling.flag("truncate", True),
        )
    return rope


def _windows(fields: Fields, family: str, layers: int) -> tuple[int | None, ...]:
    if family == "llama" or (
        family in ("qwen2", "qwen3", "qwen3_moe") and not fields.flag("use_sliding_window", False)
    ):
        return (None,) * layers
    if "sliding_window" in fields.raw and fields.raw["sliding_window"] is None:
        return (None,) * layers
    if family == "mixtral" and "sliding_window" not in fields.raw:
        return (None,) * layers
    window = fields.integer("sliding_window", 4096)
    if family not in ("qwen2", "qwen3"):
        return (window,) * layers
    types = fields.raw.get("layer_types")
    if types is None:
        first = fields.integer("max_window_layers", 28, minimum=0)
        return tuple(window if layer >= first else None for layer in range(layers))
    if not isinstance(types, list) or len(types) != layers:
        raise fields.error("layer_types", f"a list of num_hidden_layers ({layers}) names")
    return tuple(window if kind == "sliding_attention" else None for kind in types)


def _moe(fields: Fields, family: str, layers: int) -> MoeConfig | None:
    if family == "mixtral":
        moe = MoeConfig(
            num_experts=fields.integer("num_local_experts", 8),
            experts_per_token=fields.integer("num_experts_per_tok", 2),
            intermediate_size=fields.integer("intermediate_size"),
            normalize_weights=True,
            sparse_layers=(True,) * layers,
        )
    elif family == "qwen3_moe":
        dense = fields.raw.get("mlp_only_layers") or []
        if not isinstance(dense, list):
            raise fields.error("mlp_only_layers", "a list of layers")
        name = "num_experts" if "num_experts" in fields.raw else "num_local_experts"
        stride = fields.integer("decoder_sparse_step", 1)
        moe = MoeConfig(
            num_experts=fields.integer(name, 128),
            experts_per_token=fields.integer("num_experts_per_tok", 8),
            intermediate_size=fields.integer("moe_intermediate_size", 768),
            normalize_weights=fields.flag("norm_topk_prob", False),
            sparse_layers=tuple(
                layer not in dense and (layer + 1) % stride == 0 for layer in range(layers)
            ),
        )
    else:
        return None
    if moe.experts_per_token > moe.num_experts:
        raise fields.error("num_experts_per_tok", f"at most the {moe.num_experts} experts")
    return moe


def checkpoint_dtype(raw: Mapping[str, Any]) -> str | None:
    """The weights' type as config.json names it: `dtype` (transformers 5) or `torch_dtype`."""
    name = raw.get("dtype") or raw.get("torch_dtype")
    return name.removeprefix("torch.") if isinstance(name, str) else None


def _eos_token_ids(folder: Path, fields: Fields, vocab_size: int) -> tuple[int, ...]:
    """Ids that end a sequence: generation_config.json's, else config.json's."""
    value = None
    if (folder / "generation_config.json").is_file():
        value = read_json(folder / "generation_config.json").get("eos_token_id")
    if value is None:
        value = fields.raw.get("eos_token_id")
    ids = value if isinstance(value, list) else [value]
    return tuple(id for id in ids if isinstance(id, int) and 0 <= id < vocab_size)
