"""Whether this host's memory is enough for all replicas of a deployment together."""

from collections.abc import Sequence

from scalellm.config import ServeConfig
from scalellm.controller.shapes import Place, most_replicas, served_name
from scalellm.errors import ConfigError
from scalellm.loader.memory import gib


def check_memory(planned: Sequence[tuple[ServeConfig, Place]], available_bytes: int) -> None:
    """Raises ConfigError if the KV caches that were asked for do not fit on this host together.

    Each engine looks for itself when it starts, and all of them would see the same free memory."""
    needs = [
        (served_name(config.engine), most_replicas(config, place), size)
        for config, place in planned
        if (size := config.engine.kv_cache_memory_bytes) and config.engine.device != "cuda"
    ]
    needed = sum(replicas * size for _, replicas, size in needs)
    if needed <= available_bytes:
        return
    each = ", ".join(f"{name!r} {replicas} x {gib(size)}" for name, replicas, size in needs)
    share = available_bytes // sum(replicas for _, replicas, _ in needs)
    raise ConfigError(
        f"--kv-cache-memory: at once {each}, together {gib(needed)}, and {gib(available_bytes)} "
        f"available; what would fit, weights aside: {gib(share)} each, or fewer replicas"
    )
