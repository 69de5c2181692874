"""Log-probabilities as the API reports them: of the model's own distribution.

They are log-softmax of the raw logits, before temperature, penalties, bias and truncation, as
OpenAI and vLLM give them.
"""

from collections.abc import Sequence

import torch

from scalellm.kernels import sampling

# token id, logprob, rank (1 is the most likely), ids and logprobs of the most likely tokens
TokenLogprobs = tuple[int, float, int, list[int], list[float]]

LEAST = -9999.0  # stands for minus infinity, which JSON cannot carry


def token_logprobs(
    logits: torch.Tensor, token_ids: Sequence[int], alternatives: Sequence[int]
) -> list[TokenLogprobs]:
    """One entry for each row of `logits` [rows, vocab]: of `token_ids[row]` and the most likely
    `alternatives[row]` tokens."""
    if logits.device.type == "cpu":
        return sampling.token_logprobs(logits, token_ids, alternatives)
    return logprobs_in_torch(logits, token_ids, alternatives)


def logprobs_in_torch(
    logits: torch.Tensor, token_ids: Sequence[int], alternatives: Sequence[int]
) -> list[TokenLogprobs]:
    """As `token_logprobs`, on any device."""
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
