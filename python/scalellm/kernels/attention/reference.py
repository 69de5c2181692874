"""Attention over the paged cache, in torch."""

import torch
import torch.nn.functional as F
from torch import Tensor

from scalellm.kernels.attention.cache import LayerCache
from scalellm.kernels.attention.heads import Heads
from scalellm.kernels.attention.step import AttentionStep, DecodeChunk, PrefillSpan
from scalellm.kernels.rms_norm import rms_norm
from scalellm.kernels.rotary import apply_rotary


def attention(
    qkv: Tensor, heads: Heads, angles: Tensor, cache: LayerCache, step: AttentionStep
) -> Tensor:
    """[T, (heads + 2 kv heads) * head_dim] -> [T, heads * head_dim]."""
    tokens = qkv.shape[0]
    sizes = [heads.num_heads, heads.num_kv_heads, heads.num_kv_heads]
    query, key, value = torch.split(qkv.view(tokens, -1, heads.head_dim), sizes, dim=1)
    if heads.norm is not None:
        query = rms_norm(query, heads.norm.query_weight, heads.norm.eps)
        key = rms_norm(key, heads.norm.key_weight, heads.norm.eps)
    cos, sin = angles.to(qkv.dtype).chunk(2, dim=-1)
    write_kv(cache, apply_rotary(key, cos, sin), value, step)
    attended = paged_attention(
        apply_rotary(query, cos, sin), cache, step, scale=heads.scale, window=heads.window
    )
    return attended.view(tokens, -1)


def write_kv(cache: LayerCache, key: Tensor, value: Tensor, step: AttentionStep) -> None:
    """Store the step's keys [T, kv heads, key_dim] and values [T, kv heads, value_dim]."""
    for stored, new in ((cache.keys, key), (cache.values, value)):
        if step.begun is not None:
            stored.index_fill_(0, step.begun, 0)
        width = stored.shape[-1]
        stored.view(-1, width).index_copy_(0, step.write, new.reshape(-1, width).to(stored.dtype))


def paged_attention(
    query: Tensor,
    cache: LayerCache,
    step: AttentionStep,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Causal attention of every span over its own sequence, whose keys `write_kv` has stored.

    `query` [T, heads, key_dim], rows in span order; returns [T, heads, value_dim] of its type.
    Heads are grouped: heads / kv heads neighbouring ones share a kv head (Ainslie et al., 2023).
    `window`: a query sees itself and the window - 1 positions before it.
    `softcap`: scores become softcap * tanh(score / softcap). `sinks` [heads]: logits that take part
    in the softmax and carry no value.
    """
    plan = step.windows[window]
    output = query.new_empty(*query.shape[:2], cache.values.shape[-1])
    for chunk in plan.decodes:
        output[chunk.rows] = _decode(
            query[chunk.rows], cache, chunk, step.scratch, scale, softcap, sinks
        )
    for span in plan.prefills:
        rows = slice(span.first_row, span.first_row + span.count)
        output[rows] = _prefill(query[rows], cache, span, scale, softcap, sinks)
    return output


def _decode(
    query: Tensor,
    cache: LayerCache,
    chunk: DecodeChunk,
    scratch: tuple[Tensor, Tensor],
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """[n, heads, key_dim] -> [n, heads, value_dim]; a kv head's queries are one product's rows."""
    n, heads, _ = query.shape
    kv_heads = cache.keys.shape[1]
    keys = _gather(cache.keys, chunk.gather, n, scratch[0]).to(query.dtype)
    values = _gather(cache.values, chunk.gather, n, scratch[1]).to(query.dtype)
    grouped = query.view(n, kv_heads, heads // kv_heads, -1)
    if sinks is not None:
        sinks = sinks.view(1, kv_heads, heads // kv_heads, 1)
    return _attend(grouped, keys, values, chunk.bias, scale, softcap, sinks).reshape(n, heads, -1)


def _prefill(
    query: Tensor,
    cache: LayerCache,
    span: PrefillSpan,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """[count, heads, key_dim] -> [count, heads, value_dim]."""
    count, heads, _ = query.shape
    kv_heads = cache.keys.shape[1]
    keys = _gather(cache.keys, span.gather, 1)[:, :, : span.length].to(query.dtype)
    values = _gather(cache.values, span.gather, 1)[:, :, : span.length].to(query.dtype)
    queries = query.transpose(0, 1).unsqueeze(0)
    if softcap is None and sinks is None:
        output = F.scaled_dot_product_attention(
            queries,
            keys,
            values,
            attn_mask=span.mask,
            is_causal=span.mask is None,
            scale=scale,
            enable_gqa=heads != kv_heads,
        )
    else:
        # Each group's queries become rows of its kv head's product; the mask repeats for them.
        group = heads // kv_heads
        mask = span.mask
        if mask is None:
            mask = query.new_ones(count, count, dtype=torch.bool).tril()
        bias = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, float("-inf"))
        if sinks is not None:
            sinks = sinks.view(1, kv_heads, group, 1).expand(1, kv_heads, group, count)
            sinks = sinks.reshape(1, kv_heads, group * count, 1)
        output = _attend(
            queries.reshape(1, kv_heads, group * count, -1),
            keys,
            values,
            bias.repeat(group, 1),
            scale,
            softcap,
            sinks,
        )
    return output.reshape(heads, count, -1).transpose(0, 1)


def _gather(stored: Tensor, runs: Tensor, n: int, scratch: Tensor | None = None) -> Tensor:
    """Copy runs of [blocks, kv heads, block size, d] to [n, kv heads, S, d], into `scratch`."""
    _, kv_heads, block_size, width = stored.shape
    flat = stored.view(-1, block_size * width)
    out = None if scratch is None else scratch[: len(runs)]
    return torch.index_select(flat, 0, runs, out=out).view(n, kv_heads, -1, width)


def _attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    bias: Tensor,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """softmax(q k^T * scale + bias) v over [n, kv heads, rows, d]; the softmax in fp32.

    Two batched products beat torch's fused attention on a CPU when a head has few rows: half the
    time at 160 keys and 2 rows. The scale goes into the query, before rounding to its type.
    """
    scores = torch.matmul(query * scale, keys.transpose(-1, -2))
    if softcap is not None:
        scores = torch.tanh(scores.float() / softcap) * softcap
    scores = scores + bias
    if sinks is not None:
        sinks = sinks.to(scores.dtype).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, sinks], dim=-1)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32)[..., : keys.shape[-2]]
    return torch.matmul(weights.to(values.dtype), values)
