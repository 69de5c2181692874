"""The ranks of a host that has not rank 0: `scalellm engine --node-rank 1` and on.

They come to rank 0, compute what it says, and end with it; then they are started anew, for the
engine that takes its place.
"""

import contextlib
import json
import logging
import os
import signal
import subprocess
import threading
from types import FrameType

from scalellm.config import EngineConfig
from scalellm.errors import ConfigError
from scalellm.executor.followers import start_rank

logger = logging.getLogger(__name__)

_PAUSE_S = 1.0  # before ranks that have ended are started anew


def check_hosts(config: EngineConfig) -> None:
    """Raises ConfigError for ranks that cannot be spread over as many hosts, or are not on one."""
    ranks, hosts = config.tensor_parallel_size, config.nnodes
    if ranks % hosts:
        raise ConfigError(
            f"--nnodes: got {hosts}, allowed: what divides --tensor-parallel-size {ranks}, as each "
            f"host has as many ranks"
        )
    if config.node_rank >= hosts:
        raise ConfigError(f"--node-rank: got {config.node_rank}, allowed: below --nnodes {hosts}")
    if hosts > 1:
        _ = config.first_host


def serve_ranks(config: EngineConfig) -> int:
    """Until SIGTERM or SIGINT."""
    each = config.tensor_parallel_size // config.nnodes
    mine = range(config.node_rank * each, (config.node_rank + 1) * each)
    # What is this host's own; all else rank 0 says.
    own = {
        "model_path": str(config.model_path),
        "packed_cache": config.packed_cache,
        "first_device": config.first_device,
        "cpu_threads": max(1, (config.cpu_threads or each) // each),
    }
    stopped = threading.Event()
    running: list[subprocess.Popen[bytes]] = []

    def stop(_number: int, _frame: FrameType | None) -> None:
        stopped.set()
        for process in running:
            with contextlib.suppress(ProcessLookupError):
                process.kill()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    address = (config.first_host, config.master_port)
    alive, _ = os.pipe()
    while not stopped.is_set():
        logger.info("ranks %s wait for rank 0 at %s:%d", [*mine], *address)
        running += [start_rank(rank, address, alive, f"--own={json.dumps(own)}") for rank in mine]
        if stopped.is_set():
            stop(0, None)
        for process in running:
            process.wait()
        running.clear()
        stopped.wait(_PAUSE_S)
    return 0
