"""`scalellm calibrate MODEL`: measures what a step costs on this machine, for `simulate`."""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from scalellm.cli.flags import add_settings, resolve_arguments
from scalellm.cli.model import check_folder, resolve_model
from scalellm.config import EngineConfig, build
from scalellm.controller.cores import usable_cores
from scalellm.errors import ConfigError

if TYPE_CHECKING:
    from scalellm.bench.steps import Sample
    from scalellm.controller.blueprint.cost import ShapeCost

_FRONT_MS = 3.0  # socket, gateway and link of one request on an idle machine
_SWITCH_MS = 500.0


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
        help="into so many the cores are divided; default: one for each core",
    )
    parser.add_argument(
        "--short", action="store_true", help="fewer steps of each kind: as at a first start"
    )


def run(arguments: argparse.Namespace) -> int:
    config = build(EngineConfig, resolve_arguments(arguments))
    weights = config.load_format != "dummy"
    folder = resolve_model(config.model, config.revision, weights)
    check_folder(folder, needs_tokenizer=False, needs_weights=weights)
    cores = usable_cores()
    devices = arguments.devices or cores
    if not 1 <= devices <= cores:
        raise ConfigError(f"--devices: got {devices}, allowed: 1 to {cores}")
    widths = _widths(arguments.widths, devices)

    from scalellm.bench.machine import describe_machine
    from scalellm.bench.results import check_writable
    from scalellm.controller.blueprint.cost import Calibration, calibration_toml

    check_writable(arguments.write)
    shapes: dict[int, ShapeCost] = {}
    notes = []
    for width in widths:
        threads = width * (cores // devices)
        shaped = replace(config, model_path=folder, tensor_parallel_size=width, cpu_threads=threads)
        shapes[width], misfit = _measure(shaped, arguments.short)
        notes.append(f"TP {width}: the median step is {misfit:.1%} off the line")
        print(notes[-1], flush=True)
    machine = describe_machine()
    calibration = Calibration(
        arguments.write.stem,
        "measured",
        f"{folder.name} on {machine['cpu']}, {machine['cores_usable']} cores, "
        f"{config.quantization} weights",
        shapes,
        _FRONT_MS,
        _SWITCH_MS,
    )
    comment = f"Measured by `scalellm calibrate`; a device is {cores // devices} core(s).\n"
    text = calibration_toml(calibration, comment + "\n".join(notes))
    arguments.write.write_text(text, encoding="utf-8")
    return 0


def _widths(text: str, cores: int) -> list[int]:
    try:
        found = sorted({int(part) for part in text.split(",")})
    except ValueError:
        found = []
    if not found or not 1 <= found[0] <= found[-1] <= cores:
        raise ConfigError(f"--widths: got {text!r}, allowed: 1 to {cores}, with commas between")
    return found


def _measure(config: EngineConfig, short: bool) -> "tuple[ShapeCost, float]":
    from scalellm.bench.steps import SHORT_SWEEP, SWEEP, Recorder, fit, misfit, run_load, samples_of
    from scalellm.controller.blueprint.cost import ShapeCost
    from scalellm.engine.local import LocalEngine, LocalListener
    from scalellm.engine.loop import EngineLoop
    from scalellm.executor.load import load_executor

    executor = load_executor(config)
    listener = LocalListener()
    loop = EngineLoop(executor, listener, config)
    recorder = Recorder()
    loop.scheduler.step_time = recorder
    limits = loop.scheduler.limits
    kv_tokens, block_size = executor.num_blocks * executor.block_size, executor.block_size
    engine = LocalEngine(loop, listener, executor.close)
    sweep = SHORT_SWEEP if short else SWEEP
    try:
        run_load(engine, sweep[0], executor.vocab_size, seed=0)  # what allocates and compiles
        recorder.steps.clear()
        for number, load in enumerate(sweep, start=1):
            run_load(engine, load, executor.vocab_size, seed=number)
        samples: list[Sample] = list(samples_of(recorder.steps))
    finally:
        engine.close()
    cost = fit(samples)
    shape = ShapeCost(
        config.tensor_parallel_size,
        cost,
        limits.max_num_seqs,
        limits.max_num_batched_tokens,
        limits.step_budget_ms,
        kv_tokens,
        block_size,
        limits.max_model_len,
    )
    return shape, misfit(cost, samples)
