"""Runs batches on several processes, each with its part of every layer.

    loop, sampler ──> rank 0 ──letter──> rank 1, rank 2, ...      one a step
                        |                  |
                        └── the same step, in lock-step: sums' parts go through shared memory, TCP
                            between hosts (hosts.py), NCCL between GPUs, gloo between torch's

Rank 0 is in the engine's process, so that its logits are at hand; the others are processes of their
own (rank.py). By the CPU's kernels the bits are those of one process, on whatever number of ranks.
A rank that ends, or fails, ends the replica: `check` and whatever waits for it raise within a
fraction of a second; within some, where its host is gone without a word.
"""

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import Self

import torch

from scalellm.config import EngineConfig
from scalellm.errors import EngineError
from scalellm.executor.followers import Followers
from scalellm.executor.inputs import StepArrays
from scalellm.executor.rank import order
from scalellm.executor.seat import STOP, Seat, Sizes, write_letter
from scalellm.executor.single import SingleExecutor
from scalellm.kernels.exchange.distributed import LOOPBACK, TorchExchange, open_meeting
from scalellm.loader.load import Division, Progress, check_max_model_len, check_ranks

logger = logging.getLogger(__name__)

_REASON_S = 5.0  # for a rank to say why it could not load
_TOLD_S = 0.5  # for what the operating system says of a rank whose part does not come
_HUNG_S = 1.0  # for a GPU to end what it does, once it has been told to


class TensorParallelExecutor(SingleExecutor):
    """Rank 0 of a replica, and the owner of the others."""

    _followers: Followers
    _failure: str | None = None

    @classmethod
    def load(
        cls,
        config: EngineConfig,
        progress: Progress | None = None,
        hold: Callable[[], None] | None = None,
        followers: Followers | None = None,
    ) -> Self:
        """As SingleExecutor, by `config.tensor_parallel_size` ranks with a share of the threads
        each; `followers`: the others, if they were started before, and ended by this if it raises.
        Raises ConfigError where they cannot share the model, before anything is started, and
        EngineError where a rank cannot load."""
        with ExitStack() as on_failure:
            if followers is not None:
                on_failure.callback(followers.kill)
            found = check_ranks(config)
            if followers is None:
                followers = Followers.of(config)
                on_failure.callback(followers.kill)
            own = cls._load_all(config, progress, found, followers, hold)
            on_failure.pop_all()
        followers.watch(own._lost)
        return own

    @classmethod
    def _load_all(
        cls,
        config: EngineConfig,
        progress: Progress | None,
        found: Division,
        followers: Followers,
        hold: Callable[[], None] | None,
    ) -> Self:
        ranks = config.tensor_parallel_size
        limit = config.max_model_len or check_max_model_len(None, found.model)
        sizes = Sizes.of(config, found.model, limit, found.packed)
        threads = max(1, (config.cpu_threads or torch.get_num_threads()) * config.nnodes // ranks)
        config = replace(config, cpu_threads=threads)
        followers.share(sizes.memory_bytes, sizes.logits_bytes)
        others, files = range(1, ranks), (followers.memory, followers.logits)
        began = time.monotonic()
        links = followers.linked()
        if links is not None and progress is not None:
            progress(f"other hosts: {config.nnodes - 1}", time.monotonic() - began)
        take = partial(
            Seat.take,
            0,
            sizes,
            config.enable_expert_parallel,
            *files,
            hosts=config.nnodes,
            links=links,
        )
        if found.packed:
            own = cls.load_part(config, progress, take(), hold=hold)
            began = time.monotonic()
            followers.load([order(rank, config, sizes, own.num_blocks) for rank in others])
        else:
            # All load at once, as they agree on what they have room for.
            if hold is not None:
                hold()
            host = LOOPBACK if links is None else config.first_host
            store = open_meeting(ranks, host)
            followers.load([order(rank, config, sizes, meeting=store.port) for rank in others])
            followers.wait_done()  # importing torch
            try:
                exchange = TorchExchange(
                    store, 0, ranks, found.device, found.dtype, host, config.nnodes
                )
                own = cls.load_part(config, progress, take(exchange=exchange))
            except RuntimeError:
                # The others may know better why nobody comes.
                with suppress(TimeoutError):
                    followers.wait_done(_REASON_S)
                raise
            began = time.monotonic()
        own._followers = followers
        if own.torch_threads is None:
            own.torch_threads = threads
        followers.wait_done()
        if progress is not None:
            phase = f"ranks: {ranks}, {threads} threads each"
            cores, busy = len(os.sched_getaffinity(0)), threads * ranks // config.nnodes
            if found.device.type == "cpu" and busy > cores:
                phase += f"; slow, as they have {cores} cores to themselves"
            progress(phase, time.monotonic() - began)
        return own

    def check(self) -> None:
        if self._failure is not None:
            raise EngineError(f"the replica has lost a rank: {self._failure}")

    @contextmanager
    def _together(self, kind: int, arrays: StepArrays) -> Iterator[None]:
        self.check()
        seat = self._seat
        if seat is None or len(arrays.token_ids) > seat.most_tokens:
            raise ValueError(
                f"{len(arrays.token_ids)} tokens are more than --max-num-batched-tokens"
            )
        try:
            seat.ranks.send(write_letter(kind, arrays))
            yield
        except ConnectionAbortedError:
            self._followers.wait_told(_TOLD_S)  # which rank, and why
            self._fail("a rank has failed")
        except BaseException as error:
            self._fail(f"rank 0 failed: {type(error).__name__}: {error}")
            raise
        self.check()

    def _fail(self, reason: str) -> None:
        """No step can be computed any more; whoever waits for one is told."""
        if self._failure is None:
            self._failure = reason
        if self._seat is not None:
            self._seat.give_up()

    def _lost(self, reason: str) -> None:
        """A rank has ended. A GPU that waits for it for ever, whatever it is told, cannot be had
        back by the process: that ends then, as it would have to."""
        self._fail(reason)
        if self.device.type == "cuda":
            waiting = threading.Thread(
                target=torch.cuda.synchronize, args=(self.device,), daemon=True
            )
            waiting.start()
            waiting.join(_HUNG_S)
            if waiting.is_alive():
                logger.critical("%s, and the GPU waits for it", reason)
                os._exit(1)

    @property
    def rank_pids(self) -> list[int]:
        """Of the other ranks."""
        return self._followers.pids

    def close(self) -> None:
        self._followers.close(self._stop)
        seat = self._seat
        if seat is not None and seat.shard.exchange is not None:
            seat.shard.exchange.close()
        super().close()

    def _stop(self) -> None:
        if self._seat is not None:
            self._seat.ranks.send(write_letter(STOP, StepArrays.nothing()))
