"""What the ranks of one replica share, and what rank 0 tells the others.

    memory    crates/cpu-kernels/src/ranks: letters and slots
    logits    [rows, vocab_size] fp32, of which each rank writes its columns
    exchange  in place of slots and logits where torch or a GPU's kernels compute

Both are files without a name, as large as the largest step could need; pages exist once used. Ranks
of several hosts have files of their own, and TCP in place of what they share.

A letter is the step, in bytes:

    kind, tokens, logit rows, spans, blocks      int64 each
    token ids, positions, logit rows, spans      int64
    block tables                                 int32
"""

import mmap
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from scalellm import _core
from scalellm.config import EngineConfig
from scalellm.executor.inputs import StepArrays
from scalellm.kernels.exchange import Exchange
from scalellm.layers.shard import Shard
from scalellm.models.config import ModelConfig

# What a letter asks for; FOLLOWED is GREEDY, which the next step most likely follows.
LOGITS, GREEDY, FOLLOWED, STOP = range(4)
_HEADER_NUMBERS = 5


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of what ranks share, and the link that they are to share it by (EngineConfig.link_mb_s)."""

    ranks: int
    letter_bytes: int
    slot_bytes: int
    tokens: int  # of a step, at most
    logit_rows: int
    vocab_size: int
    link_mb_s: int

    @classmethod
    def of(
        cls, config: EngineConfig, model: ModelConfig, max_model_len: int, packed: bool
    ) -> "Sizes":
        """Enough for every step that `config` allows; `packed`: by the CPU's kernels."""
        ranks, tokens = config.tensor_parallel_size, config.max_num_batched_tokens
        spans = min(config.max_num_seqs, tokens)
        blocks = spans * (max_model_len // config.block_size + 1)
        bounds = Shard(ranks=ranks).id_bounds(model.vocab_size)
        ids = max(end - first for first, end in pairwise(bounds))
        numbers = model.hidden_size * (1 if model.moe is None else model.moe.experts_per_token)
        return cls(
            ranks=ranks,
            letter_bytes=8 * (_HEADER_NUMBERS + 3 * tokens + 4 * spans) + 4 * blocks,
            slot_bytes=4 * tokens * max(numbers, ids) if packed else 0,
            tokens=tokens,
            logit_rows=tokens if packed else 0,
            vocab_size=model.vocab_size,
            link_mb_s=config.link_mb_s,
        )

    @property
    def memory_bytes(self) -> int:
        return _core.Ranks.bytes_for(self.ranks, self.letter_bytes, self.slot_bytes)

    @property
    def logits_bytes(self) -> int:
        return 4 * self.logit_rows * self.vocab_size


@dataclass(frozen=True, slots=True)
class Seat:
    """A rank's place among the others."""

    shard: Shard
    ranks: _core.Ranks
    most_tokens: int  # of a step
    logits: Tensor | None  # [logit_rows, vocab_size] fp32

    @classmethod
    def take(
        cls,
        rank: int,
        sizes: Sizes,
        expert_parallel: bool,
        memory: int,
        logits: int,
        exchange: Exchange | None = None,
        hosts: int = 1,
        links: Sequence[socket.socket | None] | None = None,
    ) -> "Seat":
        """Map the files `memory` and `logits`, which may be closed then. Raises OSError.

        `links`: connections to all ranks, on `hosts`; the files are this rank's alone then."""
        files: list[int] | None = None
        if links is not None:
            files = [-1 if link is None else link.detach() for link in links]
        given = (sizes.ranks, sizes.letter_bytes, sizes.slot_bytes, sizes.link_mb_s)
        ranks = _core.Ranks(memory, rank, *given, files)
        address = ranks.address if exchange is None else 0
        rows: Tensor | None = None
        if sizes.logits_bytes:
            mapped = np.frombuffer(mmap.mmap(logits, sizes.logits_bytes), dtype=np.float32)
            rows = torch.from_numpy(mapped).view(sizes.logit_rows, sizes.vocab_size)
        shard = Shard(rank, sizes.ranks, expert_parallel, address, exchange, hosts)
        return cls(shard, ranks, sizes.tokens, rows)

    def gather(self, rows: int) -> None:
        """Have all columns of so many rows of logits here, of ranks that share no memory."""
        if self.shard.hosts > 1 and self.logits is not None:
            bounds = self.shard.id_bounds(self.logits.shape[1])
            self.ranks.gather(rows, bounds, self.logits.data_ptr())

    def give_up(self) -> None:
        """A rank has ended: nobody waits for it any more. From any thread."""
        self.ranks.give_up()
        if self.shard.exchange is not None:
            self.shard.exchange.give_up()


def write_letter(kind: int, arrays: StepArrays) -> bytes:
    counts = [len(arrays.token_ids), len(arrays.logit_rows), len(arrays.spans), len(arrays.tables)]
    parts: list[npt.NDArray[np.int64] | npt.NDArray[np.int32]] = [
        np.array([kind, *counts], dtype=np.int64),
        arrays.token_ids,
        arrays.positions,
        arrays.logit_rows,
        arrays.spans,
        arrays.tables,
    ]
    return b"".join(part.tobytes() for part in parts)


def read_letter(letter: bytes) -> tuple[int, StepArrays]:
    """What is asked for, and the step."""
    memory = bytearray(letter)
    kind, tokens, rows, spans, blocks = np.frombuffer(memory, np.int64, _HEADER_NUMBERS).tolist()
    numbers = np.frombuffer(memory, np.int64, 2 * tokens + rows + 4 * spans, 8 * _HEADER_NUMBERS)
    token_ids, positions, logit_rows, span_rows = np.split(
        numbers, np.cumsum([tokens, tokens, rows])
    )
    tables = np.frombuffer(memory, np.int32, blocks, len(memory) - 4 * blocks)
    return kind, StepArrays(token_ids, positions, logit_rows, span_rows.reshape(-1, 4), tables)
