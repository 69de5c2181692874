"""The CPU's kernels in whole models: near transformers, equal bits however a step is made up."""

from random import Random

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from scalellm.config import EngineConfig
from scalellm.errors import ConfigError
from scalellm.executor.batch import Batch, Span
from scalellm.executor.single import SingleExecutor
from scalellm.kernels.sampling import DRAW, draw

BLOCK = 16
TOKENS = 70
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
TINY = {
    "vocab_size": 211,
    "hidden_size": 64,
    "intermediate_size": 288,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    **SPECIAL,
}
EXPERTS = {"num_experts_per_tok": 2}
CASES = {
    "llama": LlamaConfig(**TINY, head_dim=64),
    "llama-biases": LlamaConfig(**TINY, head_dim=18, attention_bias=True, mlp_bias=True),
    "mistral-window": MistralConfig(**TINY, head_dim=32, sliding_window=21),
    "qwen2": Qwen2Config(**TINY, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**TINY, head_dim=128, tie_word_embeddings=True),
    "mixtral": MixtralConfig(**TINY, **EXPERTS, num_local_experts=4),
    "qwen3-moe": Qwen3MoeConfig(
        **TINY, **EXPERTS, head_dim=32, num_experts=5, moe_intermediate_size=96
    ),
}
# How far logits of unit size may be from fp32's, by the storage of weights: root mean square.
ERROR = {"none": 0.03, "int8": 0.06, "int4": 0.6}


@pytest.fixture(scope="module", params=CASES)
def model(request, tmp_path_factory):
    """(transformers' fp32 model, folder with its bf16 weights)"""
    torch.manual_seed(0)
    reference = AutoModelForCausalLM.from_config(CASES[request.param]).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in reference.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            scale = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.2
            parameter.mul_(parameter.dim() == 1).add_(scale * noise)
            parameter.copy_(parameter.bfloat16())
    folder = tmp_path_factory.mktemp(request.param)
    reference.bfloat16().save_pretrained(folder)
    return reference.float(), folder


def load(folder, **settings):
    return SingleExecutor.load(
        EngineConfig(
            model_path=folder,
            dtype="bfloat16",
            device="cpu",
            block_size=BLOCK,
            kv_cache_memory_bytes=8 << 20,
            **settings,
        )
    )


def forward(executor, *spans):
    logits = executor.forward(Batch(spans)).clone()
    return logits.split([span.num_logits for span in spans])


def whole(executor, ids, first_block=0):
    table = range(first_block, first_block + -(-len(ids) // BLOCK))
    return forward(executor, Span(ids, 0, table, len(ids)))[0]


def ids_of(count, seed=1):
    random = Random(seed)
    return [random.randrange(TINY["vocab_size"]) for _ in range(count)]


@pytest.mark.parametrize("quantization", ERROR)
def test_near_transformers(model, quantization):
    reference, folder = model
    ids = ids_of(TOKENS)
    with torch.inference_mode():
        expected = reference(input_ids=torch.tensor([ids])).logits[0]
    found = whole(load(folder, quantization=quantization), ids)
    error = (found - expected).pow(2).mean().sqrt() / expected.std()
    limit = ERROR[quantization]
    if "Moe" in type(reference).__name__ or "Mixtral" in type(reference).__name__:
        # Rounding may swap two nearly equal experts; most positions are not near such an edge.
        error = (found - expected).pow(2).mean(-1).sqrt().median() / expected.std()
        limit *= 2
    assert error < limit


@pytest.mark.parametrize("quantization", ERROR)
@pytest.mark.parametrize("kv_cache_dtype", ["auto", "int8"])
def test_bits_do_not_depend_on_how_steps_are_made_up(model, quantization, kv_cache_dtype):
    """Alone, in chunks, token by token among others, and computed again after a preemption."""
    executor = load(model[1], quantization=quantization, kv_cache_dtype=kv_cache_dtype)
    ids, other = ids_of(TOKENS), ids_of(40, seed=2)
    alone = whole(executor, ids)
    table, beside = range(10, 16), range(20, 24)
    chunks = []
    for first, last in ((0, 7), (7, 39), (39, 40), (40, TOKENS)):
        span = Span(ids[first:last], first, table, last - first)
        chunks.append(forward(executor, Span(other[:33], 0, beside, 0), span)[1])
    assert torch.equal(torch.cat(chunks), alone)
    for position in range(50, TOKENS):  # decodes over the cache that the chunks wrote
        spans = [
            Span(other[33:34], 33, beside, 1),
            Span(ids[position : position + 1], position, table, 1),
        ]
        assert torch.equal(forward(executor, *spans)[1][0], alone[position])
    assert torch.equal(whole(executor, ids, 30), alone), "computed again in other blocks"


def test_recorded_and_eager_steps_are_equal(model):
    ids = ids_of(TOKENS)
    for quantization in ERROR:
        recorded = load(model[1], quantization=quantization)
        eager = load(model[1], quantization=quantization, enforce_eager=True)
        assert recorded.recorded and not eager.recorded
        assert torch.equal(whole(recorded, ids), whole(eager, ids))


def test_ids_without_logits_are_those_of_the_largest(model):
    ids = ids_of(TOKENS)
    for quantization in ERROR:
        executor = load(model[1], quantization=quantization)
        expected = whole(executor, ids).argmax(-1).tolist()
        table = range(5)
        found = executor.greedy(Batch((Span(ids[:50], 0, table, 50),)))
        found += executor.greedy(Batch((Span(ids[50:60], 50, table, 10),)))
        assert executor.greedy(Batch((Span(ids[60:65], 60, table, 0),))) == []
        found += [None] * 5
        found += executor.greedy(Batch((Span(ids[65:], 65, table, 5),)))
        expected[60:65] = [None] * 5
        assert found == expected
    eager = load(model[1], enforce_eager=True)
    assert eager.greedy(Batch((Span(ids, 0, range(5), 1),))) is None


def test_ids_drawn_without_logits_are_those_of_written_ones(model):
    ids = ids_of(TOKENS)
    kinds = [(0.0, 0, 1.0), (1.0, 5, 1.0), (0.7, 20, 0.9), (1.5, 64, 0.5), (2.0, 1, 1.0)]
    draws = np.zeros(TOKENS, DRAW)
    for index, one in enumerate(draws):
        one["temperature"], one["top_k"], one["top_p"] = kinds[index % len(kinds)]
        one["seed"], one["index"] = 9, index
    for quantization in ERROR:
        executor = load(model[1], quantization=quantization)
        expected = draw(whole(executor, ids), draws)
        assert len(set(expected)) > 10
        batch = Batch((Span(ids, 0, range(5), TOKENS),))
        assert executor.draw(batch, draws) == expected
        for most in (0, 65):
            draws["top_k"][1] = most
            with pytest.raises(ValueError, match="64 largest"):
                executor.draw(batch, draws)
        draws["top_k"][1] = 5
        with pytest.raises(ValueError, match="70 logit rows"):
            executor.draw(batch, draws[1:])
    eager = load(model[1], enforce_eager=True)
    assert eager.draw(batch, draws) is None


def test_int8_keys_and_values_cost_little(model):
    ids = ids_of(TOKENS)
    exact, narrow = load(model[1]), load(model[1], kv_cache_dtype="int8")
    assert narrow.num_blocks > 1.5 * exact.num_blocks
    expected, found = whole(exact, ids), whole(narrow, ids)
    error = (found - expected).pow(2).mean(-1).sqrt().median() / expected.std()
    assert 0 < error < 0.05


def test_quantisation_that_no_kernel_does_is_refused(model):
    folder = model[1]
    for settings, message in (
        (
            {"dtype": "float32", "quantization": "int8"},
            "--quantization int8 needs --dtype bfloat16",
        ),
        ({"dtype": "float32", "kv_cache_dtype": "int8"}, "--kv-cache-dtype int8 needs --dtype"),
        ({"dtype": "bfloat16", "quantization": "int4", "block_size": 8}, "--block-size"),
    ):
        with pytest.raises(ConfigError, match=message):
            SingleExecutor.load(EngineConfig(model_path=folder, device="cpu", **settings))
