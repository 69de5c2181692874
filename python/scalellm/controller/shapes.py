"""From settings to shapes: which replicas a deployment may have, and what steers it."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from scalellm.config import BlueprintConfig, ServeConfig
from scalellm.controller.blueprint.cost import calibration_toml, read_calibration
from scalellm.controller.blueprint.policy import OBJECTIVES, Settings
from scalellm.controller.blueprint.shape import Blueprint, check_fits, parse_groups, uniform
from scalellm.controller.cores import usable_cores
from scalellm.errors import ConfigError

CALIBRATION = "cpu-qwen3-0.6b-int8"
WIDTHS = (1, 2, 4, 8)  # numbers of ranks that a replica can have
STATE_FILE = "blueprint.json"


@dataclass(frozen=True, slots=True)
class Shapes:
    """The replicas of one `serve`."""

    widths: Mapping[str, int]  # devices of each replica that may run, by name
    threads: Mapping[str, int]
    wanted: frozenset[str]  # to begin with
    steering: Mapping[str, Any] | None  # for the controller, if it may change them


def shapes_of(config: ServeConfig, folder: Path, widths: Sequence[int] = WIDTHS) -> Shapes:
    """`widths`: those that the model's heads allow.

    Raises ConfigError for what cannot be, with what would fit, before anything is started."""
    shape = config.blueprint
    cores = config.engine.cpu_threads or usable_cores()
    _check(config)
    if config.deployment.blueprint == "auto":
        return _auto(shape, cores, folder, widths)
    if shape.replica:
        devices = shape.devices or cores
        blueprint = parse_groups(shape.replica)
        check_fits(blueprint, devices, widths, "--replica")
        names = {f"engine-{at}": tp for at, tp in enumerate(blueprint.replicas)}
        each = max(1, cores // devices)
        threads = {name: tp * each for name, tp in names.items()}
        return Shapes(names, threads, frozenset(names), None)
    number = config.deployment.replicas
    names = {f"engine-{at}": config.engine.tensor_parallel_size for at in range(number)}
    each = config.engine.cpu_threads or max(1, cores // number)
    return Shapes(names, dict.fromkeys(names, each), frozenset(names), None)


def _check(config: ServeConfig) -> None:
    shape, is_auto = config.blueprint, config.deployment.blueprint == "auto"
    if (shape.replica or is_auto) and config.engine.tensor_parallel_size != 1:
        given = "--blueprint auto" if is_auto else "--replica"
        raise ConfigError(f"--tensor-parallel-size and {given}: allowed is one of them")
    if shape.replica and (is_auto or config.deployment.replicas != 1):
        other = "--blueprint auto" if is_auto else "--replicas"
        raise ConfigError(f"--replica and {other}: allowed is one of them")
    if is_auto and config.deployment.replicas != 1:
        raise ConfigError("--blueprint auto and --replicas: allowed is one of them")
    if (is_auto or shape.replica) and config.engine.device == "cuda":
        raise ConfigError("--device: got cuda, allowed with replicas of several shapes: cpu")


def _auto(shape: BlueprintConfig, cores: int, folder: Path, allowed: Sequence[int]) -> Shapes:
    calibration = read_calibration(shape.calibration or CALIBRATION)
    devices = shape.devices or cores
    if devices > cores:
        raise ConfigError(f"--devices: got {devices}, allowed: at most {cores}, one for each core")
    candidates = uniform([tp for tp in calibration.widths if tp in allowed], devices)
    if len(candidates) < 2:
        raise ConfigError(
            f"--blueprint: auto needs two shapes to choose from; {calibration.name} has widths "
            f"{_listed(calibration.widths)}, the model allows {_listed(allowed)}, and there are "
            f"{devices} devices"
        )
    widths = {
        f"engine-tp{group.tp}-{at}": group.tp
        for candidate in candidates
        for group in candidate.groups
        for at in range(group.count)
    }
    first = candidates[-1] if shape.objective == "latency" else candidates[0]
    each = cores // devices
    steering = {
        "widths": widths,
        "candidates": [candidate.to_json() for candidate in candidates],
        "calibration": calibration_toml(calibration),
        "settings": asdict(policy_settings(shape)),
        "hand_over_s": shape.hand_over_s,
        "journal": None if shape.journal is None else str(Path(shape.journal).resolve()),
        "state_file": str(folder / STATE_FILE),
    }
    wanted = frozenset(name for name, tp in widths.items() if tp == first.groups[0].tp)
    return Shapes(widths, {name: tp * each for name, tp in widths.items()}, wanted, steering)


def _listed(widths: Sequence[int]) -> str:
    return ", ".join(str(width) for width in widths)


def fitting_widths(heads: int, kv_heads: int) -> tuple[int, ...]:
    """Numbers of ranks that can share so many heads."""
    return tuple(
        tp for tp in WIDTHS if heads % tp == 0 and (kv_heads % tp == 0 or tp % kv_heads == 0)
    )


def initial_state(shapes: Shapes, mode: str) -> dict[str, Any]:
    """What `/admin/v1/blueprint` says before the controller has said anything."""
    blueprint = Blueprint.of_json({"tp": shapes.widths[name], "count": 1} for name in shapes.wanted)
    return {
        "mode": mode,
        "phase": "steady",
        "blueprint": blueprint.to_json(),
        "replicas": sorted(shapes.wanted),
    }


def policy_settings(shape: BlueprintConfig) -> Settings:
    objective = next(name for name in OBJECTIVES if name == shape.objective)
    return Settings(
        objective=objective,
        ttft_slo_ms=shape.slo_ttft_ms,
        tbt_slo_ms=shape.slo_tbt_ms,
        min_stay_s=shape.min_stay_s,
    )
