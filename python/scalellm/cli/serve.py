"""`scalellm serve MODEL`: gateway, controller and engines under one root."""

import argparse
import os
import shutil

from scalellm.cli.flags import add_settings, resolve_arguments, unknown_variables
from scalellm.cli.model import check_folder, resolve_model
from scalellm.config import (
    DeploymentConfig,
    EngineConfig,
    GatewayConfig,
    LogConfig,
    ServeConfig,
    build,
)
from scalellm.controller.deployment import free_port, plan_deployment
from scalellm.controller.report import Report
from scalellm.controller.runtime_folder import make_runtime_folder
from scalellm.controller.supervisor import Supervisor


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_settings(parser, "serve", positional=("model",))


def run(arguments: argparse.Namespace) -> int:
    values = resolve_arguments(arguments)
    config = ServeConfig(
        engine=build(EngineConfig, values),
        gateway=build(GatewayConfig, values),
        deployment=build(DeploymentConfig, values),
        log=build(LogConfig, values),
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
        plan = plan_deployment(config, model_path, port, folder)
        return Supervisor(plan, folder, report).run()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
