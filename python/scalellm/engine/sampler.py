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
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch

from scalellm.engine.draw import RandomRows, draw_in_torch
from scalellm.engine.logprobs import TokenLogprobs, token_logprobs
from scalellm.engine.penalties import Penalties, SeenTokens
from scalellm.engine.request import GREEDY_BELOW, Request
from scalellm.kernels.sampling import DRAW, draw

NOT_FINITE = (
    "no token can be drawn: the model's logits are not finite numbers, or min_tokens excludes "
    "every token of the vocabulary"
)
# Rows and ids whose scores were changed, and what they were.
Edit = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Sampled:
    """What was drawn, by row; `errors` by row for those that have no token."""

    token_ids: list[int | None]
    errors: dict[int, str] = field(default_factory=dict)
    logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)

    @classmethod
    def of(cls, token_ids: list[int | None]) -> "Sampled":
        """Of ids, None where there is none to draw."""
        errors = {}
        if None in token_ids:
            errors = {row: NOT_FINITE for row, drawn in enumerate(token_ids) if drawn is None}
        return cls(token_ids, errors)


class Sampler:
    """Keeps what is worth keeping between steps: parameters of an unchanged batch, seen tokens."""

    def __init__(self, vocab_size: int, kernels: bool = True) -> None:
        """`kernels`: the device's kernels draw; without them torch does."""
        self.vocab_size = vocab_size
        self._kernels = kernels
        self._seen: dict[int, SeenTokens] = {}
        self._rows: _Rows | None = None

    def forget(self, key: int) -> None:
        """Drop a finished request's state."""
        self._seen.pop(key, None)

    def sample(
        self,
        logits: torch.Tensor,
        requests: Sequence[Request],
        before: Sequence[Sequence[int]] | None = None,
    ) -> Sampled:
        """Draw for float32 `logits` [len(requests), vocab]; they are as before afterwards.

        `before`: ids that come between each request's and the one to draw; none if None."""
        rows = self._rows_of(requests, before, logits.device)
        edits = rows.edit(logits)
        if self._kernels:
            token_ids = draw(logits, rows.draws())
        else:
            token_ids = draw_in_torch(logits, rows.untruncated, rows.truncated)
        for edited, ids, scores in reversed(edits):
            logits[edited, ids] = scores
        sampled = Sampled.of(token_ids)
        chosen = [
            (row, drawn) for row in rows.logprob_rows if (drawn := token_ids[row]) is not None
        ]
        if chosen:
            wanted = [row for row, _ in chosen]
            raw = logits if len(wanted) == len(token_ids) else logits[wanted]
            alternatives = [requests[row].sampling.logprobs or 0 for row in wanted]
            found = token_logprobs(raw, [drawn for _, drawn in chosen], alternatives)
            sampled.logprobs.update(zip(wanted, found, strict=True))
        return sampled

    def draws(
        self, requests: Sequence[Request], before: Sequence[Sequence[int]], device: torch.device
    ) -> npt.NDArray[np.void]:
        """What `sample` would draw by from logits on `device`, for requests that take them as they
        are."""
        return self._rows_of(requests, before, device).draws()

    def _rows_of(
        self,
        requests: Sequence[Request],
        before: Sequence[Sequence[int]] | None,
        device: torch.device,
    ) -> "_Rows":
        if before is None:
            before = [()] * len(requests)
        keys = [request.key for request in requests]
        rows = self._rows
        if rows is None or rows.keys != keys or rows.before != before or rows.device != device:
            rows = self._rows = _Rows(keys, requests, before, self._seen, device)
        return rows


class _Rows:
    """Everything about a batch's rows that does not change from step to step."""

    def __init__(
        self,
        keys: list[int],
        requests: Sequence[Request],
        before: Sequence[Sequence[int]],
        seen: dict[int, SeenTokens],
        device: torch.device,
    ) -> None:
        self.keys = keys
        self.before = before
        self.device = device
        self._requests = requests
        self.logprob_rows: list[int] = []
        penalised: list[int] = []
        bias: list[tuple[int, int, float]] = []
        self._until_min_tokens: list[tuple[int, Request, list[int]]] = []
        for row, request in enumerate(requests):
            sampling = request.sampling
            if sampling.penalised:
                penalised.append(row)
                if request.key not in seen:
                    seen[request.key] = SeenTokens(request)
            if sampling.logprobs is not None:
                self.logprob_rows.append(row)
            bias += [(row, token_id, value) for token_id, value in sampling.logit_bias]
            if self._index(row) < request.min_tokens:
                ends = sorted(request.eos_token_ids | request.stop_token_ids)
                self._until_min_tokens.append((row, request, ends))
        self._penalties: Penalties | None = None
        if penalised:
            chosen = [requests[row] for row in penalised]
            after = [before[row] for row in penalised]
            self._penalties = Penalties(penalised, [seen[r.key] for r in chosen], after, chosen)
        self._bias: Edit | None = None
        if bias:
            rows, ids, values = zip(*bias, strict=True)
            self._bias = (
                torch.tensor(rows, device=device),
                torch.tensor(ids, device=device),
                torch.tensor(values, dtype=torch.float32, device=device),
            )

    def draws(self) -> npt.NDArray[np.void]:
        """Of DRAW, for the next output index."""
        self._draws["index"] = [self._index(row) for row in range(len(self._requests))]
        return self._draws

    def _index(self, row: int) -> int:
        """Of the id to draw, among the request's output."""
        return self._requests[row].num_output_tokens + len(self.before[row])

    @cached_property
    def _draws(self) -> npt.NDArray[np.void]:
        rows = [
            (s.temperature, s.top_p, s.min_p, s.top_k, s.seed, s.choice, 0)
            for s in (request.sampling for request in self._requests)
        ]
        return np.array(rows, dtype=DRAW)

    @cached_property
    def untruncated(self) -> RandomRows | None:
        return self._random(truncated=False)

    @cached_property
    def truncated(self) -> RandomRows | None:
        return self._random(truncated=True)

    def _random(self, truncated: bool) -> RandomRows | None:
        rows = [
            row
            for row, s in enumerate(request.sampling for request in self._requests)
            if s.temperature >= GREEDY_BELOW
            and (s.top_k > 0 or s.top_p < 1.0 or s.min_p > 0.0) is truncated
        ]
        return RandomRows(rows, self._requests, self.before, self.device) if rows else None

    def edit(self, scores: torch.Tensor) -> list[Edit]:
        """Penalties, bias and mask, in place; undone by putting back what is returned, last first.

        So a step touches the few scores that change, and not a copy of all."""
        edits: list[Edit] = []
        if self._penalties is not None:
            edits.append(self._penalties.apply(scores))
        if self._bias is not None:
            rows, ids, values = self._bias
            edits.append((rows, ids, scores[rows, ids]))
            scores.index_put_((rows, ids), values, accumulate=True)
        masked_rows: list[int] = []
        masked_ids: list[int] = []
        for row, request, ends in self._until_min_tokens:
            if self._index(row) < request.min_tokens:
                masked_rows += [row] * len(ends)
                masked_ids += ends
        if masked_ids:
            rows = torch.tensor(masked_rows, device=self.device)
            ids = torch.tensor(masked_ids, device=self.device)
            edits.append((rows, ids, scores[rows, ids]))
            scores[rows, ids] = -torch.inf
        return edits
