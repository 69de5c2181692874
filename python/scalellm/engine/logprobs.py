"""Log-probabilities as the API reports them: of the model's own distribution.

They are log-softmax of the raw logits, before temperature, penalties, bias and truncation, as
OpenAI and vLLM give them.
"""

from collections.abc import Sequence

import torch

# token id, logprob, rank (1 is the most likely), ids and logprobs of the most likely tokens
TokenLogprobs = tuple[int, float, int, list[int], list[float]]

LEAST = -9999.0  # stands for minus infinity, which JSON cannot carry
_CPU_LOGITS_AT_ONCE = 1 << 20  # 4 MB stay in a core's cache from one operation to the next


def token_logprobs(
    logits: torch.Tensor, token_ids: Sequence[int], alternatives: Sequence[int]
) -> list[TokenLogprobs]:
    """One entry for each row of `logits` [rows, vocab]: of `token_ids[row]` and the most likely
    `alternatives[row]` tokens."""
    total, vocab = logits.shape
    stride = max(1, _CPU_LOGITS_AT_ONCE // vocab) if logits.device.type == "cpu" else total
    found: list[TokenLogprobs] = []
    for first in range(0, total, stride):
        part = slice(first, first + stride)
        found += _of_part(logits[part], token_ids[part], alternatives[part])
    return found


def _of_part(
    logits: torch.Tensor, token_ids: Sequence[int], alternatives: Sequence[int]
) -> list[TokenLogprobs]:
    chosen = torch.tensor(token_ids, device=logits.device).unsqueeze(1)
    normaliser = logits.logsumexp(-1, keepdim=True)
    chosen_logits = logits.gather(1, chosen)
    ranks = (logits > chosen_logits).sum(-1) + 1
    values = (chosen_logits - normaliser).clamp_(min=LEAST)
    most = min(max(alternatives), logits.shape[1])
    top_values, top_ids = logits.topk(most, dim=-1)
    top_values = (top_values - normaliser).clamp_(min=LEAST)
    return [
        (token_id, value, rank, ids[:count], logprobs[:count])
        for token_id, value, rank, ids, logprobs, count in zip(
            token_ids,
            values.squeeze(1).tolist(),
            ranks.tolist(),
            top_ids.tolist(),
            top_values.tolist(),
            alternatives,
            strict=True,
        )
    ]
