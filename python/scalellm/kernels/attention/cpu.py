"""Attention by the kernels of crates/cpu-kernels, as one torch operator."""

from torch import Tensor

from scalellm import _core
from scalellm.kernels.attention.heads import Heads
from scalellm.kernels.attention.packed import PackedLayerCache, PackedStep
from scalellm.kernels.operator import define


def _attention(
    qkv: Tensor,
    query_norm: Tensor | None,
    key_norm: Tensor | None,
    eps: float,
    angles: Tensor,
    cache: Tensor,
    kv: list[int],
    spans: Tensor,
    tables: Tensor,
    heads: int,
    scale: float,
    window: int,
) -> Tensor:
    out = qkv.new_empty(qkv.shape[0], heads * kv[3])
    _core.cpu_attention(
        (qkv.data_ptr(), qkv.shape[0], qkv.stride(0)),
        heads,
        (0, 0)
        if query_norm is None or key_norm is None
        else (query_norm.data_ptr(), key_norm.data_ptr()),
        eps,
        (angles.data_ptr(), angles.shape[1]),
        (cache.data_ptr(), cache.numel()),
        kv,
        (spans.data_ptr(), spans.shape[0]),
        (tables.data_ptr(), tables.numel()),
        scale,
        window,
        out.data_ptr(),
    )
    return out


_OPERATOR = define(
    "attention(Tensor(a!) qkv, Tensor? query_norm, Tensor? key_norm, float eps, Tensor angles, "
    "Tensor(b!) cache, int[] kv, Tensor spans, Tensor tables, int heads, float scale, int window)"
    " -> Tensor",
    _attention,
)


def attention(
    qkv: Tensor, heads: Heads, angles: Tensor, cache: PackedLayerCache, step: PackedStep
) -> Tensor:
    """[T, (heads + 2 kv heads) * head_dim] bf16, overwritten -> [T, heads * head_dim] bf16."""
    norm = heads.norm
    out: Tensor = _OPERATOR(
        qkv,
        None if norm is None else norm.query_weight,
        None if norm is None else norm.key_weight,
        0.0 if norm is None else norm.eps,
        angles,
        cache.data,
        list(cache.code),
        step.spans,
        step.tables,
        heads.num_heads,
        heads.scale,
        0 if heads.window is None else heads.window,
    )
    return out
