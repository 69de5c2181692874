"""The executor that a configuration asks for."""

from collections.abc import Callable

from scalellm.config import EngineConfig
from scalellm.executor.followers import Followers
from scalellm.executor.node import check_hosts
from scalellm.executor.single import SingleExecutor
from scalellm.executor.tensor_parallel import TensorParallelExecutor
from scalellm.loader.load import Progress


def load_executor(
    config: EngineConfig,
    progress: Progress | None = None,
    followers: Followers | None = None,
    hold: Callable[[], None] | None = None,
) -> SingleExecutor:
    """Load `config.model_path`, and start whatever processes compute it with this one.

    `progress(phase, seconds)` is called as each phase ends; `followers`: those processes, if they
    were started before; `hold` is called, and may wait, before memory is taken that others may
    still have: before the KV cache is allocated where weights are in a file that all replicas map,
    before these are loaded elsewhere. Raises ModelError, ConfigError, EngineError."""
    check_hosts(config)
    if config.tensor_parallel_size > 1:
        return TensorParallelExecutor.load(config, progress, hold, followers)
    return SingleExecutor.load(config, progress, hold)
