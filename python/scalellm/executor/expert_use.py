"""How evenly the experts of a mixture are used, as the engine tells the gateway.

sparse layers --tally on the device--> a look now and then --> what the loop's thread reads
"""

import time

import torch

from scalellm.loader.load import LoadedModel

# Layers, experts read, choices of the busiest part, those of each expert, ranks: the proto's.
ExpertUse = tuple[int, int, int, list[int], int]
_LOOK_EVERY_S = 1.0


class ExpertTally:
    """Counts of all steps, kept where the steps are computed."""

    def __init__(self, experts: int, ranks: int, device: torch.device) -> None:
        self.counts = torch.zeros(3 + experts, dtype=torch.int64, device=device)  # as of Step
        self.seen: ExpertUse = (0, 0, 0, [0] * experts, ranks)  # for any thread
        self._ranks = ranks
        self._on_gpu = device.type == "cuda"
        self._host = torch.zeros(3 + experts, dtype=torch.int64, pin_memory=self._on_gpu)
        self._copied: torch.cuda.Event | None = None
        self._asked_s = 0.0

    @classmethod
    def of(cls, loaded: LoadedModel) -> "ExpertTally | None":
        """None for a model without experts, or of which nothing is known here."""
        if (ranks := ranks_of(loaded)) is None or loaded.config.moe is None:
            return None
        return cls(loaded.config.moe.num_experts, ranks, loaded.device)

    def look(self) -> None:
        """Take what has arrived, and ask for more if that is old; waits for nothing."""
        if not self._on_gpu:
            self._take(self.counts)
            return
        if self._copied is not None and self._copied.query():
            self._copied = None
            self._take(self._host)
        now_s = time.monotonic()
        if self._copied is None and now_s - self._asked_s > _LOOK_EVERY_S:
            self._asked_s = now_s
            self._host.copy_(self.counts, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    def _take(self, counts: torch.Tensor) -> None:
        layers, read, busiest, *choices = counts.tolist()
        self.seen = (layers, read, busiest, choices, self._ranks)


def ranks_of(loaded: LoadedModel) -> int | None:
    """How many ranks divide a layer's experts, 1 where each has a part of every one; None for a
    model without any."""
    if loaded.config.moe is None or loaded.config.family == "transformers":
        return None
    return loaded.shard.expert_shares or 1


def used_between(earlier: ExpertUse | None, later: ExpertUse | None) -> ExpertUse | None:
    """What was added; None where nothing is known."""
    if earlier is None or later is None:
        return later
    choices = [now - before for now, before in zip(later[3], earlier[3], strict=True)]
    return (later[0] - earlier[0], later[1] - earlier[1], later[2] - earlier[2], choices, later[4])
