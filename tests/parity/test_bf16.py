"""bf16: as near to fp32 as transformers' own bf16 is."""

import dataclasses

import pytest
import torch
from transformers import Gemma2Config, Qwen3Config, Qwen3MoeConfig

from scalellm.config import EngineConfig
from scalellm.executor.batch import Batch, Span
from scalellm.executor.single import SingleExecutor

TINY = {
    "vocab_size": 101,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
CASES = {
    "qwen3": Qwen3Config(**TINY),
    "qwen3-moe": Qwen3MoeConfig(
        **TINY, num_experts=4, num_experts_per_tok=4, moe_intermediate_size=32, norm_topk_prob=True
    ),
    "gemma2": Gemma2Config(**TINY, sliding_window=9),
}


@pytest.mark.parametrize("name", CASES)
def test_error_is_that_of_bf16(make_pair, name):
    """All experts are chosen, since rounding may swap two nearly equal ones in either program."""
    pair = make_pair(CASES[name], "bfloat16")
    ids = pair.ids(48)
    exact = type(pair.reference)(pair.reference.config).eval()
    exact.load_state_dict(pair.reference.float().state_dict())
    pair.reference.to(torch.bfloat16)
    with torch.inference_mode():
        exact_logits = exact(input_ids=torch.tensor([ids])).logits[0].float()
    table = pair.blocks(48)
    found = torch.cat(
        [
            pair.run(Span(ids[:31], 0, table, 31))[0],
            *(pair.run(Span(ids[i : i + 1], i, table, 1))[0] for i in range(31, 48)),
        ]
    )
    ours = (found - exact_logits).pow(2).mean().sqrt()
    theirs = (pair.expected(ids) - exact_logits).pow(2).mean().sqrt()
    assert theirs > 0, "the reference must have rounded"
    assert ours < 1.5 * theirs
    pair.release(table)


def test_bf16_cache_under_an_fp32_model(make_pair):
    """--kv-cache-dtype bfloat16 halves the cache and costs its rounding only."""
    pair = make_pair(CASES["qwen3"])
    config = EngineConfig(
        model_path=pair.folder,
        dtype="float32",
        device="cpu",
        kv_cache_memory_bytes=1 << 20,
    )
    halved = dataclasses.replace(config, kv_cache_dtype="bfloat16")
    wide, narrow = SingleExecutor.load(config), SingleExecutor.load(halved)
    assert narrow.num_blocks == 2 * wide.num_blocks
    ids = pair.ids(20)
    batch = Batch((Span(ids, 0, [0, 1], 20),))
    torch.testing.assert_close(narrow.forward(batch), wide.forward(batch), atol=0.05, rtol=0)
