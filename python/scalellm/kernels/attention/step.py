"""Planning one step's attention: which cache rows are written, gathered and masked.

The plan is made once a step, in numpy, and used by every layer. A step mixes two kinds of spans:

    decode    one token       batched: sequences of like length share one gather and one product
    prefill   several tokens  one product each, with a mask where it is not plainly causal

A layer with a sliding window needs fewer blocks, so each distinct window has a plan of its own.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from scalellm.kernels.attention.cache import KVGeometry

Ints = npt.NDArray[np.int64]

# Keys of one gather; few enough for a core's cache to still hold them when the product reads them.
DECODE_CHUNK_TOKENS = 1280


@dataclass(frozen=True, slots=True)
class SpanLayout:
    """One span: rows first_row .. first_row + count - 1 of the batch, positions from start."""

    first_row: int
    start: int
    count: int
    block_table: Ints

    @property
    def end(self) -> int:
        return self.start + self.count


@dataclass(frozen=True, slots=True)
class DecodeChunk:
    """Some sequences of one token each, padded to the longest, S tokens."""

    rows: Tensor  # [n] int64: their rows in the batch
    gather: Tensor  # [n * kv heads * S / block_size] int64: runs by (sequence, head, block)
    bias: Tensor  # [n, 1, 1, S] model's type: 0 where attended to, -inf elsewhere


@dataclass(frozen=True, slots=True)
class PrefillSpan:
    """One sequence's several tokens."""

    first_row: int
    count: int
    gather: Tensor  # [kv heads * blocks] int64: runs of the cache, by (head, block)
    length: int  # gathered tokens that exist; the rest of the last block does not
    mask: Tensor | None  # [count, length] bool, True where attended to; None: plainly causal


@dataclass(frozen=True, slots=True)
class WindowPlan:
    """What the layers of one window gather."""

    decodes: tuple[DecodeChunk, ...]
    prefills: tuple[PrefillSpan, ...]


@dataclass(frozen=True, slots=True)
class AttentionStep:
    """One step's plan."""

    write: Tensor  # [tokens * kv heads] int64: rows of the cache, by (token, head)
    begun: Tensor | None  # int64: blocks begun and not filled, to be cleared before writing
    windows: Mapping[int | None, WindowPlan]
    # Where decodes gather keys and values, [runs, block size * width] of the cache's type. One
    # place for all layers and chunks, so that it stays in the processor's caches.
    scratch: tuple[Tensor, Tensor]


def plan_attention(
    spans: Sequence[SpanLayout],
    geometry: KVGeometry,
    block_size: int,
    dtype: torch.dtype,
    device: torch.device,
    cache_dtype: torch.dtype | None = None,
) -> AttentionStep:
    """Plan a step of at least one span.

    `dtype` is that of queries, keys and values; `cache_dtype` that of the cache, if another.
    """
    heads = np.arange(geometry.num_kv_heads, dtype=np.int64)
    writes, begun = [], []
    for span in spans:
        positions = np.arange(span.start, span.end, dtype=np.int64)
        blocks = span.block_table[positions // block_size]
        runs = blocks[:, None] * geometry.num_kv_heads + heads
        writes.append((runs * block_size + (positions % block_size)[:, None]).reshape(-1))
        last = span.end // block_size
        if span.end % block_size and last * block_size >= span.start:
            begun.append(int(span.block_table[last]))
    windows = {
        window: WindowPlan(
            tuple(_decodes(spans, window, heads, block_size, dtype, device)),
            tuple(_prefills(spans, window, heads, block_size, device)),
        )
        for window in dict.fromkeys(geometry.windows)
    }
    most_runs = max(
        (len(chunk.gather) for plan in windows.values() for chunk in plan.decodes), default=0
    )
    widths = (geometry.key_dim, geometry.value_dim)
    keys, values = (
        torch.empty(most_runs, block_size * width, dtype=cache_dtype or dtype, device=device)
        for width in widths
    )
    return AttentionStep(
        write=_tensor(np.concatenate(writes), device),
        begun=_tensor(np.array(begun, dtype=np.int64), device) if begun else None,
        windows=windows,
        scratch=(keys, values),
    )


def _decodes(
    spans: Sequence[SpanLayout],
    window: int | None,
    heads: Ints,
    block_size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Iterable[DecodeChunk]:
    spans = [span for span in spans if span.count == 1]
    if not spans:
        return
    firsts = [_first_block(span, window, block_size) for span in spans]
    counts = [-(-span.end // block_size) - first for span, first in zip(spans, firsts, strict=True)]
    order = sorted(range(len(spans)), key=counts.__getitem__)
    for chunk in _chunks(order, counts, max(1, DECODE_CHUNK_TOKENS // block_size)):
        width = counts[chunk[-1]]
        table = np.empty((len(chunk), width), dtype=np.int64)
        for row, index in zip(table, chunk, strict=True):
            blocks = spans[index].block_table[firsts[index] : firsts[index] + counts[index]]
            row[: len(blocks)] = blocks
            row[len(blocks) :] = blocks[-1]
        end = np.array([spans[i].end - firsts[i] * block_size for i in chunk], dtype=np.int64)
        position = np.arange(width * block_size, dtype=np.int64)
        hidden = position >= end[:, None]
        if window is not None:
            hidden |= position < end[:, None] - window
        bias = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(
            torch.from_numpy(hidden), float("-inf")
        )
        yield DecodeChunk(
            rows=_tensor(np.array([spans[i].first_row for i in chunk], dtype=np.int64), device),
            gather=_tensor(_runs(table, heads), device),
            bias=bias[:, None, None, :].to(device),
        )


def _chunks(order: Sequence[int], counts: Sequence[int], limit: int) -> Iterable[list[int]]:
    """Cut sequences, sorted by blocks, into chunks of at most `limit` blocks after padding."""
    chunk: list[int] = []
    for index in order:
        if chunk and (len(chunk) + 1) * counts[index] > limit:
            yield chunk
            chunk = []
        chunk.append(index)
    if chunk:
        yield chunk


def _prefills(
    spans: Sequence[SpanLayout],
    window: int | None,
    heads: Ints,
    block_size: int,
    device: torch.device,
) -> Iterable[PrefillSpan]:
    for span in spans:
        if span.count == 1:
            continue
        first = _first_block(span, window, block_size)
        table = span.block_table[first : -(-span.end // block_size)]
        length = span.end - first * block_size
        mask: Tensor | None = None
        if span.start or (window is not None and window < span.end):
            query = torch.arange(span.start, span.end, device=device)[:, None]
            key = torch.arange(first * block_size, span.end, device=device)
            mask = key <= query
            if window is not None:
                mask &= key > query - window
        yield PrefillSpan(
            first_row=span.first_row,
            count=span.count,
            gather=_tensor(_runs(table[None], heads), device),
            length=length,
            mask=mask,
        )


def _first_block(span: SpanLayout, window: int | None, block_size: int) -> int:
    """First block that the span's earliest query can see."""
    return 0 if window is None else max(0, span.start + 1 - window) // block_size


def _runs(table: Ints, heads: Ints) -> Ints:
    """Block tables [n, blocks] to the cache's runs, ordered by (sequence, head, block)."""
    return (table[:, None, :] * len(heads) + heads[:, None]).reshape(-1)


def _tensor(array: Ints, device: torch.device) -> Tensor:
    return torch.from_numpy(array).to(device)
