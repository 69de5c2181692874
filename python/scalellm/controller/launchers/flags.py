"""Settings spelt out as flags."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from scalellm.config import SETTINGS, EngineConfig, LogConfig


def engine_flags(engine: EngineConfig, log: LogConfig, name: str) -> list[str]:
    """Every setting spelt out, so that an engine runs with what `serve` has resolved."""
    special = {"model": None, "listen": None, "served_model_name": name}
    given = {entry.name: getattr(engine, entry.name) for entry in fields(engine)}
    given |= {entry.name: getattr(log, entry.name) for entry in fields(log)} | special
    return flags_of(given)


def flags_of(given: Mapping[str, Any]) -> list[str]:
    """The flags of settings by name; None and what is no setting stay out."""
    flags = []
    for setting_name, value in given.items():
        if value is None or setting_name not in SETTINGS:
            continue
        flag = SETTINGS[setting_name].flag
        if isinstance(value, bool):
            flags.append(flag if value else f"--no-{flag[2:]}")
        else:
            flags += [flag, str(value)]
    return flags
