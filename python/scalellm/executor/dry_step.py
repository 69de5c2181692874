"""How much memory a GPU's largest step takes, found by running one before the KV cache is made."""

import torch

from scalellm.config import EngineConfig
from scalellm.executor.batch import Batch, Span
from scalellm.executor.inputs import build_arrays, build_step
from scalellm.executor.paged_inputs import build_paged_step, prompt_kernel
from scalellm.kernels.attention import KVCache
from scalellm.loader.load import LoadedModel, check_max_model_len

RESERVE_BYTES = 512 << 20  # for recorded steps, which keep activations of their own
# What a process has that torch does not count: the driver's context, kernels, NCCL's buffers.
UNCOUNTED_BYTES = 1 << 30


def dry_batch(config: EngineConfig, longest: int) -> Batch:
    """As many tokens as a step may have, in prompts of at most `longest`, and as many logits."""
    tokens, logits, spans, block = config.max_num_batched_tokens, config.max_num_seqs, [], 0
    while tokens:
        count = min(tokens, longest)
        asked = min(logits, count)
        blocks = -(-count // config.block_size)
        spans.append(Span([0] * count, 0, range(block, block + blocks), asked))
        tokens, logits, block = tokens - count, logits - asked, block + blocks
    return Batch(tuple(spans))


def dry_step_bytes(config: EngineConfig, loaded: LoadedModel) -> int:
    """Bytes of a GPU that the largest step takes beside weights and KV cache."""
    longest = config.max_model_len or check_max_model_len(None, loaded.config)
    batch = dry_batch(config, longest)
    blocks = batch.spans[-1].block_table[-1] + 1
    device, dtype = loaded.device, loaded.kv_dtype
    with torch.inference_mode():
        cache = KVCache.allocate(loaded.geometry, blocks, config.block_size, dtype, device)
        arrays = build_arrays(batch, config.block_size, blocks)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        if loaded.config.family == "transformers":
            ids, step = build_step(arrays, cache, loaded.geometry, loaded.dtype, device)
        else:
            ids, step = build_paged_step(arrays, cache, device, prompt_kernel(config, loaded))
        loaded.model.forward(ids, step)
        torch.cuda.synchronize(device)
        taken = torch.cuda.max_memory_allocated(device) - before
    del cache, ids, step
    torch.cuda.empty_cache()
    return taken


def gpu_kv_budget(free: int, total: int, own: int, utilization: float, step_bytes: int) -> int:
    """Bytes for the KV cache: what is left of this process's share, of which it has `own`, and not
    more than is free, but for the largest step and a reserve.

    What others use of the GPU is not taken from the share: they may be replicas with theirs."""
    left = int(utilization * total) - own - UNCOUNTED_BYTES
    return max(0, min(left, free) - step_bytes - RESERVE_BYTES)
