"""Speculation changes when tokens come, never which: whole engines with and without it."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from scalellm import LLM, SamplingParams

TINY = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "dtype": "bfloat16",
    "eos_token_id": 2,
}
PARAMS = {
    "greedy": SamplingParams(temperature=0.0, max_tokens=90, ignore_eos=True),
    "greedy with logprobs": SamplingParams(temperature=0.0, max_tokens=60, logprobs=3),
    "sampled": SamplingParams(temperature=0.7, seed=5, max_tokens=60),
    "truncated": SamplingParams(temperature=0.5, top_p=0.8, top_k=40, seed=6, max_tokens=60, n=2),
    "penalised": SamplingParams(
        temperature=0.3,
        seed=7,
        max_tokens=60,
        repetition_penalty=1.05,
        frequency_penalty=0.01,
        presence_penalty=0.1,
        logprobs=1,
    ),
    "bounded": SamplingParams(temperature=0.1, seed=8, max_tokens=40, min_tokens=20),
}


def engines(settings: dict[str, object]) -> Iterator[tuple[LLM, LLM]]:
    more = {"cpu_threads": 1, "kv_cache_memory_bytes": 16 << 20, "max_model_len": 512, **settings}
    model = more.pop("model")
    with LLM(model, **more) as plain, LLM(model, speculative="ngram", **more) as guessing:
        yield plain, guessing


@pytest.fixture(scope="module")
def demo() -> Iterator[tuple[LLM, LLM]]:
    yield from engines({"model": "demo"})


@pytest.fixture(scope="module")
def random_weights(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[LLM, LLM]]:
    folder: Path = tmp_path_factory.mktemp("tiny")
    (folder / "config.json").write_text(json.dumps(TINY), encoding="utf-8")
    yield from engines({"model": str(folder), "load_format": "dummy", "kv_cache_dtype": "int8"})


def outcome(llm: LLM, prompts: list[list[int]], params: SamplingParams) -> list[object]:
    return [
        (choice.token_ids, choice.finish_reason, choice.logprobs)
        for output in llm.generate(prompts, params, use_tqdm=False)
        for choice in output.outputs
    ]


@pytest.mark.parametrize("name", PARAMS)
@pytest.mark.parametrize("model", ["demo", "random_weights"])
def test_answers_are_the_same_with_and_without(
    model: str, name: str, request: pytest.FixtureRequest
) -> None:
    plain, guessing = request.getfixturevalue(model)
    repeated = [[11, 12, 13, 14, 15, 16, 17] * 9, [60, 61, 62] * 20]
    prompts = [*repeated, list(range(40, 75)), [100 + i * i % 97 for i in range(50)]]
    assert outcome(guessing, prompts, PARAMS[name]) == outcome(plain, prompts, PARAMS[name])


def test_drafts_are_made_and_some_are_right(random_weights: tuple[LLM, LLM]) -> None:
    plain, guessing = random_weights
    outcome(guessing, [[7, 8, 9] * 20], PARAMS["greedy"])
    scheduler = guessing._engine._loop.scheduler
    assert 0 < scheduler.num_right_drafts <= scheduler.num_drafts
    assert plain._engine._loop.scheduler.num_drafts == 0
