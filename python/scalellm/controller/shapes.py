"""From settings to shapes: which replicas a deployment may have, and what steers it."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from scalellm.config import BlueprintConfig, EngineConfig, ServeConfig
from scalellm.controller.blueprint.cost import calibration_toml, read_calibration
from scalellm.controller.blueprint.policy import OBJECTIVES, Settings
from scalellm.controller.blueprint.shape import Blueprint, check_fits, parse_groups, uniform
from scalellm.controller.cores import usable_cores
from scalellm.errors import ConfigError

CALIBRATIONS = {"cpu": "cpu-qwen3-0.6b-int8", "cuda": "node-8gpu"}  # where none was measured
WIDTHS = (1, 2, 4, 8)  # numbers of ranks that a replica can have


@dataclass(frozen=True, slots=True)
class Place:
    """What one model may use, and what its replicas are called."""

    widths: Sequence[int] = WIDTHS  # numbers of ranks that its heads allow
    cores: int | None = None  # None: all
    prefix: str = "engine"
    most_threads: int | None = None  # of one replica, unless that is said
    gpus: int = 0  # 0: none, or nobody knows how many


@dataclass(frozen=True, slots=True)
class Shapes:
    """The replicas of one model."""

    widths: Mapping[str, int]  # devices of each replica that may run, by name
    threads: Mapping[str, int]
    wanted: frozenset[str]  # to begin with
    steering: Mapping[str, Any] | None  # for the controller, if it may change them


def shapes_of(config: ServeConfig, state_file: Path, place: Place | None = None) -> Shapes:
    """The replicas of one model, in its place.

    Raises ConfigError for what cannot be, with what would fit, before anything is started."""
    place = place or Place()
    shape, widths, prefix = config.blueprint, place.widths, place.prefix
    check_together(config)
    cores, there = _devices_there(config, place)
    if config.deployment.blueprint == "auto":
        return _auto(config, state_file, place)
    if shape.replica:
        devices = shape.devices or there
        blueprint = parse_groups(shape.replica)
        check_fits(blueprint, devices, widths, "--replica")
        names = {f"{prefix}-{at}": tp for at, tp in enumerate(blueprint.replicas)}
        each = max(1, cores // devices)
        threads = {name: tp * each for name, tp in names.items()}
        return Shapes(names, threads, frozenset(names), None)
    number, ranks = config.deployment.replicas, config.engine.tensor_parallel_size
    if ranks not in widths:
        raise ConfigError(
            f"--tensor-parallel-size: got {ranks}, allowed for this model: {_listed(widths)}"
        )
    names = {f"{prefix}-{at}": ranks for at in range(number)}
    fair = max(1, min(cores // number, place.most_threads or cores))
    each = config.engine.cpu_threads or fair
    return Shapes(names, dict.fromkeys(names, each), frozenset(names), None)


def check_together(config: ServeConfig) -> None:
    """Raises ConfigError for settings that exclude each other."""
    shape, is_auto = config.blueprint, config.deployment.blueprint == "auto"
    if (shape.replica or is_auto) and config.engine.tensor_parallel_size != 1:
        given = "--blueprint auto" if is_auto else "--replica"
        raise ConfigError(f"--tensor-parallel-size and {given}: allowed is one of them")
    if shape.replica and (is_auto or config.deployment.replicas != 1):
        other = "--blueprint auto" if is_auto else "--replicas"
        raise ConfigError(f"--replica and {other}: allowed is one of them")
    if is_auto and config.deployment.replicas != 1:
        raise ConfigError("--blueprint auto and --replicas: allowed is one of them")
    if config.engine.nnodes > 1:
        if is_auto or shape.replica or config.deployment.replicas != 1:
            raise ConfigError("--nnodes and several replicas: allowed is one of them")
        if config.deployment.launcher != "local":
            raise ConfigError(
                f"--nnodes: got {config.engine.nnodes}, allowed with --launcher: local, kubernetes"
            )
    if changes_on_gpus(config) and config.deployment.launcher == "ray":
        # Replicas of the new shape would wait for the GPUs that those of the old one have.
        raise ConfigError(
            "--launcher: got ray, allowed with --blueprint auto on GPUs: local, kubernetes"
        )

    if comes_after(config) and config.deployment.launcher == "ray":
        # The places of the old shape's processes are not free while they stand by.
        raise ConfigError("--switch: got after, allowed with --launcher ray: auto, beside")


def comes_after(config: ServeConfig) -> bool:
    """Whether a new shape takes memory only when the old one is gone."""
    return config.deployment.blueprint == "auto" and config.blueprint.switch == "after"


def changes_on_gpus(config: ServeConfig) -> bool:
    """Whether replicas of two shapes are on the same GPUs for a while."""
    return config.deployment.blueprint == "auto" and config.engine.device == "cuda"


def _devices_there(config: ServeConfig, place: Place) -> tuple[int, int]:
    """Cores, and devices to divide: those cores, or GPUs where the model runs on them."""
    cores = config.engine.cpu_threads or place.cores or usable_cores()
    is_on_gpu = config.engine.device == "cuda" and place.gpus > 0
    return cores, place.gpus if is_on_gpu else cores


def _auto_devices(config: ServeConfig, place: Place) -> int:
    """The devices that `auto` divides. Raises ConfigError for more than there are."""
    _, there = _devices_there(config, place)
    devices = config.blueprint.devices or there
    if devices > there:
        kind = "GPU" if config.engine.device == "cuda" else "core"
        raise ConfigError(
            f"--devices: got {devices}, allowed: at most {there}, one for each {kind}"
        )
    return devices


def auto_widths(config: ServeConfig, place: Place) -> tuple[list[int], int]:
    """The widths that `auto` may choose from, and the number of devices.

    Raises ConfigError where there is nothing to choose."""
    check_together(config)
    devices = _auto_devices(config, place)
    widths = [tp for tp in place.widths if tp <= devices]
    if len(widths) < 2:
        raise ConfigError(
            f"--blueprint: auto needs two shapes to choose from; the model allows "
            f"{_listed(place.widths)}, and there are {devices} devices"
        )
    return widths, devices


def most_replicas(config: ServeConfig, place: Place) -> int:
    """How many may have memory at once: while the shape changes `beside`, those of two.

    Raises ConfigError as `auto_widths` and `parse_groups`."""
    if config.deployment.blueprint == "auto":
        widths, devices = auto_widths(config, place)
        counts = [len(blueprint.replicas) for blueprint in uniform(widths, devices)]
        return max(counts) if config.blueprint.switch == "after" else sum(sorted(counts)[-2:])
    if config.blueprint.replica:
        return len(parse_groups(config.blueprint.replica).replicas)
    return config.deployment.replicas


def _auto(config: ServeConfig, state_file: Path, place: Place) -> Shapes:
    shape, allowed = config.blueprint, place.widths
    cores, _ = _devices_there(config, place)
    kind = "cuda" if config.engine.device == "cuda" else "cpu"
    calibration = read_calibration(shape.calibration or CALIBRATIONS[kind])
    devices = _auto_devices(config, place)
    candidates = uniform([tp for tp in calibration.widths if tp in allowed], devices)
    if len(candidates) < 2:
        raise ConfigError(
            f"--blueprint: auto needs two shapes to choose from; {calibration.name} has widths "
            f"{_listed(calibration.widths)}, the model allows {_listed(allowed)}, and there are "
            f"{devices} devices"
        )
    widths = {
        f"{place.prefix}-tp{group.tp}-{at}": group.tp
        for candidate in candidates
        for group in candidate.groups
        for at in range(group.count)
    }
    first = candidates[-1] if shape.objective == "latency" else candidates[0]
    each = max(1, cores // devices)
    steering = {
        "model": served_name(config.engine),
        "widths": widths,
        "candidates": [candidate.to_json() for candidate in candidates],
        "calibration": calibration_toml(calibration),
        "settings": asdict(policy_settings(shape)),
        "switch": shape.switch,
        "hand_over_s": shape.hand_over_s,
        "journal": None if shape.journal_file is None else str(shape.journal_file.resolve()),
        "state_file": str(state_file),
    }
    wanted = frozenset(name for name, tp in widths.items() if tp == first.groups[0].tp)
    return Shapes(widths, {name: tp * each for name, tp in widths.items()}, wanted, steering)


def served_name(engine: EngineConfig) -> str:
    """What clients call the model."""
    return engine.served_model_name or engine.model


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
    candidates = {} if shapes.steering is None else {"candidates": shapes.steering["candidates"]}
    return {
        "mode": mode,
        "phase": "steady",
        "blueprint": blueprint.to_json(),
        "replicas": sorted(shapes.wanted),
        **candidates,
    }


def policy_settings(shape: BlueprintConfig) -> Settings:
    objective = next(name for name in OBJECTIVES if name == shape.objective)
    return Settings(
        objective=objective,
        ttft_slo_ms=shape.slo_ttft_ms,
        tbt_slo_ms=shape.slo_tbt_ms,
        min_stay_s=shape.min_stay_s,
    )
