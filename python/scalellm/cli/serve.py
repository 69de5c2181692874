"""`scalellm serve MODEL ...`: gateway, controller and engines under one root."""

import argparse
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from scalellm.cli.calibrated import calibrated
from scalellm.cli.flags import add_settings, unknown_variables
from scalellm.cli.journalled import journalled
from scalellm.cli.memory import check_memory, settled_switches
from scalellm.cli.model import check_folder, resolve_model
from scalellm.cli.served import add_models, asked
from scalellm.config import ServeConfig
from scalellm.controller.blueprint.cost import read_calibration
from scalellm.controller.deployment import Served, free_port, plan_deployment
from scalellm.controller.gpus import count_gpus, settled
from scalellm.controller.launchers.kubernetes import helm_values
from scalellm.controller.launchers.launcher import Launcher
from scalellm.controller.launchers.local import LocalLauncher
from scalellm.controller.launchers.ray import RayLauncher, find_nodes
from scalellm.controller.report import Report
from scalellm.controller.runtime_folder import make_runtime_folder
from scalellm.controller.shapes import (
    WIDTHS,
    Place,
    auto_widths,
    comes_after,
    fitting_widths,
    served_name,
    shapes_of,
)
from scalellm.controller.sharing import share
from scalellm.controller.supervisor import Supervisor
from scalellm.errors import ConfigError
from scalellm.executor.node import check_hosts
from scalellm.loader.memory import available_cpu_bytes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_settings(parser, "serve", left_out=("model",))
    add_models(parser)


def run(arguments: argparse.Namespace) -> int:
    found = asked(arguments)
    shared = found.models[0]  # what holds for all models
    if shared.deployment.launcher == "kubernetes":
        print(json.dumps(helm_values(found.models), indent=2))
        return 0
    report = Report(shared.log.log_format)
    for line in unknown_variables(os.environ):
        report.event(line)
    port = free_port(shared.gateway.host, shared.gateway.port)
    folder = make_runtime_folder()
    try:
        launcher = _launcher(found.models, folder)
        gpus = launcher.gpus or 0
        configs = [settled(config, gpus) for config in found.models]
        shared_out = share(configs, launcher.cores, found.devices, gpus)
        # Small files and every model's shapes first: nothing large is fetched, and nothing is
        # measured, for a deployment that cannot be.
        several = len(shared_out) > 1
        planned = [_planned(config, cores, gpus, several) for config, cores in shared_out]
        available_bytes = available_cpu_bytes()
        planned = settled_switches(planned, available_bytes)
        for config, _ in planned:
            if comes_after(config):
                report.event(
                    f"{served_name(config.engine)}: a new shape comes after the old one is gone, "
                    f"and requests wait in between (--switch)"
                )
        if shared.deployment.launcher == "local":
            check_memory(planned, available_bytes)
        models = [_resolve(config, place, report) for config, place in planned]
        plan = plan_deployment(models, port, folder, launcher)
        return Supervisor(plan, folder, report).run()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _launcher(models: Sequence[ServeConfig], folder: Path) -> Launcher:
    deployment = models[0].deployment
    if deployment.launcher == "ray":
        return RayLauncher(folder, deployment.ray_address, find_nodes(deployment.ray_address))
    return LocalLauncher(folder, count_gpus(models))


def _planned(
    config: ServeConfig, cores: int, gpus: int, several: bool
) -> tuple[ServeConfig, Place]:
    """What the model may use. Raises ConfigError for what cannot be, naming it among several."""
    path = resolve_model(config.engine.model, config.engine.revision, weights=False)
    check_folder(path, needs_tokenizer=True, needs_weights=False)
    try:
        check_hosts(config.engine)
        place = Place(_widths(config, path), cores, gpus=gpus)
        if config.deployment.blueprint == "auto":
            auto_widths(config, place)
        if config.deployment.blueprint != "auto" or config.blueprint.calibration is not None:
            shapes_of(config, Path(), place)
    except ConfigError as error:
        named = f"model {served_name(config.engine)!r}: " if several else ""
        raise ConfigError(f"{named}{error}") from None
    return config, place


def _resolve(config: ServeConfig, place: Place, report: Report) -> Served:
    """The model's files, downloaded where that is needed, and what its steps cost."""
    before_s = report.elapsed_s()
    weights = config.engine.load_format != "dummy"
    path = resolve_model(config.engine.model, config.engine.revision, weights)
    check_folder(path, needs_tokenizer=True, needs_weights=weights)
    report.phase("resolve model", report.elapsed_s() - before_s, str(path))
    if config.deployment.blueprint == "auto":
        config = journalled(_with_costs(config, path, place, report), report)
    return Served(config, path, place.cores, place.widths)


def _with_costs(config: ServeConfig, path: Path, place: Place, report: Report) -> ServeConfig:
    """With a calibration: the one that was asked for, or what steps cost here."""
    shapes, devices = auto_widths(config, place)
    if config.blueprint.calibration is not None:
        asked = read_calibration(config.blueprint.calibration)
        if asked.source != "measured":
            report.event(
                f"the costs of {asked.name} are {asked.source}, not measured ({asked.note}); real "
                f"steps correct their level"
            )
    elif config.deployment.launcher == "local":  # elsewhere steps cost something else
        return calibrated(config, path, shapes, devices, report)
    return config


def _widths(config: ServeConfig, model_path: Path) -> tuple[int, ...]:
    """Numbers of ranks that can share the model; looked up only where several were asked for."""
    is_shaped = config.deployment.blueprint == "auto" or config.blueprint.replica
    if config.engine.tensor_parallel_size == 1 and not is_shaped:
        return WIDTHS
    try:
        found = json.loads((model_path / "config.json").read_text(encoding="utf-8"))
        heads = int(found["num_attention_heads"])
        kv_heads = int(found.get("num_key_value_heads") or heads)
    except (OSError, ValueError, KeyError, TypeError) as error:
        if not is_shaped:
            return WIDTHS  # the engine knows more of models
        raise ConfigError(
            f"--replica: {model_path / 'config.json'} has no heads: {error}"
        ) from None
    return fitting_widths(heads, kv_heads)
