"""`_core`'s tokenizer and detokeniser as Python uses them."""

import hashlib
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from scalellm import _core


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    library = Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=["</s>"], show_progress=False
    )
    library.train_from_iterator(["the end of the text"] * 20, trainer)
    library.save(str(folder / "tokenizer.json"))
    (folder / "generation_config.json").write_text('{"eos_token_id": [0, 7]}')
    return folder


def test_ids_and_text_are_those_of_the_tokenizers_library(folder: Path) -> None:
    library = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ours = _core.Tokenizer(str(folder))
    assert ours.vocab_size == library.get_vocab_size()
    assert ours.eos_token_ids == [0, 7]
    assert not ours.has_chat_template
    for text in ["the end", "ünï 東京 👩‍👩‍👧‍👦", "", "a</s>b"]:
        ids = library.encode(text).ids
        assert ours.encode(text) == ids
        assert ours.decode(ids) == library.decode(ids)
        assert ours.decode(ids, False) == library.decode(ids, skip_special_tokens=False) == text
        assert b"".join(ours.token_text(id)[1] for id in ids).decode() == text


def test_digest_is_of_tokenizer_json(folder: Path) -> None:
    expected = hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest()
    assert _core.tokenizer_digest(str(folder)) == expected
    assert _core.Tokenizer(str(folder)).digest == expected


def test_detokenizer_holds_back_half_characters_and_stops(folder: Path) -> None:
    tokenizer = _core.Tokenizer(str(folder))
    ids = tokenizer.encode("a👩b STOP c")
    detokenizer = _core.Detokenizer(tokenizer, [], ["STOP"])
    text, stopped = "", False
    for id in ids:
        new, stopped = detokenizer.push([id])
        assert "\ufffd" not in new
        text += new
        if stopped:
            break
    assert stopped
    assert text + detokenizer.finish() == "a👩b "
    included = _core.Detokenizer(tokenizer, [], ["STOP"], include_stop=True)
    assert included.push(ids) == ("a👩b STOP", True)
    late = _core.Detokenizer(tokenizer, [], ["STOP"], min_tokens=len(ids))
    assert late.push(ids)[0] + late.finish() == "a👩b STOP c"


def test_a_folder_without_a_tokenizer_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json"):
        _core.Tokenizer(str(tmp_path))
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    with pytest.raises(FileNotFoundError, match="save_pretrained"):
        _core.Tokenizer(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="damaged"):
        _core.Tokenizer(str(tmp_path))


def test_one_word_of_a_megabyte_is_tokenized(folder: Path) -> None:
    tokenizer = _core.Tokenizer(str(folder))
    word = "theend" * 170_000
    ids = tokenizer.encode(word)
    assert tokenizer.decode(ids) == word
    with pytest.raises(ValueError, match="at most"):
        tokenizer.encode("x" * (9 << 20))
