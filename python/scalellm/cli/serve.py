"""`scalellm serve MODEL`: gateway, controller and engines under one root."""

import argparse
import json
import os
import shutil
from pathlib import Path

from scalellm.cli.flags import add_settings, resolve_arguments, unknown_variables
from scalellm.cli.model import check_folder, resolve_model
from scalellm.config import (
    BlueprintConfig,
    DeploymentConfig,
    EngineConfig,
    GatewayConfig,
    LogConfig,
    ServeConfig,
    build,
)
from scalellm.controller.deployment import free_port, plan_deployment
from scalellm.controller.launchers.local import LocalLauncher
from scalellm.controller.report import Report
from scalellm.controller.runtime_folder import make_runtime_folder
from scalellm.controller.shapes import WIDTHS, fitting_widths
from scalellm.controller.supervisor import Supervisor
from scalellm.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_settings(parser, "serve", positional=("model",))


def run(arguments: argparse.Namespace) -> int:
    values = resolve_arguments(arguments)
    config = ServeConfig(
        engine=build(EngineConfig, values),
        gateway=build(GatewayConfig, values),
        deployment=build(DeploymentConfig, values),
        log=build(LogConfig, values),
        blueprint=build(BlueprintConfig, values),
    )
    report = Report(config.log.log_format)
    for line in unknown_variables(os.environ):
        report.event(line)
    port = free_port(config.gateway.host, config.gateway.port)
    weights = config.engine.load_format != "dummy"
    model_path = resolve_model(config.engine.model, config.engine.revision, weights)
    check_folder(model_path, needs_tokenizer=True, needs_weights=weights)
    report.phase("resolve model", report.elapsed_s(), str(model_path))
    folder = make_runtime_folder()
    try:
        launcher = LocalLauncher(folder)
        widths = _widths(config, model_path)
        plan = plan_deployment(config, model_path, port, folder, launcher, widths)
        return Supervisor(plan, folder, report).run()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


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
