import pytest

from scalellm.bench.prompts import make_prompts
from scalellm.bench.target import TargetClient, discover
from scalellm.errors import ConfigError


def made(endpoint, kind="completions", tokens=128, number=5, seed=0, **options):
    client = TargetClient(endpoint.url)
    return make_prompts(client, "tiny", kind, tokens, number, seed, **options)


@pytest.mark.parametrize("kind", ["completions", "chat"])
def test_texts_have_the_exact_count_with_template_and_special_tokens(endpoint, kind) -> None:
    endpoint.behaviour.template_tokens = 11
    endpoint.behaviour.letters_a_token = 5  # longer words are two tokens, and must not be used
    found = made(endpoint, kind)
    assert (found.method, found.exact, len(found.prompts)) == ("tokenize", True, 5)
    assert {endpoint.behaviour.count(prompt.text) for prompt in found.prompts} == {128}
    assert len({prompt.text for prompt in found.prompts}) == 5, "no two are equal"


def test_equal_seeds_make_equal_prompts(endpoint) -> None:
    assert made(endpoint, seed=3) == made(endpoint, seed=3)
    assert made(endpoint, seed=3) != made(endpoint, seed=4)


def test_a_template_longer_than_the_prompt_is_refused_with_its_length(endpoint) -> None:
    endpoint.behaviour.template_tokens = 30
    with pytest.raises(ConfigError, match="got 20; a prompt of one word is 31"):
        made(endpoint, tokens=20)


def test_without_tokenize_completions_get_ids(endpoint) -> None:
    endpoint.behaviour.has_tokenize = False
    found = made(endpoint)
    assert (found.method, found.exact) == ("token_ids", True)
    assert {len(prompt.token_ids) for prompt in found.prompts} == {128}
    assert len(set(found.prompts)) == 5


@pytest.mark.parametrize("kind", ["completions", "chat"])
def test_without_tokenize_or_ids_words_are_calibrated_by_usage(endpoint, kind) -> None:
    endpoint.behaviour.has_tokenize = endpoint.behaviour.takes_ids = False
    endpoint.behaviour.template_tokens = 9
    found = made(endpoint, kind)
    assert (found.method, found.exact) == ("words", False)
    assert {endpoint.behaviour.count(prompt.text) for prompt in found.prompts} == {128}


def test_a_tokenizer_whose_words_are_all_long_falls_back_to_ids(endpoint) -> None:
    endpoint.behaviour.letters_a_token = 1
    assert made(endpoint).method == "token_ids"


def test_an_unreachable_target_is_not_asked(endpoint) -> None:
    endpoint.stop()
    found = make_prompts(TargetClient(endpoint.url), "tiny", "chat", 16, 2, 0, reachable=False)
    assert [len(prompt.text.split()) for prompt in found.prompts] == [16, 16]


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


@pytest.mark.parametrize("url", ["https://a", "a:8000", "http://", "http://a:x", ""])
def test_urls_that_cannot_be_are_refused(url) -> None:
    with pytest.raises(ConfigError, match="url: got"):
        TargetClient(url)
