"""Runs batches on several processes of one host, each with its part of every layer.

    loop, sampler ──> rank 0 ──letter──> rank 1, rank 2, ...      one a step
                        |                  |
                        └── the same plan, in lock-step: sums' parts go through shared memory

Rank 0 is in the engine's process, so that its logits are at hand; the others are processes of their
own (rank.py). The bits are those of one process, on whatever number of ranks. A rank that ends, or
fails, ends the replica: `check` and whatever waits for it raise within a fraction of a second.
"""

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Self

import torch

from scalellm.config import EngineConfig
from scalellm.errors import EngineError
from scalellm.executor.followers import Followers
from scalellm.executor.inputs import StepArrays
from scalellm.executor.rank import order
from scalellm.executor.seat import STOP, Seat, Sizes, write_letter
from scalellm.executor.single import SingleExecutor
from scalellm.loader.load import Progress, check_max_model_len, check_ranks
from scalellm.models.config import ModelConfig


class TensorParallelExecutor(SingleExecutor):
    """Rank 0 of a replica, and the owner of the others."""

    _followers: Followers
    _failure: str | None = None

    @classmethod
    def load(
        cls,
        config: EngineConfig,
        progress: Progress | None = None,
        followers: Followers | None = None,
    ) -> Self:
        """As SingleExecutor, by `config.tensor_parallel_size` ranks with a share of the threads
        each; `followers`: the others, if they were started before, and ended by this if it raises.
        Raises ConfigError where they cannot share the model, before anything is started, and
        EngineError where a rank cannot load."""
        with ExitStack() as on_failure:
            if followers is not None:
                on_failure.callback(followers.kill)
            model = check_ranks(config)
            if followers is None:
                followers = Followers(config.tensor_parallel_size)
                on_failure.callback(followers.kill)
            own = cls._load_all(config, progress, model, followers)
            on_failure.pop_all()
        followers.watch(own._fail)
        return own

    @classmethod
    def _load_all(
        cls,
        config: EngineConfig,
        progress: Progress | None,
        model: ModelConfig,
        followers: Followers,
    ) -> Self:
        ranks = config.tensor_parallel_size
        limit = config.max_model_len or check_max_model_len(None, model)
        sizes = Sizes.of(config, model, limit)
        threads = max(1, (config.cpu_threads or torch.get_num_threads()) // ranks)
        config = replace(config, cpu_threads=threads)
        followers.share(sizes.memory_bytes, sizes.logits_bytes)
        parallel = config.enable_expert_parallel
        seat = Seat.take(0, sizes, parallel, followers.memory, followers.logits)
        own = cls.load_part(config, progress, seat)
        own._followers = followers
        if own.torch_threads is None:
            own.torch_threads = threads
        began = time.monotonic()
        followers.load([order(rank, config, sizes, own.num_blocks) for rank in range(1, ranks)])
        followers.wait_loaded()
        if progress is not None:
            progress(f"ranks: {ranks}, {threads} threads each", time.monotonic() - began)
        return own

    def check(self) -> None:
        if self._failure is not None:
            raise EngineError(f"the replica has lost a rank: {self._failure}")

    @contextmanager
    def _together(self, kind: int, arrays: StepArrays) -> Iterator[None]:
        self.check()
        seat = self._seat
        if seat is None or len(arrays.token_ids) > len(seat.logits):
            raise ValueError(
                f"{len(arrays.token_ids)} tokens are more than --max-num-batched-tokens"
            )
        try:
            seat.ranks.send(write_letter(kind, arrays))
            yield
        except ConnectionAbortedError:
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
            self._seat.ranks.give_up()

    @property
    def rank_pids(self) -> list[int]:
        """Of the other ranks."""
        return self._followers.pids

    def close(self) -> None:
        self._followers.close(self._stop)
        super().close()

    def _stop(self) -> None:
        if self._seat is not None:
            self._seat.ranks.send(write_letter(STOP, StepArrays.nothing()))
