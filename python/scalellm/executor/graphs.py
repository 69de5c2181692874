"""Decode steps recorded once and replayed: CUDA graphs over a ladder of batch sizes.

    arrays of the host --one copy--> fixed inputs --replay--> logits, ids --one copy--> ids
                                        ^                      |
                                        '--- the next step's --'   without the host

A step of n sequences takes the next size of the ladder; what fills it up are spans of no tokens,
which store and attend to nothing. A size is recorded when it is first needed, so that starting
takes no longer. Tables are as wide as the longest sequence, rounded up to a power of two.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from scalellm.executor.inputs import StepArrays
from scalellm.kernels.attention import KVCache, PagedStep, plan_pages
from scalellm.layers.step import Step
from scalellm.models.decoder import CausalLM

LADDER = (1, 2, 4, 8, 12, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256)
_LEAST_WIDTH = 16  # blocks of a table

# Takes work on the device and gives what repeats it.
Record = Callable[[Callable[[], None]], Callable[[], None]]


class Draw(Protocol):
    def __call__(self, scores: Tensor) -> Tensor:
        """[rows, vocab] float32 to ids int32 [rows], -1 for none."""


class CudaGraphs:
    """Records CUDA graphs that share one pool of memory: only one of them runs at a time."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._beside = torch.cuda.Stream()
        self._graphs: list[torch.cuda.CUDAGraph] = []

    def __call__(self, work: Callable[[], None]) -> Callable[[], None]:
        beside = self._beside
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            work()  # kernels are compiled and loaded before anything is recorded
        torch.cuda.current_stream().wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        # What other threads ask of the driver meanwhile, NCCL's watchdog above all, is their own.
        mode = "thread_local"
        with torch.cuda.graph(graph, pool=self._pool, stream=beside, capture_error_mode=mode):
            work()
        self._graphs.append(graph)
        return graph.replay


def size_for(count: int, most: int) -> int | None:
    """The size of the ladder for `count` sequences, None where there is none up to `most`."""
    return next((size for size in LADDER if count <= size <= max(most, 1)), None)


@dataclass(frozen=True, slots=True)
class Launched:
    """A decode step that is on its way."""

    logits: Tensor  # [n, vocab_size]; the next replay writes over them
    ids: Tensor  # int32 [n], on the device

    def start_copy(self) -> "Copied":
        """Copy the ids to the host while the device goes on."""
        host = torch.empty(self.ids.shape, dtype=torch.int32, pin_memory=self.ids.is_cuda)
        host.copy_(self.ids, non_blocking=True)
        arrived: torch.cuda.Event | None = None
        if self.ids.is_cuda:
            arrived = torch.cuda.Event()
            arrived.record()
        return Copied(host, arrived)


@dataclass(frozen=True, slots=True)
class Copied:
    host: Tensor
    arrived: torch.cuda.Event | None

    def wait(self) -> list[int | None]:
        """The ids, None where there is none to draw."""
        if self.arrived is not None:
            self.arrived.synchronize()
        ids: list[int] = self.host.tolist()
        return [None if token_id < 0 else token_id for token_id in ids]


class Recorded:
    """One recorded step: `size` sequences with tables of `width` blocks."""

    def __init__(
        self,
        size: int,
        width: int,
        model: CausalLM,
        cache: KVCache,
        draw: Draw,
        record: Record,
        tally: Tensor | None,
    ) -> None:
        self.size, self.width = size, width
        device = cache.layers[0].keys.device
        # token ids | positions | slots | spans | tables, each at a multiple of 16 bytes, as kernels
        # are compiled anew for arrays that are not
        self._sizes = [size, size, size, 3 * size, width * size]
        self._lengths = [-(-numbers // 4) * 4 for numbers in self._sizes]
        self._inputs = torch.zeros(sum(self._lengths), dtype=torch.int32, device=device)
        ids, positions, slots, spans, tables = self._parts(self._inputs)
        self.token_ids = ids
        slots.fill_(-1)
        rows = torch.arange(size, dtype=torch.int32, device=device)
        paged = PagedStep(
            spans.view(size, 3), tables.view(size, width), rows, rows.new_empty(0, 2), slots
        )
        step = Step(positions, cache, paged, rows, tally)
        self.logits: Tensor | None = None
        self.drawn = torch.empty(size, dtype=torch.int32, device=device)

        def work() -> None:
            self.logits = model.forward(ids, step)
            self.drawn.copy_(draw(self.logits))

        self._replay = record(work)

    def launch(self, arrays: StepArrays, block_size: int, previous: Tensor | None) -> Launched:
        """Start a step; its token ids are `previous` [n] of the device, if given."""
        count = len(arrays.spans)
        held = torch.empty(len(self._inputs), dtype=torch.int32, pin_memory=self.drawn.is_cuda)
        ids, positions, slots, spans, tables = (part.numpy() for part in self._parts(held))
        plan = plan_pages(arrays.spans, arrays.tables, block_size)
        for written, given, rest in (
            (ids, arrays.token_ids, 0),
            (positions, arrays.positions, 0),
            (slots, plan.slots, -1),
            (spans, plan.spans.reshape(-1), 0),
        ):
            written[: len(given)] = given
            written[len(given) :] = rest
        table = tables.reshape(self.size, self.width)
        table[:count, : plan.tables.shape[1]] = plan.tables
        first = 0 if previous is None else self._lengths[0]
        self._inputs[first:].copy_(held[first:], non_blocking=True)
        if previous is not None:
            # A row without an id has -1, which is no row of the embedding.
            torch.clamp(previous, min=0, out=self.token_ids[:count])
        self._replay()
        if self.logits is None:
            raise RuntimeError("a recorded step has not run")
        return Launched(self.logits[:count], self.drawn[:count])

    def _parts(self, inputs: Tensor) -> list[Tensor]:
        parts = inputs.split(self._lengths)
        return [part[:size] for part, size in zip(parts, self._sizes, strict=True)]


class DecodeGraphs:
    """Recorded steps by size and width."""

    def __init__(
        self,
        model: CausalLM,
        cache: KVCache,
        most: int,
        draw: Draw,
        record: Record,
        tally: Tensor | None = None,
    ) -> None:
        """`most`: sequences of the largest step; `tally`: as of Step."""
        self._model, self._cache = model, cache
        self._most = max(size for size in LADDER if size <= max(most, 1))
        self._draw, self._record, self._tally = draw, record, tally
        self._recorded: dict[tuple[int, int], Recorded] = {}

    def __len__(self) -> int:
        return len(self._recorded)

    def fits(self, arrays: StepArrays) -> bool:
        """Whether the step is one that is recorded: decodes alone, all of which want logits."""
        count = len(arrays.spans)
        return (
            count == len(arrays.token_ids) == len(arrays.logit_rows)
            and size_for(count, self._most) is not None
        )

    def launch(self, arrays: StepArrays, previous: Tensor | None = None) -> Launched:
        """Start a step that `fits`."""
        size = size_for(len(arrays.spans), self._most)
        if size is None:
            raise ValueError(f"no recorded step has {len(arrays.spans)} sequences")
        ends = np.append(arrays.spans[1:, 3], len(arrays.tables))
        longest = int((ends - arrays.spans[:, 3]).max())
        width = max(_LEAST_WIDTH, 1 << (longest - 1).bit_length())
        recorded = self._recorded.get((size, width))
        if recorded is None:
            recorded = Recorded(
                size, width, self._model, self._cache, self._draw, self._record, self._tally
            )
            self._recorded[size, width] = recorded
        return recorded.launch(arrays, self._cache.block_size, previous)
