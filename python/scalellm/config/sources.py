"""Where settings come from: flags, environment, file and defaults, merged."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from scalellm.config.engine import EngineConfig
from scalellm.config.serving import (
    BlueprintConfig,
    ClientConfig,
    DeploymentConfig,
    GatewayConfig,
    LogConfig,
)
from scalellm.errors import ConfigError
from scalellm.settings import Setting, declared, suggestion

CONFIG_FILE = "scalellm.toml"
GROUPS: tuple[type, ...] = (
    EngineConfig,
    GatewayConfig,
    DeploymentConfig,
    BlueprintConfig,
    LogConfig,
    ClientConfig,
)


SETTINGS: Mapping[str, Setting] = MappingProxyType(
    {name: found for group in GROUPS for name, found in declared(group).items()}
)

# What a [[models]] of the file may say of its model; all else holds for all models.
MODELS_KEY = "models"
OF_ONE_MODEL = frozenset(
    {*declared(EngineConfig), *declared(BlueprintConfig)} - {"listen"}
    | {"replicas", "blueprint", "routing", "chat_template", "safety_file"}
)


@dataclass(frozen=True, slots=True)
class Value:
    """A resolved setting."""

    value: Any
    origin: str  # "default", "flag --port", "environment SCALELLM_PORT", "file scalellm.toml"


def resolve(
    flags: Mapping[str, Any], environment: Mapping[str, str], file: Path | None = None
) -> dict[str, Value]:
    """Merge the sources; every setting is in the result.

    `flags` holds parsed values by setting name, only those given. `file` must exist when given.
    Raises ConfigError for unknown keys of the file and for values that cannot be.
    """
    values = {name: Value(found.default, "default") for name, found in SETTINGS.items()}
    if file is not None:
        origin = f"file {file}"
        for name, value in read_file(file).items():
            values[name] = Value(SETTINGS[name].check(value, origin), origin)
    for name, found in SETTINGS.items():
        if (text := environment.get(found.variable)) is not None:
            origin = f"environment {found.variable}"
            values[name] = Value(found.parse(text, origin), origin)
    for name, value in flags.items():
        origin = f"flag {SETTINGS[name].flag}"
        values[name] = Value(SETTINGS[name].check(value, origin), origin)
    return values


def read_file(file: Path) -> dict[str, Any]:
    """The keys of a scalellm.toml, without its `[[models]]`.

    Raises ConfigError when unreadable or a key is unknown."""
    found = _toml(file)
    found.pop(MODELS_KEY, None)
    for key in found:
        if key not in SETTINGS:
            raise ConfigError(f"{file}: unknown setting {key!r}{suggestion(key, SETTINGS)}")
    return found


def read_models(file: Path) -> list[dict[str, Value]]:
    """The settings in each of a scalellm.toml's `[[models]]`. Raises ConfigError."""
    sections = _toml(file).get(MODELS_KEY, [])
    if not isinstance(sections, list) or not all(isinstance(found, dict) for found in sections):
        raise ConfigError(f"{file}: {MODELS_KEY}: allowed are sections, [[{MODELS_KEY}]]")
    models = []
    for at, section in enumerate(sections):
        origin = f"file {file}, {MODELS_KEY}[{at}]"
        for key in section:
            if key not in OF_ONE_MODEL:
                why = "holds for all models" if key in SETTINGS else "unknown setting"
                near = suggestion(key, OF_ONE_MODEL)
                raise ConfigError(f"{file}: {MODELS_KEY}[{at}].{key}: {why}{near}")
        if "model" not in section:
            raise ConfigError(f"{file}: {MODELS_KEY}[{at}].model: missing")
        models.append(
            {
                name: Value(SETTINGS[name].check(value, origin), origin)
                for name, value in section.items()
            }
        )
    return models


def _toml(file: Path) -> dict[str, Any]:
    import tomllib

    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{file}: {error}") from None


Config = TypeVar("Config")


def build(group: type[Config], values: Mapping[str, Value], **more: Any) -> Config:
    """Make one of GROUPS from resolved values."""
    return group(**{name: values[name].value for name in declared(group)}, **more)
