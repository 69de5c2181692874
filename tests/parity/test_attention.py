"""The paged attention kernel against attention written out over whole sequences."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scalellm.kernels.attention import (
    KVCache,
    KVGeometry,
    paged_attention,
    plan_attention,
    write_kv,
)
from scalellm.kernels.attention.step import SpanLayout

CPU = torch.device("cpu")


def dense(query, keys, values, start, scale, window, softcap, sinks):
    """[n, heads, d] queries at positions start.. over [end, heads, d] keys, one by one."""
    rows = []
    for i, q in enumerate(query):
        first = 0 if window is None else max(0, start + i + 1 - window)
        visible = slice(first, start + i + 1)
        scores = torch.einsum("hd,khd->hk", q, keys[visible]) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        top = scores if sinks is None else torch.cat([scores, sinks[:, None]], 1)
        weights = (scores - top.logsumexp(1, keepdim=True)).exp()
        rows.append(torch.einsum("hk,khd->hd", weights, values[visible]))
    return torch.stack(rows)


@st.composite
def problems(draw):
    return {
        "kv_heads": draw(st.integers(1, 3)),
        "group": draw(st.integers(1, 4)),
        "key_dim": draw(st.sampled_from([1, 6, 16, 33])),
        "value_dim": draw(st.sampled_from([None, None, 5])),
        "block_size": draw(st.sampled_from([1, 3, 16])),
        "spans": draw(
            st.lists(
                st.tuples(st.integers(0, 70), st.sampled_from([1, 1, 1, 2, 5, 40])),
                min_size=1,
                max_size=8,
            )
        ),
        "window": draw(st.sampled_from([None, None, 1, 4, 20, 1000])),
        "softcap": draw(st.sampled_from([None, None, 2.0])),
        "with_sinks": draw(st.booleans()),
        "seed": draw(st.integers(0, 2**31)),
    }


@settings(max_examples=80, deadline=None)
@given(problems())
def test_paged_equals_dense(problem):
    rng = torch.Generator().manual_seed(problem["seed"])
    kv_heads, heads = problem["kv_heads"], problem["kv_heads"] * problem["group"]
    dk, size = problem["key_dim"], problem["block_size"]
    dv = problem["value_dim"] or dk
    window, spans = problem["window"], problem["spans"]
    geometry = KVGeometry(1, kv_heads, dk, dv, (window,))
    needed = [-(-(start + count) // size) for start, count in spans]
    cache = KVCache.allocate(geometry, sum(needed) + 1, size, torch.float32, CPU)
    layer = cache.layers[0]
    # What earlier owners left behind must not matter.
    layer.keys.fill_(torch.nan)
    layer.values.fill_(torch.nan)
    order = torch.randperm(sum(needed), generator=rng).numpy()
    tables = np.split(order, np.cumsum(needed)[:-1])

    def randn(*shape):
        return torch.randn(*shape, generator=rng)

    keys = [randn(start + count, kv_heads, dk) for start, count in spans]
    values = [randn(start + count, kv_heads, dv) for start, count in spans]

    def step(parts):
        """Plan and store the positions start .. start + count of each sequence."""
        layouts, row = [], 0
        for index, start, count in parts:
            layouts.append(SpanLayout(row, start, count, tables[index]))
            row += count
        plan = plan_attention(layouts, geometry, size, torch.float32, CPU)
        new = [torch.cat([x[i][s : s + c] for i, s, c in parts]) for x in (keys, values)]
        write_kv(layer, *new, plan)
        return plan

    if past := [(i, 0, start) for i, (start, _) in enumerate(spans) if start]:
        step(past)
    plan = step([(i, start, count) for i, (start, count) in enumerate(spans)])
    query = randn(sum(count for _, count in spans), heads, dk)
    sinks = randn(heads) if problem["with_sinks"] else None
    softcap = problem["softcap"]
    scale = 1 / math.sqrt(dk)
    found = paged_attention(
        query, layer, plan, scale=scale, window=window, softcap=softcap, sinks=sinks
    )
    assert found.shape == (len(query), heads, dv)
    counts = [count for _, count in spans]
    for i, (q, part) in enumerate(zip(query.split(counts), found.split(counts), strict=True)):
        start = spans[i][0]
        k, v = (x[i].repeat_interleave(problem["group"], 1) for x in (keys, values))
        expected = dense(q, k, v, start, scale, window, softcap, sinks)
        torch.testing.assert_close(part, expected, atol=2e-5, rtol=1e-4)


def test_a_row_does_not_depend_on_its_batch():
    """Alone or beside sequences of other lengths: the same numbers to rounding."""
    geometry = KVGeometry(1, 2, 8, 8, (None,))
    cache = KVCache.allocate(geometry, 64, 4, torch.float32, CPU)
    layer = cache.layers[0]
    layer.keys.normal_()
    layer.values.normal_()
    query = torch.randn(9, 4, 8)
    spans = [SpanLayout(i, 25 * i % 60, 1, np.arange(16) + i) for i in range(9)]
    together = paged_attention(
        query, layer, plan_attention(spans, geometry, 4, torch.float32, CPU), scale=0.3
    )
    for i, span in enumerate(spans):
        alone = SpanLayout(0, span.start, 1, span.block_table)
        plan = plan_attention([alone], geometry, 4, torch.float32, CPU)
        found = paged_attention(query[i : i + 1], layer, plan, scale=0.3)
        torch.testing.assert_close(found[0], together[i])


@pytest.mark.parametrize("window", [None, 100])
def test_windowed_layers_gather_only_what_they_see(window):
    geometry = KVGeometry(1, 1, 4, 4, (window,))
    span = SpanLayout(0, 1000, 1, np.arange(63))
    plan = plan_attention([span], geometry, 16, torch.float32, CPU)
    gathered = len(plan.windows[window].decodes[0].gather)
    assert gathered == (63 if window is None else 7)
