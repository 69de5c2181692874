"""What the engine hands to an executor: which positions of which sequences a step computes.

sequence   |<------ in the KV cache ------>|<------- token_ids ------->|  not yet scheduled
position   0                             start               start + len(token_ids)
KV blocks  [   b0   ][   b1   ][   b2   ][   b3   ][   b4   ]    block_table = [b0, b1, ...]
                                                     |<- num_logits ->|
                                                          |num_drafts |   guesses
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


class Span(NamedTuple):
    """The part of one sequence that a step computes; a decode is a span of one token.

    A tuple, as every step makes one for each of its sequences."""

    token_ids: Sequence[int]  # ids at positions start .. start + len - 1; never empty
    start: int  # tokens whose keys and values are already in the KV cache
    block_table: Sequence[
        int
    ]  # physical KV blocks, covering at least start + len(token_ids) tokens
    num_logits: int  # how many of the last positions need logits: 0, 1, or more for prompt logprobs
    last: bool = False  # its sequence ends with the next token, whichever that is
    num_drafts: int = 0  # how many of the last token_ids are guesses, which have logits too


@dataclass(frozen=True, slots=True)
class Batch:
    """One step's work. No two spans may write the same KV block; reading shared ones is fine."""

    spans: tuple[Span, ...]

    @property
    def num_tokens(self) -> int:
        return sum(len(span.token_ids) for span in self.spans)

    @property
    def num_logits(self) -> int:
        return sum(span.num_logits for span in self.spans)
