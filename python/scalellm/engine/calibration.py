"""Batches of a given shape, to time steps on the idle engine."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from scalellm.engine.kv_cache import KVCache
from scalellm.executor.batch import Batch, Span

REPEATS = 3


@dataclass(frozen=True, slots=True)
class Shape:
    """So many decodes with so much context, beside so many tokens of a new prompt."""

    decode_seqs: int
    context_tokens: int
    prefill_tokens: int


def build_batch(shape: Shape, kv: KVCache) -> tuple[Batch, list[int]] | None:
    """The batch and the blocks taken for it, which the caller frees; None if they do not suffice.

    Every sequence writes a block of its own. What decodes read is spread over as many blocks as
    there are, because reading the same few would only measure the CPU's caches."""
    size = kv.block_size
    read_blocks = shape.context_tokens // size
    prefill_blocks = -(-shape.prefill_tokens // size)
    written = shape.decode_seqs + prefill_blocks
    if written + read_blocks > kv.num_free or shape.decode_seqs + shape.prefill_tokens == 0:
        return None
    spread = min(kv.num_free - written, shape.decode_seqs * read_blocks)
    blocks = kv.allocate(written + spread)
    read = blocks[written:]
    spans: list[Span] = []
    for i in range(shape.decode_seqs):
        table = [read[(i * read_blocks + j) % len(read)] for j in range(read_blocks)]
        spans.append(Span((0,), shape.context_tokens, (*table, blocks[i]), 1))
    if shape.prefill_tokens:
        table = blocks[shape.decode_seqs : written]
        spans.append(Span((0,) * shape.prefill_tokens, 0, tuple(table), 1))
    return Batch(tuple(spans)), blocks


def write_blocks(blocks: Sequence[int], most: int) -> Iterator[Batch]:
    """Steps of at most `most` tokens that write one into each block.

    Memory that was never written is one page of zeros, which the caches hold."""
    for first in range(0, len(blocks), most):
        written = blocks[first : first + most]
        yield Batch(tuple(Span((0,), 0, (block,), 0) for block in written))
