"""The demo model's training: what it weighs, what it computes, what it writes."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from scalellm.demo.corpus import Message, render
from scalellm.demo.network import Network, Shape
from scalellm.demo.tokenizer import train_tokenizer
from scalellm.demo.train import ROW_KINDS, Packer, Recipe, learning_rate, save, train

TINY = Shape(
    vocab_size=400,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(TINY.vocab_size, seed=3, num_documents=300)


def test_the_tokenizer_is_the_same_every_time(tokenizer: Tokenizer) -> None:
    again = train_tokenizer(TINY.vocab_size, seed=3, num_documents=300)
    assert again.to_str() == tokenizer.to_str()


def test_a_corpus_too_small_for_the_vocabulary_is_refused() -> None:
    with pytest.raises(ValueError, match="100000 are wanted"):
        train_tokenizer(100_000, seed=3, num_documents=20)


def test_results_weigh_more_and_questions_less_than_answers(tokenizer: Tokenizer) -> None:
    recipe = Recipe()
    packer = Packer(tokenizer, 1, ROW_KINDS[0], recipe)
    text = render([Message("user", "3+4?"), Message("assistant", "3 + 4 = 7.")])
    encoding = tokenizer.encode(text)
    weights = packer.weights(encoding.ids)
    by_token = list(zip(encoding.tokens, weights, strict=True))
    assert by_token[:3] == [("<|im_start|>", 0.1), ("user", 0.1), ("Ċ", 0.1)]
    answer_at = encoding.tokens.index("assistant") + 2
    assert by_token[answer_at:] == [
        ("3", 1.0),
        ("Ġ+", 1.0),
        ("Ġ", 1.0),
        ("4", 1.0),
        ("Ġ=", 1.0),
        ("Ġ", recipe.result_weight),
        ("7", recipe.result_weight),
        (".", 1.0),
        ("<|im_end|>", 1.0),
        ("Ċ", recipe.question_weight),
    ]


def test_an_answer_that_is_only_a_number_weighs_as_a_result(tokenizer: Tokenizer) -> None:
    recipe = Recipe()
    packer = Packer(tokenizer, 1, ROW_KINDS[0], recipe)
    text = render([Message("user", "3-14?"), Message("assistant", "-11")])
    encoding = tokenizer.encode(text)
    assert encoding.tokens[-5:] == ["-", "1", "1", "<|im_end|>", "Ċ"]
    high = recipe.result_weight
    assert packer.weights(encoding.ids)[-5:] == [high, high, high, 1.0, recipe.question_weight]


def test_the_learning_rate_rises_stays_and_falls_to_zero() -> None:
    recipe = Recipe(steps=1000)
    rates = [learning_rate(recipe, step) for step in range(recipe.steps)]
    assert rates[0] < rates[recipe.warmup_steps // 2] < recipe.peak_learning_rate
    assert rates[recipe.warmup_steps] == rates[500] == recipe.peak_learning_rate
    assert 0 < rates[-1] < 1e-4 * recipe.peak_learning_rate
    assert rates[600:] == sorted(rates[600:], reverse=True)


def test_the_network_computes_what_transformers_computes(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    network = Network(TINY)
    for parameter in network.parameters():
        # Larger than at the start of training, and exact in the folder's bf16.
        parameter.data.add_(torch.randn_like(parameter), alpha=0.3)
        parameter.data.copy_(parameter.data.bfloat16())
    save(network, tokenizer, TINY, tmp_path)
    peer = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ids = torch.randint(TINY.vocab_size, (2, 50))
    with torch.no_grad():
        torch.testing.assert_close(network(ids), peer(ids).logits, atol=2e-4, rtol=1e-4)


def test_two_trainings_give_the_same_weights(tokenizer: Tokenizer) -> None:
    recipe = Recipe(steps=3)
    first = train(tokenizer, TINY, recipe).state_dict()
    second = train(tokenizer, TINY, recipe).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
