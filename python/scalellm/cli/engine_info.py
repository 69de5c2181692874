"""What an engine says about itself in Describe."""

import hashlib
import json
import time
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from scalellm.config import EngineConfig
from scalellm.loader.digest import weights_digest

# Raised whenever a kernel's results change in any bit: replicas of other generations do not replay
# each other's requests.
KERNEL_GENERATION = 4


def numerics_digest(parts: Mapping[str, object]) -> str:
    """Hex SHA-256 of everything that decides a result's bits besides the weights."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def describe(config: EngineConfig, executor: Any, tokenizer_digest: str) -> dict[str, Any]:
    """DescribeResponse's fields by name; `executor` is a loaded SingleExecutor."""
    dtype = str(executor.dtype).removeprefix("torch.")
    device = executor.device.type
    return {
        "model": config.served_model_name or config.model,
        "model_path": str(config.model_path),
        "tokenizer_digest": tokenizer_digest,
        "weights_digest": weights_digest(config.model_path, config.load_format, config.seed),
        "numerics_digest": numerics_digest(
            {
                "dtype": dtype,
                "kv_cache_dtype": executor.kv_cache_dtype,
                "quantization": executor.quantization,
                "device": device,
                "torch": package_version("torch"),
                "kernels": KERNEL_GENERATION,
                # On a CPU the bits are the same whatever it is.
                "tensor_parallel_size": 1 if device == "cpu" else config.tensor_parallel_size,
            }
        ),
        "epoch": time.time_ns(),
        "vocab_size": executor.vocab_size,
        "max_model_len": executor.max_model_len,
        "max_num_seqs": config.max_num_seqs,
        "block_size": executor.block_size,
        "num_blocks": executor.num_blocks,
        "tensor_parallel_size": config.tensor_parallel_size,
        "dtype": dtype,
        "quantization": executor.quantization,
        "kv_cache_dtype": executor.kv_cache_dtype,
        "device": device,
        "eos_token_ids": list(executor.model_config.eos_token_ids),
        "version": package_version("scalellm"),
    }


def package_version(name: str) -> str:
    """Version of an installed package, "" when it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return ""
