"""`scalellm doctor`: what is here, what would run and how fast, what is missing and its remedy."""

import argparse
import importlib.util
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from scalellm.cli import machine
from scalellm.cli.flags import add_settings, resolve_arguments
from scalellm.controller.cores import cgroup_cpu_limit, usable_cores
from scalellm.controller.deployment import free_port
from scalellm.errors import ServeError
from scalellm.loader.memory import available_cpu_bytes, gib

_PACKAGES = ("torch", "triton", "transformers", "safetensors", "huggingface_hub")
_NEEDED = ("torch", "transformers", "safetensors")
# Parameters of well-known sizes, in billions, for the prediction.
_SIZES = (("Qwen3-0.6B", 0.6), ("Qwen3-1.7B", 1.7), ("Qwen3-4B", 4.0), ("Llama-3.1-8B", 8.0))
_BF16_BYTES = 2
_OVERHEAD_BYTES = 2 << 30  # torch, activations and a small KV cache beside the weights
_DECODE_SHARE = 0.8  # of the read bandwidth that decoding reaches in practice
_LOW_DISK_BYTES = 10 << 30


@dataclass(frozen=True, slots=True)
class Problem:
    """Something missing and how to get it."""

    what: str
    remedy: str
    fatal: bool


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_settings(parser, "doctor")
    parser.add_argument("--quick", action="store_true", help="measure nothing")


def run(arguments: argparse.Namespace) -> int:
    values = resolve_arguments(arguments)
    cores, available = usable_cores(), available_cpu_bytes()
    limit = cgroup_cpu_limit()
    gpus = machine.gpus()
    cache = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    disk = machine.free_disk_bytes(cache)
    versions = {name: machine.package_version(name) for name in _PACKAGES}

    _line("cpu", machine.cpu_name())
    _line("", ", ".join(machine.cpu_features()) or "no vector instructions known here")
    _line("cores", f"{cores} usable of {os.cpu_count()}")
    if limit is not None:
        _line("", f"control group allows {limit:g}")
    _line("memory", f"{gib(available)} available of {gib(machine.total_memory_bytes())}")
    for gpu in gpus:
        memory = "memory shared" if gpu.memory_bytes is None else gib(gpu.memory_bytes)
        _line("gpu", f"{gpu.name}, {memory}, driver {gpu.driver}")
    if not gpus:
        _line("gpu", "none found; models run on the CPU")
    _line("disk", f"{gib(disk)} free at {cache}")
    _line("python", f"{sys.version.split()[0]} at {sys.executable}")
    _line("packages", ", ".join(f"{name} {found or '-'}" for name, found in versions.items()))
    port_problem = _port_problem(values["host"].value, values["port"].value)
    _line("port", port_problem or f"{values['port'].value} is free")

    if not arguments.quick:
        bandwidth = machine.read_bandwidth(cores)
        _line("bandwidth", f"{bandwidth / 1e9:.1f} GB/s read with {cores} threads")
        print()
        _predict(bandwidth, available)
    problems = _problems(versions, disk, cache, port_problem, bool(gpus))
    print()
    for problem in problems:
        print(f"{'missing' if problem.fatal else 'note':<8} {problem.what}; {problem.remedy}")
    fatal = any(problem.fatal for problem in problems)
    print("cannot serve yet" if fatal else "ready to serve: scalellm serve demo")
    return 1 if fatal else 0


def _line(name: str, text: str) -> None:
    print(f"{name:<10} {text}")


def _predict(bandwidth: float, available_bytes: int) -> None:
    """Decoding one request reads all weights for every token: bandwidth bounds it."""
    print("predicted on this CPU, one request, bf16 (weights read once a token):")
    for name, billions in _SIZES:
        weights = int(billions * 1e9 * _BF16_BYTES)
        if weights + _OVERHEAD_BYTES > available_bytes:
            needed = gib(weights + _OVERHEAD_BYTES)
            print(f"  {name:<14} does not fit: needs about {needed}")
        else:
            per_s = _DECODE_SHARE * bandwidth / weights
            print(f"  {name:<14} about {per_s:5.1f} tok/s, {1e3 / per_s:.0f} ms a token")


def _port_problem(host: str, port: int) -> str:
    try:
        free_port(host, port)
    except ServeError as error:
        return str(error)
    return ""


def _problems(
    versions: dict[str, str | None], disk: int, cache: Path, port_problem: str, has_gpu: bool
) -> list[Problem]:
    found = [
        Problem(f"the package {name}", f"pip install {name}", fatal=True)
        for name in _NEEDED
        if versions[name] is None
    ]
    if importlib.util.find_spec("scalellm._core") is None:
        found.append(Problem("the Rust half (scalellm._core)", "make setup builds it", fatal=True))
    if port_problem:
        found.append(Problem(port_problem, "or --port 0 for any free one", fatal=False))
    if disk < _LOW_DISK_BYTES:
        remedy = "HF_HOME moves the cache of downloaded models"
        found.append(Problem(f"only {gib(disk)} free at {cache}", remedy, fatal=False))
    if has_gpu and versions["triton"] is None:
        found.append(Problem("triton, for the GPU's kernels", "pip install triton", fatal=False))
    return found
