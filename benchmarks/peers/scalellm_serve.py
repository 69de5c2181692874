"""ScaleLLM itself, from this checkout, in the environment that runs the benchmark."""

import sys
from pathlib import Path

from peers import weights
from peers.system import Launch, System

_FLAGS = ("--max-model-len", "4096", "--kv-cache-memory", "2GiB")


def _system(shape: str, name: str, precision: str) -> System:
    def launch(cache: Path, port: int) -> Launch:
        serve = (sys.executable, "-m", "scalellm", "serve", str(weights.bf16_folder(cache, shape)))
        listen = ("--port", str(port), "--served-model-name", "peer")
        quantization = ("--quantization", "none" if precision == "bf16" else precision)
        return Launch((*serve, *listen, *_FLAGS, *quantization), ready_path="/ready")

    def build(cache: Path, _: Path) -> None:
        weights.bf16_folder(cache, shape)

    return System(name, "ScaleLLM", precision, build, launch)


def systems(shape: str) -> tuple[System, ...]:
    return (
        _system(shape, "scalellm-int8", "int8"),
        _system(shape, "scalellm", "bf16"),
        _system(shape, "scalellm-int4", "int4"),
    )
