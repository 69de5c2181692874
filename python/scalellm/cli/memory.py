"""Whether this host's memory is enough for all replicas of a deployment together."""

from collections.abc import Sequence
from dataclasses import replace

from scalellm.config import ServeConfig
from scalellm.controller.shapes import Place, most_replicas, served_name
from scalellm.errors import ConfigError
from scalellm.loader.memory import gib

Planned = Sequence[tuple[ServeConfig, Place]]


def settled_switches(planned: Planned, available_bytes: int) -> list[tuple[ServeConfig, Place]]:
    """With what `--switch auto` is: `after` where the KV caches of two shapes do not fit beside
    each other."""
    beside = [(_switching(config, "beside"), place) for config, place in planned]
    fits = _total(_needs(beside)) <= available_bytes
    way = "beside" if fits or planned[0][0].deployment.launcher == "ray" else "after"
    return [(_switching(config, way), place) for config, place in planned]


def _switching(config: ServeConfig, way: str) -> ServeConfig:
    if config.blueprint.switch != "auto":
        return config
    return replace(config, blueprint=replace(config.blueprint, switch=way))


def _needs(planned: Planned) -> list[tuple[str, int, int]]:
    """Of each model that says it: its name, replicas at once, and the KV cache of each."""
    return [
        (served_name(config.engine), most_replicas(config, place), size)
        for config, place in planned
        if (size := config.engine.kv_cache_memory_bytes) and config.engine.device != "cuda"
    ]


def _total(needs: Sequence[tuple[str, int, int]]) -> int:
    return sum(replicas * size for _, replicas, size in needs)


def check_memory(planned: Planned, available_bytes: int) -> None:
    """Raises ConfigError if the KV caches that were asked for do not fit on this host together.

    Each engine looks for itself when it starts, and all of them would see the same free memory."""
    needs = _needs(planned)
    needed = _total(needs)
    if needed <= available_bytes:
        return
    each = ", ".join(f"{name!r} {replicas} x {gib(size)}" for name, replicas, size in needs)
    share = available_bytes // sum(replicas for _, replicas, _ in needs)
    raise ConfigError(
        f"--kv-cache-memory: at once {each}, together {gib(needed)}, and {gib(available_bytes)} "
        f"available; what would fit, weights aside: {gib(share)} each, or fewer replicas"
    )
