"""Runs batches on one device."""

import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from scalellm import _core
from scalellm.config import EngineConfig
from scalellm.executor.batch import Batch
from scalellm.executor.dry_step import dry_step_bytes, gpu_kv_budget
from scalellm.executor.expert_use import ExpertTally, ExpertUse, ranks_of
from scalellm.executor.gpu import GpuSteps, gpu_steps
from scalellm.executor.inputs import StepArrays, build_arrays, build_step
from scalellm.executor.recording import (
    NotRecordableError,
    draw_ids,
    greedy_ids,
    logits_of,
    record,
)
from scalellm.executor.seat import FOLLOWED, GREEDY, LOGITS, Seat
from scalellm.kernels.attention import KVCache, PackedKVCache
from scalellm.layers.shard import WHOLE, Shard
from scalellm.loader.device import choose_device, use_device
from scalellm.loader.load import (
    LoadedModel,
    Progress,
    available_device_bytes,
    check_max_model_len,
    check_ranks,
    kv_block_bytes,
    load_model,
)
from scalellm.loader.memory import CPU_KV_SHARE, KVSize, explained, gib, size_kv_cache
from scalellm.models.config import ModelConfig


class SingleExecutor:
    """One model and its KV cache. Not thread-safe: one loop owns it."""

    def __init__(
        self,
        loaded: LoadedModel,
        cache: KVCache | PackedKVCache,
        max_model_len: int,
        plan: _core.CpuPlan | None = None,
        gpu: GpuSteps | None = None,
        seat: Seat | None = None,
        tally: ExpertTally | None = None,
    ) -> None:
        """`plan`, or on a GPU `gpu`: runs a step in place of the model's Python; it points into
        both. `seat`: among the ranks of a replica, of which this is one. `tally`: what counts
        experts, where `plan` does not do so itself."""
        self.model_config: ModelConfig = loaded.config
        self.device = loaded.device
        self.dtype = loaded.dtype
        self.weight_bytes = loaded.weight_bytes
        self.quantization = loaded.quantization
        self.kv_cache_dtype = loaded.kv_cache_dtype
        self.max_model_len = max_model_len
        self.last_forward_ms: Mapping[str, float] = {}
        self._model = loaded.model
        self._geometry = loaded.geometry
        self._cache = cache
        self._plan = plan
        self._gpu = gpu
        self._seat = seat
        self._tally = tally
        self._expert_ranks = ranks_of(loaded)
        self._plan_use: ExpertUse | None = None
        self._logits = torch.empty(0, loaded.config.vocab_size, dtype=torch.float32)
        if seat is not None and seat.logits is not None:
            self._logits = seat.logits
        # A plan has threads of its own; torch's would only get in their way.
        self.torch_threads: int | None = None if plan is None else 1

    @classmethod
    def load(
        cls,
        config: EngineConfig,
        progress: Progress | None = None,
        hold: Callable[[], None] | None = None,
    ) -> Self:
        """Load `config.model_path` and take memory for its KV cache.

        `progress(phase, seconds)` is called as each phase ends, `hold` as `load_executor` says.
        Raises ModelError, ConfigError.
        """
        return cls.load_part(config, progress, hold=hold)

    @classmethod
    def load_part(
        cls,
        config: EngineConfig,
        progress: Progress | None = None,
        seat: Seat | None = None,
        num_blocks: int | None = None,
        hold: Callable[[], None] | None = None,
    ) -> Self:
        """As `load`, what the rank of `seat` has of the model, with as many blocks as rank 0 has.

        Loading has a thread of its own, whose OpenMP threads end with it. Left alive beside those
        of the thread that computes steps, they would be more than the cores, and libgomp then
        puts threads to sleep between any two operations: steps took 1.6 times as long.
        """
        with ThreadPoolExecutor(1, "scalellm-load") as thread:
            try:
                return thread.submit(cls._load, config, progress, seat, num_blocks, hold).result()
            except torch.OutOfMemoryError as error:
                raise explained(error, config) from None

    @classmethod
    def _load(
        cls,
        config: EngineConfig,
        progress: Progress | None,
        seat: Seat | None,
        num_blocks: int | None,
        hold: Callable[[], None] | None,
    ) -> Self:
        report = progress or (lambda _phase, _seconds: None)
        if config.cpu_threads is not None:
            torch.set_num_threads(config.cpu_threads)
        _core.cpu_start(torch.get_num_threads(), config.compute_nice)
        shard = WHOLE if seat is None else seat.shard
        use_device(_device(config, shard))
        shares_weights = hold is not None and _maps_weights(config)
        if hold is not None and not shares_weights:
            hold()
        # Rank 0 has seen to it that all of the model fits; what is held has others' memory to come.
        known_to_fit = shard.rank > 0 or shares_weights
        loaded = load_model(config, report, sys.maxsize if known_to_fit else None, shard)
        if hold is not None and shares_weights:
            hold()
        started = time.monotonic()
        size, cache = _allocate(config, loaded, num_blocks)
        tokens = size.num_blocks * config.block_size
        held = gib(size.num_blocks * _block_bytes(config, loaded) * shard.ranks)
        phase = f"KV cache: {held}, {size.num_blocks} blocks, {tokens} tokens"
        limit = config.max_model_len or check_max_model_len(None, loaded.config)
        if size.max_model_len < limit:
            phase += f"; max_model_len {size.max_model_len}, as {limit} needs more memory"
        report(phase, time.monotonic() - started)
        plan = _record(config, loaded, cache, report, None if seat is None else seat.ranks)
        tally = ExpertTally.of(loaded) if plan is None else None
        gpu: GpuSteps | None = None
        if isinstance(cache, KVCache):
            gpu = gpu_steps(config, loaded, cache, None if tally is None else tally.counts)
        return cls(loaded, cache, size.max_model_len, plan, gpu, seat, tally)

    @property
    def block_size(self) -> int:
        return self._cache.block_size

    @property
    def num_blocks(self) -> int:
        return self._cache.num_blocks

    @property
    def vocab_size(self) -> int:
        return self.model_config.vocab_size

    def forward(self, batch: Batch) -> Tensor:
        """Compute a batch of at least one span and store its keys and values.

        Returns logits fp32 [sum of num_logits, vocab_size] on `device`, in span order, positions
        ascending; the next call may write over them. Raises ValueError for a batch that
        contradicts itself.
        """
        began = time.perf_counter()
        arrays = self._arrays(batch)
        with self._together(LOGITS, arrays):
            return self.logits_of(arrays, began)

    def logits_of(self, arrays: StepArrays, began: float | None = None) -> Tensor:
        """As `forward`, of a batch's arrays; on a replica's other ranks, their columns of it.

        `began`: when making the arrays did."""
        began = time.perf_counter() if began is None else began
        if self._gpu is not None:
            self.last_forward_ms = {}
            with torch.inference_mode():
                logits = self._gpu.forward(arrays)
                self._look()
                return logits
        if self._plan is None:
            with torch.inference_mode():
                token_ids, step = build_step(
                    arrays, self._cache, self._geometry, self.dtype, self.device
                )
                if self._tally is not None:
                    step = replace(step, tally=self._tally.counts)
                self.last_forward_ms = {"prepare": (time.perf_counter() - began) * 1e3}
                logits = self._model.forward(token_ids, step)
                self._look()
                return logits
        logits = self._room(len(arrays.logit_rows))
        prepare_ms = (time.perf_counter() - began) * 1e3
        logits_of(self._plan, arrays, logits)
        if self._seat is not None:
            self._seat.gather(len(logits))
        self._look()
        self.last_forward_ms = {"prepare": prepare_ms, **self._plan.times_ms()}
        return logits

    def greedy(self, batch: Batch) -> list[int | None] | None:
        """As `forward`, to the ids of the largest logits, the lowest on ties: None for a row whose
        largest logit is not finite.

        None, and nothing is computed, where logits would have to be written for it.
        """
        if self._plan is None and self._gpu is None:
            return None
        began = time.perf_counter()
        arrays = self._arrays(batch)
        followed = not any(span.last for span in batch.spans)
        with self._together(FOLLOWED if followed else GREEDY, arrays):
            return self.greedy_of(arrays, began, followed)

    def greedy_of(
        self, arrays: StepArrays, began: float | None = None, followed: bool = False
    ) -> list[int | None] | None:
        """As `greedy`, of a batch's arrays; the same on all ranks of a replica. `followed`: no
        sequence ends with these ids."""
        if self._gpu is not None:
            self.last_forward_ms = {}
            with torch.inference_mode():
                ids = self._gpu.greedy(arrays, followed)
                self._look()
                return ids
        if self._plan is None:
            return None
        began = time.perf_counter() if began is None else began
        prepare_ms = (time.perf_counter() - began) * 1e3
        ids = greedy_ids(self._plan, arrays)
        self._look()
        self.last_forward_ms = {"prepare": prepare_ms, **self._plan.times_ms()}
        return ids

    def draw(self, batch: Batch, draws: npt.NDArray[np.void]) -> list[int | None] | None:
        """As `forward`, to an id of each row as `draws` [rows] of
        `scalellm.kernels.sampling.DRAW` say: of temperature 0 or with a top_k of at most 64. None
        for a row whose logits are not finite.

        None, and nothing is computed, where logits would have to be written for it.
        """
        if self._plan is None or self._seat is not None:
            return None
        began = time.perf_counter()
        arrays = self._arrays(batch)
        prepare_ms = (time.perf_counter() - began) * 1e3
        ids = draw_ids(self._plan, arrays, draws)
        self._look()
        self.last_forward_ms = {"prepare": prepare_ms, **self._plan.times_ms()}
        return ids

    def _look(self) -> None:
        """Keep how experts were used up to now, on the thread that computes."""
        if self._tally is not None:
            self._tally.look()
        elif self._plan is not None and self._expert_ranks is not None:
            self._plan_use = (*self._plan.expert_use(), self._expert_ranks)

    def expert_use(self) -> ExpertUse | None:
        """How evenly experts were used, at the last look; None for a model without experts."""
        return self._plan_use if self._tally is None else self._tally.seen

    def check(self) -> None:
        """Raises EngineError once steps can no longer be computed, whatever they are."""

    def _together(self, _kind: int, _arrays: StepArrays) -> AbstractContextManager[None]:
        """Have whoever else computes this step do so."""
        return nullcontext()

    def _arrays(self, batch: Batch) -> StepArrays:
        return build_arrays(batch, self._cache.block_size, self._cache.num_blocks)

    def _room(self, rows: int) -> Tensor:
        """Logits [rows, vocab_size] in memory that is kept: fresh pages cost more than writing."""
        if len(self._logits) < rows:
            self._logits = torch.empty(rows, self.vocab_size, dtype=torch.float32)
        return self._logits[:rows]

    @property
    def recorded(self) -> bool:
        """Whether steps run as a recorded plan."""
        return self._plan is not None

    def close(self) -> None:
        """Give the memory back; the executor is of no use afterwards. May be called again."""
        for name in ("_plan", "_gpu", "_model", "_cache", "_logits", "_seat"):
            self.__dict__.pop(name, None)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def _maps_weights(config: EngineConfig) -> bool:
    """Whether they are in a file that all replicas map, and not in memory of its own."""
    return config.packed_cache != "none" and check_ranks(config).packed


def _device(config: EngineConfig, shard: Shard) -> torch.device:
    return choose_device(config.device, shard.rank_here, shard.ranks_here, config.first_device)


def _block_bytes(config: EngineConfig, loaded: LoadedModel) -> int:
    kv = loaded.kv_cache_dtype
    return kv_block_bytes(kv, loaded.geometry, config.block_size, loaded.packed)


def _allocate(
    config: EngineConfig, loaded: LoadedModel, num_blocks: int | None
) -> tuple[KVSize, KVCache | PackedKVCache]:
    model_limit = check_max_model_len(config.max_model_len, loaded.config)
    if num_blocks is None:
        size = size_kv_cache(
            block_bytes=_block_bytes(config, loaded) * loaded.shard.ranks_here,
            block_size=config.block_size,
            max_model_len=config.max_model_len,
            model_limit=model_limit,
            max_num_seqs=config.max_num_seqs,
            kv_cache_memory_bytes=config.kv_cache_memory_bytes,
            budget_bytes=_agreed_kv_budget(config, loaded),
        )
    else:
        size = KVSize(num_blocks, model_limit)
    if loaded.packed:
        return size, PackedKVCache.allocate(
            loaded.geometry, size.num_blocks, config.block_size, loaded.kv_cache_dtype
        )
    return size, KVCache.allocate(
        loaded.geometry, size.num_blocks, config.block_size, loaded.kv_dtype, loaded.device
    )


def _record(
    config: EngineConfig,
    loaded: LoadedModel,
    cache: KVCache | PackedKVCache,
    report: Progress,
    ranks: _core.Ranks | None,
) -> _core.CpuPlan | None:
    """The recorded step of a packed model, unless it is to run, or can only run, eagerly."""
    if config.enforce_eager or not isinstance(cache, PackedKVCache):
        return None
    started = time.monotonic()
    try:
        plan = record(loaded.model, cache, ranks)
    except NotRecordableError as reason:
        report(f"step: eager, as {reason}", time.monotonic() - started)
        return None
    report(f"step: recorded, {len(plan)} operations", time.monotonic() - started)
    return plan


def _agreed_kv_budget(config: EngineConfig, loaded: LoadedModel) -> int:
    """Bytes for the KV cache of all ranks together, when no size was given; the same on all."""
    exchange = loaded.shard.exchange
    if exchange is None:
        return _kv_budget(config, loaded)
    exchange.least(0)  # until all have loaded
    budget = exchange.least(_kv_budget(config, loaded))
    return budget * loaded.shard.ranks_here if loaded.device.type == "cuda" else budget


def _kv_budget(config: EngineConfig, loaded: LoadedModel) -> int:
    """Bytes for the KV cache, on a GPU of this rank's part of it."""
    if loaded.device.type == "cpu":
        # Mapped weights count as available, and are read in every step; those of other ranks are
        # not there yet.
        ranks = loaded.shard.ranks_here
        coming = loaded.mapped_bytes or loaded.weight_bytes * (ranks - 1) // ranks
        if loaded.shard.exchange is not None:
            coming = 0
        available = available_device_bytes(loaded.device) - coming
        return max(0, int(available * CPU_KV_SHARE))
    step_bytes = dry_step_bytes(config, loaded)
    free, total = torch.cuda.mem_get_info(loaded.device)
    own = torch.cuda.memory_reserved(loaded.device)
    return gpu_kv_budget(free, total, own, config.memory_share, step_bytes)
