"""How evenly the experts of a mixture are used, as the engine tells the gateway.

sparse layers --tally on the device--> a look now and then --> what the loop's thread reads
"""

import time

import torch

from scalellm.loader.load import LoadedModel

# Layers, choices, experts read, choices of the busiest part, and parts: the proto's ExpertUse.
ExpertUse = tuple[int, int, int, int, int]
_LOOK_EVERY_S = 1.0


class ExpertTally:
    """Counts of all steps, kept where the steps are computed."""

    def __init__(self, parts: int, device: torch.device) -> None:
        self.parts = parts
        self.counts = torch.zeros(4, dtype=torch.int64, device=device)
        self.seen: ExpertUse = (0, 0, 0, 0, parts)  # for any thread
        self._on_gpu = device.type == "cuda"
        self._host = torch.zeros(4, dtype=torch.int64, pin_memory=self._on_gpu)
        self._copied: torch.cuda.Event | None = None
        self._asked_s = 0.0

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
        layers, choices, read, busiest = counts.tolist()
        self.seen = (layers, choices, read, busiest, self.parts)


def parts_of(loaded: LoadedModel) -> int:
    """Into how many parts the experts of a layer are divided: ranks, or experts; 0 without any."""
    moe = loaded.config.moe
    if moe is None or loaded.config.family == "transformers":
        return 0
    return loaded.shard.expert_shares or moe.num_experts
