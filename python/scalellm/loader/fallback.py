"""Configuration and weights of models that run on transformers' own code."""

from pathlib import Path
from typing import Any

import torch

from scalellm.errors import ModelFileError, UnsupportedModelError
from scalellm.layers.rotary import RopeConfig
from scalellm.models.config import ModelConfig
from scalellm.models.fallback import ATTENTION, TransformersModel, register_attention
from scalellm.models.registry import ARCHITECTURES

_LAYER_TYPES = {"full_attention", "sliding_attention"}


def read_fallback_config(folder: Path, architecture: str) -> ModelConfig:
    """Describe a model by transformers' reading of its config.json.

    Code that comes with a checkpoint is never run. Raises UnsupportedModelError, naming what is
    supported and why the fallback does not do.
    """
    config = _transformers_config(folder, architecture)
    text = config.get_text_config()
    if reason := _refusal(config, text):
        raise _unsupported(architecture, reason)
    heads = text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    layers = text.num_hidden_layers
    dtype = text.dtype
    return ModelConfig(
        architecture=architecture,
        family="transformers",
        vocab_size=text.vocab_size,
        hidden_size=text.hidden_size,
        intermediate_size=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=head_dim,
        norm_eps=getattr(text, "rms_norm_eps", 1e-6),
        max_position_embeddings=_max_position(text),
        tie_word_embeddings=bool(getattr(text, "tie_word_embeddings", False)),
        rope=RopeConfig(theta=10_000.0, dim=head_dim),  # transformers' code has its own
        windows=(None,) * layers,
        qkv_bias=False,
        output_bias=False,
        mlp_bias=False,
        qk_norm=False,
        moe=None,
        checkpoint_dtype=str(dtype).removeprefix("torch.") if dtype is not None else None,
        eos_token_ids=(),
    )


def load_fallback(
    folder: Path,
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    dummy_seed: int | None,
) -> TransformersModel:
    """Load the weights, or draw them from `dummy_seed`, and verify that paged attention is right.

    Raises ModelFileError where weights and configuration do not fit, UnsupportedModelError.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    register_attention()
    logging.disable_progress_bar()
    try:
        if dummy_seed is None:
            model, report = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=dtype,
                attn_implementation=ATTENTION,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
            )
            _check_report(folder, report)
        else:
            hf_config = _transformers_config(folder, config.architecture)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(dummy_seed)
                model = AutoModelForCausalLM.from_config(
                    hf_config, dtype=dtype, attn_implementation=ATTENTION
                )
        wrapped = TransformersModel(model.to(device))
        wrapped.verify()
    except UnsupportedModelError as error:
        raise _unsupported(config.architecture, str(error)) from None
    return wrapped


def count_numbers(folder: Path, architecture: str) -> int:
    """Parameters of the model that config.json describes, without memory for them."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(_transformers_config(folder, architecture))
    return sum(parameter.numel() for parameter in model.parameters())


def _transformers_config(folder: Path, architecture: str) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # its validators raise errors of many kinds
        reason = str(error).strip().splitlines()
        raise _unsupported(architecture, reason[0] if reason else repr(error)) from None


def _refusal(config: Any, text: Any) -> str | None:
    """Why paged attention cannot do for this model, as far as its configuration tells."""
    from transformers import AutoModelForCausalLM

    if type(config) not in AutoModelForCausalLM._model_mapping:
        return f"transformers has no causal language model for {config.model_type!r}"
    model = AutoModelForCausalLM._model_mapping[type(config)]
    model = model[0] if isinstance(model, tuple) else model
    if config.is_encoder_decoder:
        return "it is an encoder-decoder model"
    if model._is_stateful:
        return "it keeps recurrent state beside keys and values"
    if not model._can_set_attn_implementation():
        return "its code does not use transformers' attention interface"
    kinds = set(getattr(text, "layer_types", None) or ()) - _LAYER_TYPES
    if kinds:
        return f"it has layers of type {', '.join(sorted(kinds))}"
    if getattr(text, "num_kv_shared_layers", None):
        return "some of its layers share keys and values"
    return None


def _max_position(text: Any) -> int:
    """The context in which rotary frequencies do not depend on the longest sequence of a batch."""
    rope = getattr(text, "rope_parameters", None) or {}
    nested = [rope, *(value for value in rope.values() if isinstance(value, dict))]
    limits = [
        entry["original_max_position_embeddings"]
        for entry in nested
        if entry.get("rope_type") == "longrope"
    ]
    return int(min([text.max_position_embeddings, *limits]))


def _check_report(folder: Path, report: dict[str, Any]) -> None:
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := sorted(map(str, report[kind])):
            raise ModelFileError(
                f"{folder}: the weights do not fit config.json: "
                f"{kind.removesuffix('_keys')} {', '.join(names[:5])}"
                + (f" and {len(names) - 5} more" if len(names) > 5 else "")
            )


def _unsupported(architecture: str, reason: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{architecture} is not supported: there is code for {', '.join(ARCHITECTURES)}, "
        f"and transformers' own code does not do either: {reason}"
    )
