"""Streams tensors from mapped files to a GPU: reading one piece while the one before is copied.

file --page faults, on this thread--> page-locked buffer 0 | 1 --copy engine--> GPU
"""

import torch
from torch import Tensor

PIECE_BYTES = 64 << 20


class Staging:
    """Two page-locked buffers in turn."""

    def __init__(self, device: torch.device, piece_bytes: int = PIECE_BYTES) -> None:
        on_gpu = device.type == "cuda"
        size = piece_bytes // 8 * 8  # whole numbers of every type
        self._buffers = [torch.empty(size, dtype=torch.uint8, pin_memory=on_gpu) for _ in range(2)]
        self._copied: list[torch.cuda.Event | None] = [None, None]
        self._on_gpu = on_gpu
        self._turn = 0

    def copy(self, out: Tensor, stored: Tensor) -> None:
        """Write `stored`, on the CPU, into the contiguous `out` of its shape and any type.

        Returns when all has been read; the last copies may still be on their way."""
        target, source = out.view(-1), stored.reshape(-1)
        count = len(self._buffers[0]) // stored.dtype.itemsize
        for first in range(0, len(source), count):
            piece = source[first : first + count]
            place = self._free().view(stored.dtype)[: len(piece)]
            place.copy_(piece)
            target[first : first + len(piece)].copy_(
                place.to(target.device, non_blocking=True), non_blocking=True
            )
            self._sent()

    def _free(self) -> Tensor:
        """The buffer whose turn it is, once what it held has been copied."""
        copied = self._copied[self._turn]
        if copied is not None:
            copied.synchronize()
        return self._buffers[self._turn]

    def _sent(self) -> None:
        if self._on_gpu:
            event = torch.cuda.Event()
            event.record()
            self._copied[self._turn] = event
        self._turn = 1 - self._turn
