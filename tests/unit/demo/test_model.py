"""The committed demo model: its folder, its tokenizer, its answers."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from scalellm.demo import model_folder
from scalellm.demo.corpus import END_OF_TEXT, END_OF_TURN, START_OF_TURN, Message, render

MAX_FOLDER_BYTES = 8_000_000


def read_json(name: str) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((model_folder() / name).read_text(encoding="utf-8"))
    return value


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(model_folder() / "tokenizer.json"))


def test_finding_the_folder_does_not_import_torch() -> None:
    program = (
        "import sys; from scalellm.demo import model_folder; "
        "assert model_folder().is_dir(); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_the_folder_is_complete_and_small() -> None:
    files = {path.name: path.stat().st_size for path in model_folder().iterdir()}
    assert set(files) == {
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert sum(files.values()) <= MAX_FOLDER_BYTES


def test_the_configuration_fits_the_tokenizer_and_the_kernels(tokenizer: Tokenizer) -> None:
    config = read_json("config.json")
    assert config["architectures"] == ["Qwen3ForCausalLM"]
    assert config["vocab_size"] == tokenizer.get_vocab_size() <= 1500
    assert config["tie_word_embeddings"] is True
    assert config["max_position_embeddings"] == 2048
    # Eight quantisation groups of 32 columns along each input of a row-parallel layer.
    attention_width = config["num_attention_heads"] * config["head_dim"]
    for width in (config["hidden_size"], config["intermediate_size"], attention_width):
        assert width % 256 == 0
    end_of_turn = tokenizer.token_to_id(END_OF_TURN)
    assert config["eos_token_id"] == end_of_turn
    generation = read_json("generation_config.json")
    assert generation["eos_token_id"] == [end_of_turn, tokenizer.token_to_id(END_OF_TEXT)]


def test_every_digit_is_a_token_of_its_own(tokenizer: Tokenizer) -> None:
    digits = {token: tokenizer.token_to_id(token) for token in "0123456789"}
    assert None not in digits.values()
    with_digits = {t for t in tokenizer.get_vocab() if any(c in "0123456789" for c in t)}
    assert with_digits == set(digits)
    tokens = tokenizer.encode("47+135?").tokens
    assert tokens == ["4", "7", "+", "1", "3", "5", "?"]


@given(text=st.text())
def test_any_text_survives_encoding_and_decoding(text: str) -> None:
    tokenizer = Tokenizer.from_file(str(model_folder() / "tokenizer.json"))
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_all_bytes_are_in_the_vocabulary(tokenizer: Tokenizer) -> None:
    every_character = "".join(map(chr, [*range(0x800), *range(0x800, 0xD800, 61), 0x10FFFF]))
    ids = tokenizer.encode(every_character, add_special_tokens=False).ids
    assert tokenizer.decode(ids) == every_character
    assert len([t for t in tokenizer.get_vocab() if len(t) == 1]) == 256


def test_special_tokens_are_single_ids(tokenizer: Tokenizer) -> None:
    ids = [tokenizer.encode(t).ids for t in (END_OF_TEXT, START_OF_TURN, END_OF_TURN)]
    assert ids == [[0], [1], [2]]


def test_the_chat_template_writes_what_the_model_was_trained_on() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder())
    messages = [Message("system", "Be brief."), Message("user", "Hi"), Message("assistant", "Yes.")]
    turns = [{"role": m.role, "content": m.content} for m in messages]
    assert tokenizer.apply_chat_template(turns, tokenize=False) == render(messages)
    prompt = tokenizer.apply_chat_template(turns[:2], tokenize=False, add_generation_prompt=True)
    assert prompt == render(messages[:2]) + "<|im_start|>assistant\n"
    parts = [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
    assert tokenizer.apply_chat_template(parts, tokenize=False) == render([Message("user", "Hi")])


def test_the_card_gives_measured_figures() -> None:
    card = (model_folder() / "README.md").read_text(encoding="utf-8")
    for measured in ("additions, plain", "subtractions, plain", "capitals", "Held-out loss"):
        assert measured in card


@pytest.mark.slow
def test_held_out_sums_and_facts_are_right() -> None:
    import torch

    from scalellm.demo.evaluate import Judge, score_facts, score_sums

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        judge = Judge(Path(model_folder()))
        wrong: list[tuple[str, str]] = []
        for score in score_sums(judge, wrong, stride=20):
            # A bare number, without the sum before it, is what a model this small finds hard.
            least = 0.9 if "number only" in score.name else 0.98
            assert score.share >= least, (score, wrong)
        for score in score_facts(judge, wrong):
            assert score.right == score.total, (score, wrong)
    finally:
        torch.set_num_threads(threads)
