"""From a step's arrays to a GPU: page-locked memory, one copy, views of what arrives."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from scalellm.executor.inputs import StepArrays
from scalellm.kernels.attention import KVCache, PagedStep, plan_pages
from scalellm.layers.step import Step

_ALIGNED = 4  # numbers: Triton's loads are wide where an array begins at a multiple of 16 bytes


def upload(arrays: Sequence[npt.NDArray[np.integer]], device: torch.device) -> list[Tensor]:
    """Each array as int32 on `device`; the copy may still be on its way."""
    sizes = [-(-array.size // _ALIGNED) * _ALIGNED for array in arrays]
    # torch keeps page-locked memory from reuse until the copy out of it has ended.
    held = torch.empty(sum(sizes), dtype=torch.int32, pin_memory=device.type == "cuda")
    written = held.numpy()
    first = 0
    for array, size in zip(arrays, sizes, strict=True):
        written[first : first + array.size] = array.reshape(-1)
        first += size
    there = held.to(device, non_blocking=True)
    return [
        part[: array.size].view(array.shape)
        for array, part in zip(arrays, there.split(sizes), strict=True)
    ]


def build_paged_step(
    arrays: StepArrays, cache: KVCache, device: torch.device
) -> tuple[Tensor, Step]:
    """Token ids [T] int32 and the step, as models take them on a GPU."""
    plan = plan_pages(arrays.spans, arrays.tables, cache.block_size)
    token_ids, positions, logit_rows, *parts = upload(
        [
            arrays.token_ids,
            arrays.positions,
            arrays.logit_rows,
            *(getattr(plan, name) for name in PagedStep.__slots__),
        ],
        device,
    )
    return token_ids, Step(positions, cache, PagedStep(*parts), logit_rows)
