"""`scalellm engine MODEL --listen ADDR`: one replica."""

import argparse
import dataclasses
import errno
import gc
import queue
import signal
from collections.abc import Callable
from types import FrameType
from typing import Protocol

from scalellm.cli.engine_info import describe
from scalellm.cli.flags import add_settings, resolve_arguments
from scalellm.cli.log import set_up_logging
from scalellm.cli.model import check_folder, resolve_model
from scalellm.cli.progress import Progress
from scalellm.config import EngineConfig, LogConfig, build
from scalellm.controller.child import GO, HAND_OVER
from scalellm.controller.cores import usable_cores
from scalellm.errors import AddressInUseError, ConfigError, ServeError
from scalellm.executor.followers import Followers
from scalellm.executor.leave import leave
from scalellm.executor.node import check_hosts, serve_ranks


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_settings(parser, "engine", positional=("model",))
    parser.add_argument(
        "--status-fd", type=int, metavar="FD", help="where to report the start, as JSON lines"
    )
    parser.add_argument(
        "--stand-by",
        action="store_true",
        help="take no memory for keys and values before SIGUSR2: another engine still has it",
    )


def run(arguments: argparse.Namespace) -> int:
    values = resolve_arguments(arguments)
    config, log = build(EngineConfig, values), build(LogConfig, values)
    set_up_logging(log)
    progress = Progress(arguments.status_fd)
    weights = config.load_format != "dummy"
    folder = resolve_model(config.model, config.revision, weights)
    check_folder(folder, needs_tokenizer=False, needs_weights=weights)
    threads = config.cpu_threads or usable_cores()
    config = dataclasses.replace(config, model_path=folder, cpu_threads=threads)
    check_hosts(config)
    if config.node_rank:
        return serve_ranks(config)
    # They import torch meanwhile.
    followers = Followers.of(config) if config.tensor_parallel_size > 1 else None

    import torch

    from scalellm._core import EngineListener, tokenizer_digest
    from scalellm.engine.loop import EngineLoop
    from scalellm.executor.load import load_executor

    progress.done("import torch", torch.__version__)
    hold = standing_by(progress) if arguments.stand_by else None
    executor = load_executor(config, progress.phase, followers, hold)
    progress.restart()
    has_tokenizer = (folder / "tokenizer.json").is_file()
    digest = tokenizer_digest(str(folder)) if has_tokenizer else ""
    info = describe(config, executor, digest)
    try:
        listener = EngineListener(config.listen, info)
    except ValueError as error:
        raise ConfigError(f"listen: {error}") from None
    except OSError as error:
        taken = AddressInUseError if error.errno == errno.EADDRINUSE else ServeError
        raise taken(f"cannot listen on {config.listen}: {error}") from None
    progress.done("listen", listener.address)
    loop = EngineLoop(executor, listener, config)
    stopping = Stopping(loop)
    for number in (signal.SIGTERM, signal.SIGINT, HAND_OVER):
        signal.signal(number, stopping)
    facts = {name: info[name] for name in ("dtype", "quantization", "device", "max_model_len")}
    kv_tokens = executor.num_blocks * executor.block_size

    def ready() -> None:
        gc.freeze()  # what is there now stays: no collection need ever walk through torch again
        progress.done("warm up")
        progress.ready(listener.address, facts | {"kv_tokens": kv_tokens})

    try:
        loop.run(ready)
    finally:
        listener.close()
        executor.close()
    return leave(0)


def standing_by(progress: Progress) -> Callable[[], None]:
    """Says that the engine stands by, and waits for GO; call it on the main thread."""
    told = queue.SimpleQueue[None]()  # whose `put` may interrupt its `get` on the same thread
    signal.signal(GO, lambda _number, _frame: told.put(None))

    def hold() -> None:
        progress.standing_by()
        told.get()

    return hold


class Stoppable(Protocol):
    def drain(self) -> None: ...
    def hand_over(self) -> None: ...
    def stop(self) -> None: ...


class Stopping:
    """Signal handler: the first drains, or hands over; the second stops after the step that runs, a
    third ends the process, whatever it does."""

    def __init__(self, loop: Stoppable) -> None:
        self._loop = loop
        self._signalled = False

    def __call__(self, number: int, _frame: FrameType | None) -> None:
        if number == HAND_OVER:
            self._signalled = True
            self._loop.hand_over()
            return
        if self._signalled:
            self._loop.stop()
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, signal.SIG_DFL)
        self._signalled = True
        self._loop.drain()
