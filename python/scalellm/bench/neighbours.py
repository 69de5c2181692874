"""Replicas in processes of their own that compute all the time, while another one is measured.

calibrate --a configuration, pickled--> python -m scalellm.bench.neighbours --"ready"--> it
"""

import pickle
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from threading import Timer

from scalellm.bench.steps import Load, measured_engine, run_load
from scalellm.config import EngineConfig
from scalellm.controller.child import PYTHON, die_with_parent
from scalellm.errors import EngineError

_LOAD = Load(6, 96, 32)  # streams most of the time, and prompts
_READY_S = 600.0
_MODULE = "scalellm.bench.neighbours"


@contextmanager
def busy_neighbours(config: EngineConfig, count: int) -> Iterator[None]:
    """`count` replicas of `config` that are busy until the end. Raises EngineError if one fails."""
    with ExitStack() as stack:
        processes = [_start(config, stack) for _ in range(count)]
        for process in processes:
            limit = Timer(_READY_S, process.kill)
            limit.daemon = True
            limit.start()
            try:
                said = process.stdout.readline() if process.stdout else b""
            finally:
                limit.cancel()
            if said.strip() != b"ready":
                raise EngineError("a replica that was to be a neighbour did not start")
        yield
        if any(process.poll() is not None for process in processes):
            raise EngineError("a replica that was to be a neighbour has ended")


def _start(config: EngineConfig, stack: ExitStack) -> subprocess.Popen[bytes]:
    process = stack.enter_context(
        subprocess.Popen(
            (*PYTHON, _MODULE),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            preexec_fn=die_with_parent(),
        )
    )
    stack.callback(process.kill)
    # One that has ended already is noticed when it does not say that it is ready.
    with suppress(BrokenPipeError):
        if process.stdin:
            process.stdin.write(pickle.dumps(config))
            process.stdin.close()
    return process


def _compute(config: EngineConfig) -> None:
    """Serve one load after another, until killed."""
    with measured_engine(config) as measured:
        seed = 0
        while True:
            run_load(measured.engine, _LOAD, measured.executor.vocab_size, seed)
            if seed == 0:
                sys.stdout.write("ready\n")
                sys.stdout.flush()
            seed += 1


if __name__ == "__main__":
    _compute(pickle.load(sys.stdin.buffer))
