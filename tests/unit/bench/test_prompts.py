import pytest

from scalellm.bench import target as target_module
from scalellm.bench.prompts import make_speller, spell_all
from scalellm.bench.shapes import RequestShape, TurnShape
from scalellm.bench.target import TargetClient, discover
from scalellm.errors import ConfigError, EndpointError


def speller(endpoint, kind="completions", **options):
    return make_speller(TargetClient(endpoint.url), "tiny", kind, **options)


def made(endpoint, kind="completions", tokens=128, number=5, seed="0", shapes=None):
    found = speller(endpoint, kind)
    shapes = shapes or [RequestShape(tokens, 4)] * number
    return found, spell_all(found, shapes, seed, exactly=True)


@pytest.mark.parametrize("kind", ["completions", "chat"])
def test_texts_have_the_exact_count_with_template_and_special_tokens(endpoint, kind) -> None:
    endpoint.behaviour.template_tokens = 11
    endpoint.behaviour.letters_a_token = 5  # longer words are two tokens, and must not be used
    found, prompts = made(endpoint, kind)
    assert (found.method, found.exact, len(prompts)) == ("tokenize", True, 5)
    assert {endpoint.behaviour.count(prompt.text) for prompt in prompts} == {128}
    assert len({prompt.text for prompt in prompts}) == 5, "no two are equal"


def test_each_request_has_its_own_length(endpoint) -> None:
    endpoint.behaviour.template_tokens = 7
    _, prompts = made(endpoint, "chat", shapes=[RequestShape(n, n + 1) for n in (8, 9, 50, 3000)])
    assert [endpoint.behaviour.count(prompt.text) for prompt in prompts] == [8, 9, 50, 3000]
    assert [prompt.max_tokens for prompt in prompts] == [9, 10, 51, 3001]


@pytest.mark.parametrize("has_tokenize", [True, False])
def test_equal_blocks_are_equal_beginnings(endpoint, has_tokenize) -> None:
    endpoint.behaviour.has_tokenize = has_tokenize
    shapes = [RequestShape(40, 1, ids, block_tokens=16) for ids in ((1, 2, 3), (1, 2, 4), (1,))]
    _, prompts = made(endpoint, shapes=shapes)
    first, second, third = (prompt.token_ids or prompt.text.split() for prompt in prompts)
    assert len(first) == len(second) == len(third) == 40
    assert first[:32] == second[:32]
    assert first[33:] != second[33:]
    assert first[:16] == third[:16]
    assert first[17:] != third[17:]
    other, *_ = made(endpoint, shapes=shapes, seed="1")[1]
    assert (other.token_ids or other.text.split())[:16] != first[:16], "another level's text"


def test_a_chat_begins_with_its_system_prompt_and_has_its_turns(endpoint) -> None:
    turns = (TurnShape(7, 3, 0.5), TurnShape(9, 2, 0.0))
    shape = RequestShape(10, 4, system_id=1, system_tokens=20, turns=turns)
    _, (one, two) = made(endpoint, "chat", shapes=[shape, shape])
    system, user = one.messages
    assert [len(said["content"].split()) for said in one.messages] == [20, 10]
    assert (system["role"], user["role"], one.max_tokens) == ("system", "user", 4)
    assert [(len(turn.text.split()), turn.max_tokens, turn.after_s) for turn in one.turns] == [
        (7, 3, 0.5), (9, 2, 0.0),
    ]  # fmt: skip
    assert two.messages[0] == system
    assert two.messages[1] != user


def test_equal_seeds_make_equal_prompts(endpoint) -> None:
    assert made(endpoint, seed="3") == made(endpoint, seed="3")
    assert made(endpoint, seed="3") != made(endpoint, seed="4")


def test_a_template_longer_than_the_prompt_is_refused_with_its_length(endpoint) -> None:
    endpoint.behaviour.template_tokens = 30
    with pytest.raises(ConfigError, match="got 20; a prompt of one word is 31"):
        made(endpoint, tokens=20)


def test_without_tokenize_completions_get_ids(endpoint) -> None:
    endpoint.behaviour.has_tokenize = False
    found, prompts = made(endpoint)
    assert (found.method, found.exact) == ("token_ids", True)
    assert {len(prompt.token_ids) for prompt in prompts} == {128}
    assert len(set(prompts)) == 5


@pytest.mark.parametrize("kind", ["completions", "chat"])
def test_without_tokenize_or_ids_words_are_calibrated_by_usage(endpoint, kind) -> None:
    endpoint.behaviour.has_tokenize = endpoint.behaviour.takes_ids = False
    endpoint.behaviour.template_tokens = 9
    found, prompts = made(endpoint, kind)
    assert (found.method, found.exact) == ("words", False)
    assert {endpoint.behaviour.count(prompt.text) for prompt in prompts} == {128}


def test_a_tokenizer_whose_words_are_all_long_falls_back_to_ids(endpoint) -> None:
    endpoint.behaviour.letters_a_token = 1
    assert speller(endpoint).method == "token_ids"


def test_an_unreachable_target_is_not_asked(endpoint) -> None:
    endpoint.stop()
    found = speller(endpoint, "chat", reachable=False)
    prompts = spell_all(found, [RequestShape(16, 1)] * 2, "0", exactly=True)
    assert [len(prompt.text.split()) for prompt in prompts] == [16, 16]


def test_discovery_tells_models_and_owner(endpoint) -> None:
    endpoint.behaviour.owned_by = "vllm"
    target = discover(TargetClient(endpoint.url + "/v1/"))
    assert (target.models, target.problem) == (("tiny",), None)
    assert target.tells_token_ids


def test_discovery_survives_a_target_that_is_gone(endpoint) -> None:
    endpoint.stop()
    target = discover(TargetClient(endpoint.url))
    assert target.models == ()
    assert "refused" in target.problem


@pytest.mark.parametrize("url", ["ftp://a", "a:8000", "http://", "http://a:x", ""])
def test_urls_that_cannot_be_are_refused(url) -> None:
    with pytest.raises(ConfigError, match="url: got"):
        TargetClient(url)


def test_an_answer_that_never_ends_is_given_up(endpoint, monkeypatch) -> None:
    monkeypatch.setattr(target_module, "_ANSWER_WITHIN_S", 0.0)
    endpoint.behaviour.token_gap_s = 0.01
    body = {"model": "tiny", "prompt": "a", "max_tokens": 1 << 30, "stream": True}
    with pytest.raises(EndpointError, match="does not end"):
        TargetClient(endpoint.url).call("POST", "/v1/completions", body)
