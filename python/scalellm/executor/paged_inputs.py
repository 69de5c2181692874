"""From a step's arrays to a GPU: page-locked memory, one copy, views of what arrives."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from scalellm.config import EngineConfig
from scalellm.executor.inputs import StepArrays
from scalellm.kernels.attention import KVCache, PagedStep, plan_pages
from scalellm.kernels.attention.flashinfer import FlashInferPrefill, PlannedPrefill, open_prefill
from scalellm.layers.step import Step
from scalellm.loader.load import LoadedModel

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


def prompt_kernel(config: EngineConfig, loaded: LoadedModel) -> FlashInferPrefill | None:
    """What computes prompts' attention in place of Triton's kernel, if anything does."""
    heads = len(loaded.shard.heads(loaded.config.num_heads))
    return open_prefill(
        heads,
        loaded.geometry,
        config.block_size,
        loaded.dtype,
        loaded.kv_dtype,
        loaded.device,
    )


def build_paged_step(
    arrays: StepArrays,
    cache: KVCache,
    device: torch.device,
    prompts: FlashInferPrefill | None = None,
) -> tuple[Tensor, Step]:
    """Token ids [T] int32 and the step, as models take them on a GPU. `prompts`: as of
    `prompt_kernel`; what it plans holds until the next step is built."""
    plan = plan_pages(arrays.spans, arrays.tables, cache.block_size)
    token_ids, positions, logit_rows, *parts = upload(
        [
            arrays.token_ids,
            arrays.positions,
            arrays.logit_rows,
            *plan.all,
        ],
        device,
    )
    planned: PlannedPrefill | None = None
    if prompts is not None:
        planned = prompts.plan(arrays.spans, arrays.tables, cache.block_size)
    return token_ids, Step(positions, cache, PagedStep.of(parts, planned), logit_rows)
