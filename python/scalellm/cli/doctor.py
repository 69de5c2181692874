"""`scalellm doctor`: what is here, what would run and how fast, what is missing and its remedy."""

import argparse
import importlib.util
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from scalellm.cli import machine
from scalellm.cli.flags import add_settings, resolve_arguments
from scalellm.controller.cores import cgroup_cpu_limit, usable_cores
from scalellm.controller.deployment import free_port
from scalellm.errors import ServeError
from scalellm.loader.memory import available_cpu_bytes, gib

if TYPE_CHECKING:
    from scalellm.bench.floor import Ceilings

_PACKAGES = ("torch", "triton", "transformers", "safetensors", "huggingface_hub")
_NEEDED = ("torch", "transformers", "safetensors")
_OVERHEAD_BYTES = 2 << 30  # torch, activations and a small KV cache beside the weights
_REACHED_SHARE = 0.8  # of the floor's speed that decoding reaches in practice
_CONTEXT_TOKENS = 512
_BATCH = 64
_MEASURE_S = 0.2  # for each ceiling
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
        ceilings = _ceilings(cores)
        if ceilings is not None:
            _line("kernels", _reach(ceilings))
            print()
            _predict(ceilings, available)
    problems = _problems(versions, disk, cache, port_problem, bool(gpus))
    print()
    for problem in problems:
        print(f"{'missing' if problem.fatal else 'note':<8} {problem.what}; {problem.remedy}")
    fatal = any(problem.fatal for problem in problems)
    print("cannot serve yet" if fatal else "ready to serve: scalellm serve demo")
    return 1 if fatal else 0


def _line(name: str, text: str) -> None:
    print(f"{name:<10} {text}")


def _ceilings(cores: int) -> "Ceilings | None":
    """None without the Rust half, which is a problem of its own."""
    if importlib.util.find_spec("scalellm._core") is None:
        return None
    from scalellm import _core
    from scalellm.bench.ceilings import measure_ceilings

    _core.cpu_start(cores, 0)
    return measure_ceilings(_MEASURE_S)


def _reach(ceilings: "Ceilings") -> str:
    from scalellm.bench.ceilings import describe

    return describe([ceilings])


def _predict(ceilings: "Ceilings", available_bytes: int) -> None:
    """Decoding by the least time that the ceilings allow, less what is lost in practice."""
    from scalellm.bench.floor import decode_ms
    from scalellm.bench.model_shape import KNOWN_SHAPES, PRECISIONS

    print(
        f"predicted on this CPU at {_CONTEXT_TOKENS} tokens of context, tok/s of 1 request "
        f"and of {_BATCH} (ms a token):"
    )
    for shape in KNOWN_SHAPES:
        cells = []
        for precision in PRECISIONS:
            needed = shape.weight_bytes(precision) + shape.embedding_bytes + _OVERHEAD_BYTES
            if needed > available_bytes:
                cells.append(f"{precision}: needs about {gib(int(needed))}")
                continue
            alone, many = (
                decode_ms(shape, ceilings, precision, batch, _CONTEXT_TOKENS) / _REACHED_SHARE
                for batch in (1, _BATCH)
            )
            cells.append(
                f"{precision} {1e3 / alone:.1f} ({alone:.0f}), {1e3 * _BATCH / many:.0f} "
                f"({many:.0f})"
            )
        print(f"  {shape.name:<13} {'  '.join(f'{cell:<27}' for cell in cells)}".rstrip())


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
