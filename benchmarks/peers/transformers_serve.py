"""`transformers serve`: its default, and with continuous batching, which is off by default."""

from pathlib import Path

from peers import weights
from peers.environment import python_environment
from peers.system import Launch, System

VERSION = "5.23.0"
_ENVIRONMENT = "transformers"
# 80 blocks of 256 tokens: 2.2 GiB of this shape's KV. Left alone it takes most of the memory.
_BATCHING = ("--continuous-batching", "--cb-num-blocks", "80")


def python(cache: Path, log: Path) -> Path:
    """The Python that has torch and transformers; converters run in it too."""
    return python_environment(cache, _ENVIRONMENT, log)


def _system(shape: str, name: str, how: str, flags: tuple[str, ...]) -> System:
    def build(cache: Path, log: Path) -> None:
        python(cache, log)
        weights.bf16_folder(cache, shape)

    def launch(cache: Path, port: int) -> Launch:
        program = cache / _ENVIRONMENT / "env" / "bin" / "transformers"
        model = str(weights.bf16_folder(cache, shape))
        argv = (str(program), "serve", model, "--device", "cpu")
        listen = ("--host", "127.0.0.1", "--port", str(port))
        return Launch(
            (*argv, *listen, *flags), {"HF_HUB_OFFLINE": "1"}, ready_path="/health", model=model
        )

    about = f"transformers serve {VERSION}, {how}"
    return System(name, about, "bf16", build, launch, ignore_eos=False)


def systems(shape: str) -> tuple[System, ...]:
    return (
        _system(shape, "transformers", "default", ()),
        _system(shape, "transformers-batching", "--continuous-batching", _BATCHING),
    )
