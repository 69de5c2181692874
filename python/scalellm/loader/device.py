"""Which device and number type a model runs with."""

import platform
from pathlib import Path

import torch

from scalellm.errors import ConfigError, UnsupportedModelError

_TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def choose_device(requested: str, rank: int = 0, ranks: int = 1, first: int = 0) -> torch.device:
    """`auto`, `cpu` or `cuda`, of which each of a host's ranks has its own, from `first` on.

    Raises ConfigError for a GPU that is not there."""
    if requested == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch sees no GPU here; `--device cpu` works everywhere")
    if requested == "cpu" or (requested == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if ranks == 1 and first == 0:
        return torch.device("cuda", torch.cuda.current_device())
    if (there := torch.cuda.device_count()) < first + ranks:
        beyond = f" beyond the {first} of other replicas" if first else ""
        raise ConfigError(
            f"--tensor-parallel-size {ranks} needs as many GPUs{beyond}; torch sees {there} here"
        )
    return torch.device("cuda", first + rank)


def use_device(device: torch.device) -> None:
    """Let the calling thread start its kernels there: each thread begins with the first GPU."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def choose_dtype(
    requested: str, checkpoint: str | None, device: torch.device, fast_bf16: bool | None = None
) -> tuple[torch.dtype, str]:
    """The type, and the reason for it in words.

    `auto` keeps bf16 (and takes it for fp16) where the device computes in it, and goes to fp32
    otherwise. `fast_bf16`: whether the CPU has bf16 instructions; asked from torch if None.
    """
    if requested != "auto":
        return _TYPES[requested], "as asked for"
    if checkpoint in (None, "float32", "float64"):
        return torch.float32, f"the checkpoint's type is {checkpoint or 'not named'}"
    if checkpoint not in ("bfloat16", "float16"):
        raise UnsupportedModelError(
            f"weights of type {checkpoint} are not supported; --dtype float32 or bfloat16 converts"
        )
    if device.type == "cpu" and not (cpu_has_bf16() if fast_bf16 is None else fast_bf16):
        return torch.float32, f"{checkpoint} checkpoint, but this CPU has no bf16 instructions"
    if checkpoint == "float16":
        return torch.bfloat16, "float16 checkpoint; bfloat16 has its size and a wider range"
    return torch.bfloat16, "the checkpoint's type"


def cpu_has_bf16() -> bool:
    """Whether bf16 products run at least as fast as fp32 ones: AVX512_BF16, AMX or Arm's BF16."""
    if platform.machine() in ("aarch64", "arm64"):
        try:
            with Path("/proc/cpuinfo").open(encoding="ascii", errors="replace") as stream:
                return any(
                    " bf16" in line for line in stream if line.lower().startswith("features")
                )
        except OSError:
            return False
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
