"""Which tokens a request has seen, kept so that one step costs one token."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from scalellm.engine.request import Request


class SeenTokens:
    """Distinct tokens of one request's prompt and output, with their counts in the output.

    Catches up with the request on every use; a request's tokens are only ever appended to."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._place: dict[int, int] = {}
        self._ids: npt.NDArray[np.int64] = np.zeros(64, dtype=np.int64)
        self._counts: npt.NDArray[np.float32] = np.zeros(64, dtype=np.float32)
        self._taken = 0
        # only the repetition penalty looks at the prompt
        if request.sampling.repetition_penalty == 1.0:
            self._taken = request.num_prompt_tokens

    def arrays_after(
        self, before: Sequence[int]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """As `arrays`, if `before` were output too."""
        ids, counts = self.arrays()
        if not before:
            return ids, counts
        new = [token_id for token_id in dict.fromkeys(before) if token_id not in self._place]
        ids = np.concatenate((ids, np.array(new, dtype=np.int64)))
        counts = np.concatenate((counts, np.zeros(len(new), dtype=np.float32)))
        place_of_new = {token_id: place for place, token_id in enumerate(new, len(self._place))}
        for token_id in before:
            counts[self._place.get(token_id, place_of_new.get(token_id, 0))] += 1
        return ids, counts

    def arrays(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """Token ids and output counts, each [distinct tokens]."""
        token_ids = self._request.token_ids
        prompt = self._request.num_prompt_tokens
        for position in range(self._taken, len(token_ids)):
            token_id = token_ids[position]
            place = self._place.setdefault(token_id, len(self._place))
            if place == len(self._ids):
                self._ids = np.concatenate((self._ids, np.zeros_like(self._ids)))
                self._counts = np.concatenate((self._counts, np.zeros_like(self._counts)))
            self._ids[place] = token_id
            if position >= prompt:
                self._counts[place] += 1
        self._taken = len(token_ids)
        distinct = len(self._place)
        return self._ids[:distinct], self._counts[:distinct]


class Penalties:
    """Repetition, frequency and presence penalties of some rows of a batch."""

    def __init__(
        self,
        rows: list[int],
        seen: list[SeenTokens],
        before: list[Sequence[int]],
        requests: list[Request],
    ) -> None:
        """`before`: ids that come between each request's and the one to draw."""
        self._before = before
        self._rows = np.array(rows, dtype=np.int64)
        self._seen = seen
        sampling = [request.sampling for request in requests]
        self._repetition = np.array([s.repetition_penalty for s in sampling], dtype=np.float32)
        self._frequency = np.array([s.frequency_penalty for s in sampling], dtype=np.float32)
        self._presence = np.array([s.presence_penalty for s in sampling], dtype=np.float32)

    def apply(self, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Change `scores` [batch, vocab] in place; returns rows, ids and what these scores were.

        Repetition (Keskar et al., "CTRL", 2019): positive logits of seen tokens are divided by the
        penalty, negative ones multiplied. Then frequency * count and presence are subtracted for
        tokens of the output."""
        pairs = [
            seen.arrays_after(before) for seen, before in zip(self._seen, self._before, strict=True)
        ]
        lengths = [len(ids) for ids, _ in pairs]
        counts = np.concatenate([count for _, count in pairs])
        subtract = np.repeat(self._frequency, lengths) * counts
        subtract += np.repeat(self._presence, lengths) * (counts > 0)
        device = scores.device
        rows = torch.from_numpy(np.repeat(self._rows, lengths)).to(device)
        ids = torch.from_numpy(np.concatenate([ids for ids, _ in pairs])).to(device)
        repetition = torch.from_numpy(np.repeat(self._repetition, lengths)).to(device)
        found = scores[rows, ids]
        penalised = torch.where(found > 0, found / repetition, found * repetition)
        scores[rows, ids] = penalised - torch.from_numpy(subtract).to(device)
        return rows, ids, found
