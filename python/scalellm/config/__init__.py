"""Settings: each declared once, here; flags, environment, file and docs follow from it.

    flag  >  environment SCALELLM_*  >  scalellm.toml  >  default

A setting is a field of one of the frozen dataclasses of this package. Its name gives the flag
(`max_num_seqs` -> `--max-num-seqs`), the environment variable (`SCALELLM_MAX_NUM_SEQS`) and the key
in the file (`max_num_seqs = 64`). `resolve` merges the four sources and keeps each value's origin.
"""

from dataclasses import dataclass, field

from scalellm.config.engine import EngineConfig
from scalellm.config.serving import (
    BlueprintConfig,
    ClientConfig,
    DeploymentConfig,
    GatewayConfig,
    LogConfig,
)
from scalellm.config.sources import (
    CONFIG_FILE,
    GROUPS,
    MODELS_KEY,
    OF_ONE_MODEL,
    SETTINGS,
    Value,
    build,
    read_file,
    read_models,
    resolve,
)

__all__ = [
    "CONFIG_FILE",
    "GROUPS",
    "MODELS_KEY",
    "OF_ONE_MODEL",
    "SETTINGS",
    "BlueprintConfig",
    "ClientConfig",
    "DeploymentConfig",
    "EngineConfig",
    "GatewayConfig",
    "LogConfig",
    "ServeConfig",
    "Value",
    "build",
    "read_file",
    "read_models",
    "resolve",
]


@dataclass(frozen=True, slots=True)
class ServeConfig:
    """Everything that `scalellm serve` takes."""

    engine: EngineConfig
    gateway: GatewayConfig
    deployment: DeploymentConfig
    log: LogConfig
    blueprint: BlueprintConfig = field(default_factory=BlueprintConfig)
