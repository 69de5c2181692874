"""Chooses one id per row of scores in torch, by largest value or with noise. Vectorised over rows.

[rows, vocab] seen as [rows, groups of 512 ids], the last group being shorter

On a CPU the kernels of `scalellm.kernels.sampling` do the same faster.
"""

from collections.abc import Callable, Sequence

import torch

from scalellm.engine.noise import gumbel, row_keys
from scalellm.engine.request import Request

GROUP = 512  # ids
_CPU_SCORES_AT_ONCE = 1 << 20  # 4 MB stay in a core's cache from one operation to the next
_GPU_SCORES_AT_ONCE = 1 << 25
_TOKEN_STREAM = 1 << 40  # noise counters of ids; those of groups start at 0


def draw_in_torch(
    scores: torch.Tensor, untruncated: "RandomRows | None", truncated: "RandomRows | None"
) -> list[int | None]:
    """An id for each row of `scores` [rows, vocab] float32; the largest score's for other rows.

    None for a row whose scores hold NaN or infinity, or nothing but minus infinity."""
    peaks = group_reduce(scores, torch.amax)  # [rows, groups]
    best = peaks.amax(-1)
    token_ids = first_of_peak(scores, peaks)
    if untruncated is not None:
        draw_by_group(scores, best, untruncated, token_ids)
    if truncated is not None:
        draw_truncated(scores, best, truncated, token_ids)
    ids: list[int] = token_ids.tolist()
    finite = torch.isfinite(best)
    if bool(finite.all()):
        return list(ids)
    return [token_id if ok else None for token_id, ok in zip(ids, finite.tolist(), strict=True)]


def group_reduce(scores: torch.Tensor, reduce: Callable[..., torch.Tensor]) -> torch.Tensor:
    """Reduce [rows, vocab] to [rows, groups] with torch.amax or torch.sum."""
    whole = scores.shape[1] // GROUP * GROUP
    parts = []
    if whole:
        parts.append(reduce(scores[:, :whole].view(scores.shape[0], -1, GROUP), dim=-1))
    if whole < scores.shape[1]:
        parts.append(reduce(scores[:, whole:], dim=-1, keepdim=True))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _of_group(
    scores: torch.Tensor, group: torch.Tensor, fill: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and scores of one group a row: `group` [rows, 1] to two [rows, GROUP].

    Beyond the vocabulary the score is `fill`."""
    vocab = scores.shape[1]
    ids = group * GROUP + torch.arange(GROUP, device=scores.device)
    found = scores.gather(1, ids.clamp(max=vocab - 1))
    return ids, found.masked_fill_(ids >= vocab, fill)


def first_of_peak(scores: torch.Tensor, peaks: torch.Tensor) -> torch.Tensor:
    """Lowest id of the largest score of each row, int64 [rows]; `peaks` are the groups' largest."""
    group = peaks.argmax(-1, keepdim=True)
    _, found = _of_group(scores, group, -torch.inf)
    return (group.squeeze(1) * GROUP + found.argmax(-1)).clamp_(max=scores.shape[1] - 1)


def draw_by_group(
    scores: torch.Tensor, best: torch.Tensor, rows: "RandomRows", token_ids: torch.Tensor
) -> None:
    """Draw for untruncated rows and write their ids into `token_ids` [batch].

    The largest of a group's perturbed scores is distributed like its log-sum-exp with one noise
    (Gumbel's max-stability), so choosing the group first, then the id, draws from the softmax."""
    keys = rows.keys()
    for part in rows.parts(scores.shape[1]):
        weights = rows.scaled(scores, best, part).exp_()
        mass = group_reduce(weights, torch.sum).double()
        groups = torch.arange(mass.shape[1], device=mass.device)
        group = (mass.log() + gumbel(keys[part], groups)).argmax(-1, keepdim=True)
        ids, found = _of_group(weights, group, 0.0)
        noise = gumbel(keys[part], ids + _TOKEN_STREAM)
        place = (found.double().log() + noise).argmax(-1, keepdim=True)
        drawn = ids.gather(1, place).squeeze(1).clamp_(max=scores.shape[1] - 1)
        token_ids[rows.index[part]] = drawn


def draw_truncated(
    scores: torch.Tensor, best: torch.Tensor, rows: "RandomRows", token_ids: torch.Tensor
) -> None:
    """Draw for rows with top_k, top_p or min_p and write their ids into `token_ids` [batch].

    top_k keeps ties with the k-th; top_p keeps the fewest most likely ids, of those that top_k
    left, that reach its mass; min_p is relative to the most likely id."""
    keys = rows.keys()
    for part in rows.parts(scores.shape[1]):
        scaled = rows.scaled(scores, best, part)
        top_k, top_p = rows.top_k[part], rows.top_p[part]
        min_log = rows.min_p[part].log()
        total = group_reduce(scaled.exp(), torch.sum).double().cumsum(-1)[:, -1:]
        limited = torch.tensor([k > 0 for k in top_k], device=scores.device).unsqueeze(1)
        # ids with less than (1 - top_p) / vocab each cannot be needed to reach top_p
        least = torch.log(total * (1.0 - top_p).clamp_(min=0.0) / scores.shape[1]) - 1e-3
        least = torch.maximum(least, min_log - 1e-3)
        least = torch.where(limited, _kth_largest(scaled, top_k).double(), least)
        ids, left = _gather_above(scaled, least.float())
        left, order = left.sort(dim=-1, descending=True, stable=True)
        ids = ids.gather(1, order)
        weights = left.exp()
        reached = weights.cumsum(-1)
        total = torch.where(limited, reached[:, -1:], total)
        keep = (reached - weights < top_p * total) | (top_p >= 1.0)
        keep &= left >= min_log
        keep[:, 0] = True
        noisy = left + gumbel(keys[part], ids + _TOKEN_STREAM)
        place = noisy.masked_fill_(~keep, -torch.inf).argmax(-1, keepdim=True)
        token_ids[rows.index[part]] = ids.gather(1, place).squeeze(1)


def _kth_largest(scores: torch.Tensor, top_k: Sequence[int]) -> torch.Tensor:
    """The k-th largest of each row, float32 [rows, 1]; minus infinity where k is 0."""
    vocab = scores.shape[1]
    result = scores.new_full((len(top_k), 1), -torch.inf)
    rows = [row for row, k in enumerate(top_k) if 0 < k < vocab]
    if rows:
        chosen = scores if len(rows) == len(top_k) else scores[rows]
        wanted = torch.tensor([top_k[row] - 1 for row in rows], device=scores.device)
        largest = chosen.topk(int(wanted.max()) + 1, dim=-1).values
        result[rows] = largest.gather(1, wanted.unsqueeze(1))
    return result


def _gather_above(scores: torch.Tensor, least: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids, ascending, and float64 scores of at least `least` [rows, 1], as two [rows, most].

    Shorter rows are filled with id 0 and minus infinity."""
    keep = scores >= least
    row, column = keep.nonzero(as_tuple=True)
    counts = keep.sum(-1)
    most = max(1, int(counts.max()))
    place = torch.arange(len(row), device=scores.device) - (counts.cumsum(0) - counts)[row]
    ids = torch.zeros((scores.shape[0], most), dtype=torch.int64, device=scores.device)
    found = torch.full(ids.shape, -torch.inf, dtype=torch.float64, device=scores.device)
    ids[row, place] = column
    found[row, place] = scores[row, column].double()
    return ids, found


class RandomRows:
    """Parameters of the rows that draw with noise, by one of the two forms."""

    def __init__(
        self,
        rows: list[int],
        requests: Sequence[Request],
        before: Sequence[Sequence[int]],
        device: torch.device,
    ) -> None:
        """`before`: ids that come between each request's and the one to draw."""
        self.rows = rows
        self._before = [len(before[row]) for row in rows]
        self.whole_batch = len(rows) == len(requests)
        self.requests = [requests[row] for row in rows]
        self.index = torch.tensor(rows, device=device)
        sampling = [request.sampling for request in self.requests]
        self._seeds = [s.seed for s in sampling]
        self._choices = [s.choice for s in sampling]

        def column(values: list[float]) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.float64, device=device).unsqueeze(1)

        self.temperature = column([s.temperature for s in sampling])
        self.top_p = column([s.top_p for s in sampling])
        self.min_p = column([s.min_p for s in sampling])
        self.top_k = [s.top_k for s in sampling]

    def keys(self) -> torch.Tensor:
        """Noise keys for the next output index, int64 [rows, 1]."""
        indices = [
            request.num_output_tokens + before
            for request, before in zip(self.requests, self._before, strict=True)
        ]
        keys = torch.from_numpy(row_keys(self._seeds, self._choices, indices))
        return keys.to(self.index.device).unsqueeze(1)

    def scaled(self, scores: torch.Tensor, best: torch.Tensor, part: slice) -> torch.Tensor:
        """(score - best) / temperature of these rows, a new float32 [rows, vocab], at most 0."""
        index = self.index[part]
        chosen = scores[part] if self.whole_batch else scores.index_select(0, index)
        shifted = chosen - best.index_select(0, index).unsqueeze(1)
        return shifted.div_(self.temperature[part].float())

    def parts(self, vocab: int) -> list[slice]:
        """Rows to be drawn together; bounds the memory that they take."""
        on_cpu = self.index.device.type == "cpu"
        stride = max(1, (_CPU_SCORES_AT_ONCE if on_cpu else _GPU_SCORES_AT_ONCE) // vocab)
        total = len(self.rows)
        return [slice(i, min(i + stride, total)) for i in range(0, total, stride)]
