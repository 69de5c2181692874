"""Every family and the fallback against transformers: logits at each position, greedy tokens."""

import pytest
import torch
from transformers import (
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    OPTConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
)

from scalellm.executor.batch import Span

TOLERANCE = 1e-4
WINDOW = 9

_SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_TINY = {
    "vocab_size": 101,
    "hidden_size": 48,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    **_SPECIAL,
}
_TINY_MHA = {key: value for key, value in _TINY.items() if key != "num_key_value_heads"}

NATIVE: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**_TINY),
    "llama-mha": LlamaConfig(**_TINY | {"num_key_value_heads": 4}),
    "llama-mqa-tied": LlamaConfig(**_TINY | {"num_key_value_heads": 1}, tie_word_embeddings=True),
    "llama-head-14": LlamaConfig(**_TINY, head_dim=14),
    "llama-biases": LlamaConfig(**_TINY, attention_bias=True, mlp_bias=True),
    "mistral": MistralConfig(**_TINY, sliding_window=WINDOW),
    "mistral-no-window": MistralConfig(**_TINY, sliding_window=None, head_dim=20),
    "qwen2": Qwen2Config(**_TINY, tie_word_embeddings=True),
    "qwen2-window": Qwen2Config(
        **_TINY, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1
    ),
    "qwen3": Qwen3Config(**_TINY, head_dim=16, tie_word_embeddings=True),
    "qwen3-biases": Qwen3Config(**_TINY, head_dim=22, attention_bias=True),
    "mixtral": MixtralConfig(**_TINY, num_local_experts=4, num_experts_per_tok=2),
    "mixtral-window": MixtralConfig(**_TINY, num_local_experts=3, sliding_window=WINDOW),
    "qwen3-moe": Qwen3MoeConfig(
        **_TINY,
        head_dim=16,
        num_experts=6,
        num_experts_per_tok=3,
        moe_intermediate_size=24,
        norm_topk_prob=True,
    ),
    "qwen3-moe-some-dense": Qwen3MoeConfig(
        **_TINY | {"num_hidden_layers": 4},
        num_experts=5,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        decoder_sparse_step=2,
        mlp_only_layers=[3],
        norm_topk_prob=False,
    ),
}
FALLBACK: dict[str, PreTrainedConfig] = {
    "gemma2": Gemma2Config(
        **_TINY,
        head_dim=12,
        sliding_window=WINDOW,
        query_pre_attn_scalar=20,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=3.0,
    ),
    "phi3": Phi3Config(**_TINY, sliding_window=WINDOW),
    "gpt-neox": GPTNeoXConfig(**_TINY_MHA),
    "gpt2": GPT2Config(vocab_size=101, n_embd=48, n_layer=3, n_head=4, n_positions=128, **_SPECIAL),
    "opt": OPTConfig(
        vocab_size=101,
        hidden_size=48,
        word_embed_proj_dim=48,
        ffn_dim=56,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=128,
        **_SPECIAL,
    ),
    "olmo2": Olmo2Config(**_TINY),
    "smollm3": SmolLM3Config(**_TINY),
    "cohere": CohereConfig(**_TINY, logit_scale=1.0),
    "gpt-oss": GptOssConfig(
        **_TINY,
        head_dim=12,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
    "llama-gelu": LlamaConfig(**_TINY, hidden_act="gelu"),
}
CASES = NATIVE | FALLBACK

every_model = pytest.mark.parametrize("name", CASES)


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert expected.std() > 0.1, "logits this flat would hide a mistake"
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", NATIVE)
def test_families_run_on_their_own_code(make_pair, name):
    family = make_pair(NATIVE[name]).executor.model_config.family
    assert family == name.split("-")[0] + ("_moe" if "moe" in name else "")


@pytest.mark.parametrize("name", FALLBACK)
def test_the_rest_runs_on_transformers_code(make_pair, name):
    assert make_pair(FALLBACK[name]).executor.model_config.family == "transformers"


@every_model
def test_prompts_of_mixed_lengths_in_one_batch(make_pair, name):
    pair = make_pair(CASES[name])
    prompts = [pair.ids(count) for count in (13, 1, 4, 37, 8)]
    tables = [pair.blocks(len(prompt)) for prompt in prompts]
    found = pair.run(
        *(Span(ids, 0, table, len(ids)) for ids, table in zip(prompts, tables, strict=True))
    )
    for ids, logits in zip(prompts, found, strict=True):
        close(logits, pair.expected(ids))
    pair.release(*tables)


@every_model
def test_chunked_prompts_beside_decodes(make_pair, name):
    pair = make_pair(CASES[name])
    long, short = pair.ids(45), pair.ids(30)
    tables = pair.blocks(len(long)), pair.blocks(len(short))
    pieces: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
    at = [0, 0]
    for chunk, decode in ((1, 3), (7, 5), (8, 1), (16, 1), (1, 1), (2, 1), (10, 18)):
        spans = [
            Span(ids[start : start + count], start, table, count)
            for ids, start, table, count in zip(
                (long, short), at, tables, (chunk, decode), strict=True
            )
        ]
        for piece, logits in zip(pieces, pair.run(*spans), strict=True):
            piece.append(logits)
        at = [at[0] + chunk, at[1] + decode]
    assert at == [45, 30]
    close(torch.cat(pieces[0]), pair.expected(long))
    close(torch.cat(pieces[1]), pair.expected(short))
    pair.release(*tables)


@every_model
def test_prefix_hits_share_blocks(make_pair, name):
    pair = make_pair(CASES[name])
    prefix = pair.ids(24)
    shared = pair.blocks(24)
    pair.run(Span(prefix, 0, shared, 0))
    prompts = [prefix + pair.ids(count) for count in (1, 9, 5)]
    own = [pair.blocks(len(prompt) - 24) for prompt in prompts]
    found = pair.run(
        *(
            Span(ids[24:], 24, shared + blocks, len(ids) - 24)
            for ids, blocks in zip(prompts, own, strict=True)
        )
    )
    for ids, logits in zip(prompts, found, strict=True):
        close(logits, pair.expected(ids)[24:])
    pair.release(shared, *own)


@every_model
def test_recomputed_after_preemption(make_pair, name):
    pair = make_pair(CASES[name])
    ids, other = pair.ids(21), pair.ids(40)
    table = pair.blocks(40)
    pair.run(Span(ids[:18], 0, table, 1))
    pair.run(Span(ids[18:19], 18, table, 1))
    # Preempted: another sequence overwrites its blocks, and it starts again elsewhere.
    pair.run(Span(other, 0, table, 0))
    again = pair.blocks(21)
    found = pair.run(Span(ids[:20], 0, again, 1))[0]
    close(found, pair.expected(ids[:20])[-1:])
    close(pair.run(Span(ids[20:], 20, again, 1))[0], pair.expected(ids)[-1:])
    pair.release(table, again)


@every_model
def test_greedy_tokens_equal_transformers(make_pair, name):
    pair = make_pair(CASES[name])
    steps = 32
    sequences = [pair.ids(count) for count in (5, 12, 1)]
    prompts = [list(ids) for ids in sequences]
    tables = [pair.blocks(len(ids) + steps) for ids in sequences]
    done = [0, 0, 0]
    for step in range(steps):
        # The last request arrives while the others are decoding.
        live = range(2) if step < 3 else range(3)
        spans = [Span(sequences[i][done[i] :], done[i], tables[i], 1) for i in live]
        for i, logits in zip(live, pair.run(*spans), strict=True):
            done[i] = len(sequences[i])
            sequences[i].append(int(logits[0].argmax()))
    for prompt, ids in zip(prompts, sequences, strict=True):
        expected = pair.expected(ids).argmax(-1).tolist()
        assert ids[len(prompt) :] == expected[len(prompt) - 1 : -1]
    pair.release(*tables)


@every_model
def test_only_asked_logits_are_returned(make_pair, name):
    pair = make_pair(CASES[name])
    ids = pair.ids(10)
    table = pair.blocks(10)
    assert pair.run(Span(ids[:6], 0, table, 0))[0].shape == (0, 101)
    close(pair.run(Span(ids[6:], 6, table, 2))[0], pair.expected(ids)[-2:])
    pair.release(table)
