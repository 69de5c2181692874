"""`scalellm calibrate MODEL`: measures what a step costs on this machine, for `simulate`."""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from scalellm.cli.flags import add_settings, resolve_arguments
from scalellm.cli.model import check_folder, resolve_model
from scalellm.config import EngineConfig, build
from scalellm.controller.cores import usable_cores
from scalellm.errors import ConfigError, EngineError, OutOfMemoryError

if TYPE_CHECKING:
    from scalellm.bench.steps import MeasuredEngine
    from scalellm.controller.blueprint.cost import ShapeCost, StepCost

_FRONT_MS = 3.0  # socket, gateway and link of one request on an idle machine
_SWITCH_MS = 500.0
_MOST_NEIGHBOURS = 7  # each is an engine of its own, with weights and a cache


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_settings(parser, "engine", positional=("model",))
    parser.add_argument("--write", type=Path, metavar="FILE", required=True)
    parser.add_argument(
        "--widths",
        default="1",
        metavar="N,N,...",
        help="ranks of a replica, each with a device: one shape for each number; default: 1",
    )
    parser.add_argument(
        "--devices",
        type=int,
        metavar="N",
        help="GPUs; on a CPU the cores are divided into so many; default: all, one for each core",
    )
    parser.add_argument(
        "--short", action="store_true", help="fewer steps of each kind: as at a first start"
    )
    parser.add_argument(
        "--alone",
        action="store_true",
        help="not beside busy replicas: what a simulation needs, and a first start does not",
    )


def run(arguments: argparse.Namespace) -> int:
    config = build(EngineConfig, resolve_arguments(arguments))
    weights = config.load_format != "dummy"
    folder = resolve_model(config.model, config.revision, weights)
    check_folder(folder, needs_tokenizer=False, needs_weights=weights)
    gpus, cores = _gpus(config), usable_cores()
    there = gpus or cores
    devices = arguments.devices or there
    if not 1 <= devices <= there:
        raise ConfigError(f"--devices: got {devices}, allowed: 1 to {there}")
    widths = _widths(arguments.widths, devices)

    from scalellm.bench.machine import describe_machine
    from scalellm.bench.results import check_writable
    from scalellm.controller.blueprint.cost import Calibration, calibration_toml

    check_writable(arguments.write)
    shapes: dict[int, ShapeCost] = {}
    notes = []
    each = max(1, cores // devices)
    for width in widths:
        shaped = replace(
            config, model_path=folder, tensor_parallel_size=width, cpu_threads=width * each
        )
        try:
            # GPUs have memory of their own; the cores of a host share its.
            neighbours = 0 if gpus or arguments.alone else devices // width - 1
            shape, misfit = _measure(shaped, arguments.short, gpus > 0, neighbours)
            shapes[width] = shape
            notes.append(f"TP {width}: the median step is {misfit:.1%} off the line")
            if shape.others:
                notes[-1] += f"; {shape.beside:.3f} x as long beside {shape.others} busy devices"
        except OutOfMemoryError as error:
            notes.append(f"TP {width} is left out: {error}")
        print(notes[-1], flush=True)
    if not shapes:
        raise OutOfMemoryError(notes[-1])
    machine = describe_machine()
    where = f"{machine['cpu']}, {machine['cores_usable']} cores"
    if gpus:
        where = f"{gpus} GPUs ({', '.join(dict.fromkeys(machine['gpus']))})"
    calibration = Calibration(
        arguments.write.stem,
        "measured",
        f"{folder.name} on {where}, {config.quantization} weights",
        shapes,
        _FRONT_MS,
        _SWITCH_MS,
    )
    device = "a GPU" if gpus else f"{each} core(s)"
    comment = f"Measured by `scalellm calibrate`; a device is {device}.\n"
    text = calibration_toml(calibration, comment + "\n".join(notes))
    arguments.write.write_text(text, encoding="utf-8")
    return 0


def _gpus(config: EngineConfig) -> int:
    """Those that engines will find here; 0 where they run on a CPU."""
    import torch

    from scalellm.loader.device import choose_device

    return torch.cuda.device_count() if choose_device(config.device).type == "cuda" else 0


def _widths(text: str, devices: int) -> list[int]:
    try:
        found = sorted({int(part) for part in text.split(",")})
    except ValueError:
        found = []
    if not found or not 1 <= found[0] <= found[-1] <= devices:
        raise ConfigError(f"--widths: got {text!r}, allowed: 1 to {devices}, with commas between")
    return found


def _measure(
    config: EngineConfig, short: bool, on_gpu: bool, neighbours: int
) -> "tuple[ShapeCost, float]":
    """What steps cost alone, and how much more beside up to so many busy `neighbours`."""
    from scalellm.bench.steps import SHORT_SWEEP, SWEEP, fit, measured_engine, misfit, run_sweep
    from scalellm.controller.blueprint.cost import ShapeCost

    sweep = SHORT_SWEEP if short else SWEEP
    with measured_engine(config) as measured:
        # What allocates, and on a GPU compiles kernels and records steps for each size.
        run_sweep(measured, sweep if on_gpu else sweep[:1], 0)
        samples = run_sweep(measured, sweep, 1)
        cost = fit(samples)
        beside, neighbours = _beside(measured, config, cost, neighbours)
        executor, limits = measured.executor, measured.limits
        shape = ShapeCost(
            config.tensor_parallel_size,
            cost,
            limits.max_num_seqs,
            limits.max_num_batched_tokens,
            limits.step_budget_ms,
            executor.num_blocks * executor.block_size,
            executor.block_size,
            limits.max_model_len,
            beside,
            neighbours * config.tensor_parallel_size,
        )
    return shape, misfit(cost, samples)


def _beside(
    measured: "MeasuredEngine", config: EngineConfig, cost: "StepCost", neighbours: int
) -> tuple[float, int]:
    """What steps take beside busy neighbours, by what they take alone before and after, and beside
    how many that was."""
    from scalellm.bench.neighbours import busy_neighbours
    from scalellm.bench.steps import SHORT_SWEEP, run_sweep, slowed

    neighbours = min(neighbours, _MOST_NEIGHBOURS)
    if not neighbours:
        return 1.0, 0
    alone = [slowed(cost, run_sweep(measured, SHORT_SWEEP, 2))]
    try:
        with busy_neighbours(config, neighbours):
            beside = slowed(cost, run_sweep(measured, SHORT_SWEEP, 3))
    except EngineError as error:
        print(f"TP {config.tensor_parallel_size}: {error}: taken to be alone", flush=True)
        return 1.0, 0
    alone.append(slowed(cost, run_sweep(measured, SHORT_SWEEP, 4)))
    return max(1.0, 2 * beside / sum(alone)), neighbours
