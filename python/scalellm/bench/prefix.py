"""Prompts that share beginnings, as content ids of blocks: equal ids are equal text.

request 1   a b c d        a request takes the first blocks of an earlier one,
request 2   a b e          as many as keep the reused share of all tokens at the target
request 3   a b e f g
"""

from collections.abc import Sequence

import numpy as np

# Tokens of one block of the Mooncake trace, whose ids stand for 512 tokens each.
BLOCK_TOKENS = 512
# A request follows one of so many before it: older prefixes are no longer asked for.
_RECENT = 64


def shared_prefixes(
    lengths: Sequence[int], share: float, block_tokens: int, random: np.random.Generator
) -> list[tuple[int, ...]]:
    """Content ids of each prompt's blocks, so that `share` of all tokens repeat a prefix.

    Steered, not drawn: after each request the share over all so far is as near as blocks allow.
    """
    made: list[tuple[int, ...]] = []
    next_id, reused, total = 0, 0, 0
    for tokens in lengths:
        blocks = -(-tokens // block_tokens)
        wanted = max(0.0, share * (total + tokens) - reused) / block_tokens
        common: tuple[int, ...] = ()
        if made and wanted >= 0.5:
            # The last block is the request's own: nobody asks the same twice.
            number = min(round(wanted), blocks - 1)
            recent = made[-_RECENT:]
            enough = [ids for ids in recent if len(ids) > number] or [max(recent, key=len)]
            earlier = enough[int(random.integers(len(enough)))]
            common = earlier[: min(number, len(earlier) - 1)]
        fresh = range(next_id, next_id + blocks - len(common))
        next_id = fresh.stop
        made.append((*common, *fresh))
        reused += len(common) * block_tokens
        total += tokens
    return made


def reused_share(
    prefixes: Sequence[tuple[int, ...]], lengths: Sequence[int], block_tokens: int
) -> float:
    """Share of all tokens that an endless prefix cache would have seen before."""
    seen: set[tuple[int, int]] = set()  # (place in the prompt, id): ids are unique to a prefix
    reused = 0
    for ids, tokens in zip(prefixes, lengths, strict=True):
        common = next((at for at, id in enumerate(ids) if (at, id) not in seen), len(ids))
        reused += min(common * block_tokens, tokens)
        seen.update(enumerate(ids))
    return reused / max(sum(lengths), 1)
