"""Which models one `serve` serves: those of the command line, or the file's `[[models]]`."""

import argparse
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from scalellm.cli.flags import config_file, resolve_arguments
from scalellm.config import (
    BlueprintConfig,
    DeploymentConfig,
    EngineConfig,
    GatewayConfig,
    LogConfig,
    ServeConfig,
    Value,
    build,
    read_models,
)
from scalellm.controller.shapes import served_name
from scalellm.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Asked:
    """What was asked for, before any model was looked at."""

    models: tuple[ServeConfig, ...]  # what holds for all is the same in each
    devices: int | None  # to divide among several


def add_models(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "models",
        nargs="*",
        default=[],
        metavar="MODEL",
        help="a folder, a hub id, or `demo`, the default; several share the devices; "
        "NAME=MODEL names it in the API",
    )


def asked(arguments: argparse.Namespace) -> Asked:
    """One configuration a model. Raises ConfigError for what cannot be."""
    values = resolve_arguments(arguments)
    file = config_file(arguments, os.environ)
    sections = read_models(file) if file is not None else []
    given = [_of_argument(text) for text in arguments.models]
    if given and sections:
        raise ConfigError(
            f"models: given as arguments and as [[models]] in {file}: allowed is one of them"
        )
    own = given or sections
    if len(own) <= 1:
        only = own[0] if own else {}
        return Asked((_config({**values, **only}),), None)
    share: Mapping[str, Value] = {"devices": Value(None, "default")}
    configs = tuple(_config({**values, **share, **section}) for section in own)
    _check_together(configs)
    return Asked(configs, values["devices"].value)


def _of_argument(text: str) -> dict[str, Value]:
    """`MODEL` or `NAME=MODEL`; a folder whose name has an equals sign is a folder."""
    name, sign, model = text.partition("=")
    if not sign or Path(text).exists():
        return {"model": Value(text, "argument")}
    if not name or not model:
        raise ConfigError(f"models: got {text!r}, allowed: MODEL or NAME=MODEL")
    return {"model": Value(model, "argument"), "served_model_name": Value(name, "argument")}


def _config(values: Mapping[str, Value]) -> ServeConfig:
    return ServeConfig(
        engine=build(EngineConfig, values),
        gateway=build(GatewayConfig, values),
        deployment=build(DeploymentConfig, values),
        log=build(LogConfig, values),
        blueprint=build(BlueprintConfig, values),
    )


def _check_together(configs: Sequence[ServeConfig]) -> None:
    names = Counter(served_name(config.engine) for config in configs)
    for name, times in names.items():
        if times > 1:
            raise ConfigError(
                f"served_model_name: {times} models are called {name!r}; NAME=MODEL, or "
                f"served_model_name in [[models]], tells them apart"
            )
    journals = Counter(config.blueprint.journal_file for config in configs)
    for journal, times in journals.items():
        if journal is not None and times > 1:
            raise ConfigError(
                f"journal: {times} models have {str(journal)!r}; each needs a file of its own"
            )
