"""`scalellm serve MODEL ...`: gateway, controller and engines under one root."""

import argparse
import json
import os
import shutil
from pathlib import Path

from scalellm.cli.calibrated import calibrated
from scalellm.cli.flags import add_settings, unknown_variables
from scalellm.cli.model import check_folder, resolve_model
from scalellm.cli.served import add_models, asked
from scalellm.config import DeploymentConfig, ServeConfig
from scalellm.controller.deployment import Served, free_port, plan_deployment
from scalellm.controller.gpus import visible_gpus
from scalellm.controller.launchers.kubernetes import helm_values
from scalellm.controller.launchers.launcher import Launcher
from scalellm.controller.launchers.local import LocalLauncher
from scalellm.controller.launchers.ray import RayLauncher, find_nodes
from scalellm.controller.report import Report
from scalellm.controller.runtime_folder import make_runtime_folder
from scalellm.controller.shapes import WIDTHS, Place, auto_widths, fitting_widths
from scalellm.controller.sharing import share
from scalellm.controller.supervisor import Supervisor
from scalellm.errors import ConfigError


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
        launcher = _launcher(shared.deployment, folder)
        shared_out = share(found.models, launcher.cores, found.devices)
        models = [_resolve(config, cores, report) for config, cores in shared_out]
        plan = plan_deployment(models, port, folder, launcher)
        return Supervisor(plan, folder, report).run()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _launcher(deployment: DeploymentConfig, folder: Path) -> Launcher:
    if deployment.launcher == "ray":
        return RayLauncher(folder, deployment.ray_address, find_nodes(deployment.ray_address))
    return LocalLauncher(folder, visible_gpus())


def _resolve(config: ServeConfig, cores: int, report: Report) -> Served:
    """The model's files, downloaded where that is needed."""
    before_s = report.elapsed_s()
    weights = config.engine.load_format != "dummy"
    path = resolve_model(config.engine.model, config.engine.revision, weights)
    check_folder(path, needs_tokenizer=True, needs_weights=weights)
    report.phase("resolve model", report.elapsed_s() - before_s, str(path))
    widths = _widths(config, path)
    is_ours = config.deployment.launcher == "local"  # elsewhere steps cost something else
    if is_ours and config.deployment.blueprint == "auto" and config.blueprint.calibration is None:
        shapes, devices = auto_widths(config, Place(widths, cores))
        config = calibrated(config, path, shapes, devices, report)
    return Served(config, path, cores, widths)


def _widths(config: ServeConfig, model_path: Path) -> tuple[int, ...]:
    """Numbers of ranks that can share the model; looked up only where shapes were asked for."""
    if config.deployment.blueprint == "static" and not config.blueprint.replica:
        return WIDTHS
    try:
        found = json.loads((model_path / "config.json").read_text(encoding="utf-8"))
        heads = int(found["num_attention_heads"])
        kv_heads = int(found.get("num_key_value_heads") or heads)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"--replica: {model_path / 'config.json'} has no heads: {error}"
        ) from None
    return fitting_widths(heads, kv_heads)
