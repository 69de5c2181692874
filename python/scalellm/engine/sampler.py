"""Draws the next token of every row of a batch.

    logits -> repetition, frequency, presence penalty -> logit_bias -> min_tokens mask
           -> temperature -> top_k -> top_p of what is left -> min_p -> draw

Greedy rows (temperature below 1e-5) take the largest score, the lowest id on ties. The others use
the Gumbel-max trick with counter-based noise (noise.py), in one of two forms that a request's own
parameters choose, so that a row never depends on its neighbours:

 - truncated (top_k, top_p or min_p): noise for the few ids that are left;
 - untruncated: the vocabulary in groups of 512; noise picks a group by its whole probability, then
   an id within it. The distribution is the same as with noise for every id, at 1/200 of the noise.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from scalellm.engine.draw import (
    RandomRows,
    draw_by_group,
    draw_truncated,
    first_of_peak,
    group_reduce,
)
from scalellm.engine.logprobs import TokenLogprobs, token_logprobs
from scalellm.engine.penalties import Penalties, SeenTokens
from scalellm.engine.request import Request

GREEDY_BELOW = 1e-5
NOT_FINITE = (
    "no token can be drawn: the model's logits are not finite numbers, or min_tokens excludes "
    "every token of the vocabulary"
)


@dataclass(frozen=True, slots=True)
class Sampled:
    """What was drawn, by row; `errors` by row for those that have no token."""

    token_ids: list[int]
    errors: dict[int, str] = field(default_factory=dict)
    logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)


class Sampler:
    """Keeps what is worth keeping between steps: parameters of an unchanged batch, seen tokens."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self._seen: dict[int, SeenTokens] = {}
        self._rows: _Rows | None = None

    def forget(self, key: int) -> None:
        """Drop a finished request's state."""
        self._seen.pop(key, None)

    def sample(self, logits: torch.Tensor, requests: Sequence[Request]) -> Sampled:
        """Draw for float32 `logits` [len(requests), vocab]; they are not changed."""
        keys = tuple(request.key for request in requests)
        rows = self._rows
        if rows is None or rows.keys != keys or rows.device != logits.device:
            rows = self._rows = _Rows(keys, requests, self._seen, logits.device)
        scores = rows.edit(logits)
        peaks = group_reduce(scores, torch.amax)  # [rows, groups]
        best = peaks.amax(-1)
        token_ids = first_of_peak(scores, peaks)
        if rows.untruncated is not None:
            draw_by_group(scores, best, rows.untruncated, token_ids)
        if rows.truncated is not None:
            draw_truncated(scores, best, rows.truncated, token_ids)
        ids = token_ids.tolist()
        finite = torch.isfinite(best)
        errors: dict[int, str] = {}
        if not bool(finite.all()):
            errors = {row: NOT_FINITE for row, ok in enumerate(finite.tolist()) if not ok}
        logprobs: dict[int, TokenLogprobs] = {}
        if rows.logprob_rows:
            wanted = [row for row in rows.logprob_rows if row not in errors]
            if wanted:
                raw = logits if len(wanted) == len(ids) else logits[wanted]
                alternatives = [requests[row].sampling.logprobs or 0 for row in wanted]
                found = token_logprobs(raw, [ids[row] for row in wanted], alternatives)
                logprobs = dict(zip(wanted, found, strict=True))
        return Sampled(ids, errors, logprobs)


class _Rows:
    """Everything about a batch's rows that does not change from step to step."""

    def __init__(
        self,
        keys: tuple[int, ...],
        requests: Sequence[Request],
        seen: dict[int, SeenTokens],
        device: torch.device,
    ) -> None:
        self.keys = keys
        self.device = device
        untruncated: list[int] = []
        truncated: list[int] = []
        penalised: list[int] = []
        self.logprob_rows: list[int] = []
        bias: list[tuple[int, int, float]] = []
        self._until_min_tokens: list[tuple[int, Request, list[int]]] = []
        for row, request in enumerate(requests):
            sampling = request.sampling
            if sampling.temperature >= GREEDY_BELOW:
                cut = sampling.top_k > 0 or sampling.top_p < 1.0 or sampling.min_p > 0.0
                (truncated if cut else untruncated).append(row)
            if sampling.penalised:
                penalised.append(row)
                if request.key not in seen:
                    seen[request.key] = SeenTokens(request)
            if sampling.logprobs is not None:
                self.logprob_rows.append(row)
            bias += [(row, token_id, value) for token_id, value in sampling.logit_bias]
            if request.num_output_tokens < request.min_tokens:
                ends = sorted(request.eos_token_ids | request.stop_token_ids)
                self._until_min_tokens.append((row, request, ends))
        self.untruncated = RandomRows(untruncated, requests, device) if untruncated else None
        self.truncated = RandomRows(truncated, requests, device) if truncated else None
        self._penalties: Penalties | None = None
        if penalised:
            chosen = [requests[row] for row in penalised]
            self._penalties = Penalties(penalised, [seen[r.key] for r in chosen], chosen)
        self._bias: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
        if bias:
            rows, ids, values = zip(*bias, strict=True)
            self._bias = (
                torch.tensor(rows, device=device),
                torch.tensor(ids, device=device),
                torch.tensor(values, dtype=torch.float32, device=device),
            )

    def edit(self, logits: torch.Tensor) -> torch.Tensor:
        """Scores after penalties, bias and mask; `logits` themselves where none applies."""
        masked_rows: list[int] = []
        masked_ids: list[int] = []
        for row, request, ends in self._until_min_tokens:
            if request.num_output_tokens < request.min_tokens:
                masked_rows += [row] * len(ends)
                masked_ids += ends
        if self._penalties is None and self._bias is None and not masked_ids:
            return logits
        scores = logits.clone()
        if self._penalties is not None:
            self._penalties.apply(scores)
        if self._bias is not None:
            rows, ids, values = self._bias
            scores.index_put_((rows, ids), values, accumulate=True)
        if masked_ids:
            scores[masked_rows, masked_ids] = -torch.inf
        return scores
