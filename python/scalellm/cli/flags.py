"""Settings as flags of a command, and their resolution against environment and file."""

import argparse
import os
from collections.abc import Mapping
from pathlib import Path

from scalellm.config import CONFIG_FILE, SETTINGS, Value, resolve
from scalellm.errors import ConfigError
from scalellm.settings import ENVIRONMENT_PREFIX, Setting, suggestion

CONFIG_VARIABLE = ENVIRONMENT_PREFIX + "CONFIG"
# Variables that are no settings: the file's own, the test suite's, the marks of a process tree.
_OTHER_VARIABLES = (
    CONFIG_VARIABLE,
    *(ENVIRONMENT_PREFIX + name for name in ("REQUIRE", "TREE", "CHILD")),
)


def settings_of(command: str) -> list[Setting]:
    """The settings that a command takes, in the order of their declaration."""
    return [found for found in SETTINGS.values() if command in found.declaration.commands]


def add_settings(
    parser: argparse.ArgumentParser,
    command: str,
    positional: tuple[str, ...] = (),
    left_out: tuple[str, ...] = (),
) -> None:
    """Add a command's settings as flags, and `--config`; unset ones stay out of the namespace."""
    for found in settings_of(command):
        if found.name in left_out:
            continue
        text = found.help_text.replace("%", "%%")
        if found.name in positional:
            parser.add_argument(
                found.name, nargs="?", default=argparse.SUPPRESS, metavar="MODEL", help=text
            )
        elif found.kind is bool:
            parser.add_argument(
                found.flag,
                dest=found.name,
                action=argparse.BooleanOptionalAction,
                default=argparse.SUPPRESS,
                help=text,
            )
        else:
            parser.add_argument(
                found.flag,
                dest=found.name,
                action="append" if found.kind is tuple else "store",
                default=argparse.SUPPRESS,
                metavar=found.metavar,
                help=text,
            )
    parser.add_argument(
        "--config", metavar="FILE", help=f"settings file; default: {CONFIG_FILE} if there is one"
    )


def resolve_arguments(
    arguments: argparse.Namespace, environment: Mapping[str, str] | None = None
) -> dict[str, Value]:
    """Resolve every setting from parsed flags, the environment and the file.

    Raises ConfigError for values that cannot be and for a `--config` that is not there.
    """
    environment = os.environ if environment is None else environment
    flags = {}
    for name, value in vars(arguments).items():
        if name in SETTINGS:
            found = SETTINGS[name]
            flags[name] = (
                found.parse(value, f"flag {found.flag}") if isinstance(value, str) else value
            )
    return resolve(flags, environment, config_file(arguments, environment))


def config_file(arguments: argparse.Namespace, environment: Mapping[str, str]) -> Path | None:
    """`--config`, else SCALELLM_CONFIG, else scalellm.toml of the working folder if it is there."""
    named = getattr(arguments, "config", None) or environment.get(CONFIG_VARIABLE)
    if named:
        if not Path(named).is_file():
            raise ConfigError(f"config: no file {named!r}")
        return Path(named)
    return Path(CONFIG_FILE) if Path(CONFIG_FILE).is_file() else None


def unknown_variables(environment: Mapping[str, str]) -> list[str]:
    """A line for each SCALELLM_* variable that is no setting: most likely misspelt."""
    known = [found.variable for found in SETTINGS.values()] + list(_OTHER_VARIABLES)
    return [
        f"environment {name} is no setting and has no effect{suggestion(name, known)}"
        for name in sorted(environment)
        if name.startswith(ENVIRONMENT_PREFIX) and name not in known
    ]
