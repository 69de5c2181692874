"""ScaleLLM itself, from this checkout, in the environment that runs the benchmark."""

import sys
from pathlib import Path

from peers import weights
from peers.system import Launch, System

_FLAGS = ("--max-model-len", "4096", "--kv-cache-memory", "2GiB")


def _build(cache: Path, _: Path) -> None:
    weights.bf16_folder(cache)


def _system(name: str, precision: str, *flags: str) -> System:
    def launch(cache: Path, port: int) -> Launch:
        serve = (sys.executable, "-m", "scalellm", "serve", str(weights.bf16_folder(cache)))
        listen = ("--port", str(port), "--served-model-name", "peer")
        return Launch((*serve, *listen, *_FLAGS, *flags), ready_path="/ready")

    return System(name, "ScaleLLM", precision, _build, launch)


SYSTEMS = (
    _system("scalellm", "bf16", "--quantization", "none"),
    _system("scalellm-int8", "int8", "--quantization", "int8"),
    _system("scalellm-int4", "int4", "--quantization", "int4"),
)
