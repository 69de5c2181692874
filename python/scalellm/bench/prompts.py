"""Random prompts of an exact token count, by the best means the target offers.

tokenize    /tokenize is there: words that are one token each, and the count is checked
token_ids   completions that take id arrays: exact without a tokenizer
words       otherwise: words, their number corrected by the usage of two trial requests
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from scalellm.bench.plan import Endpoint, Prompt
from scalellm.bench.target import TargetClient
from scalellm.bench.words import WORDS
from scalellm.errors import ConfigError, EndpointError

# Ids that a vocabulary has and that are no special tokens: of usual ones, of tiny ones.
_ID_RANGES = ((300, 1000), (64, 256))
_FIRST_WORD = "the"
_FEWEST_WORDS = 8
_ENOUGH_WORDS = 128
_GROUP = 32
_MOST_QUESTIONS = 200
_CHECKED_PROMPTS = 16
_TRIAL_WORDS = 64


@dataclass(frozen=True, slots=True)
class PromptSet:
    """Prompts, how they were made, and whether their length is known to be the asked one."""

    prompts: tuple[Prompt, ...]
    method: str
    exact: bool


def make_prompts(
    client: TargetClient,
    model: str,
    endpoint: Endpoint,
    input_tokens: int,
    number: int,
    seed: int,
    reachable: bool = True,
) -> PromptSet:
    """Make `number` random prompts of `input_tokens` tokens, template and special tokens included.

    A target that is not `reachable` is not asked for anything.
    Raises ConfigError if the endpoint's template alone is longer than `input_tokens`.
    """
    source = random.Random(f"prompts {seed}")
    if not reachable:
        return PromptSet(_texts(WORDS, input_tokens, number, source), "words", exact=False)
    counter = TokenCounter(client, model, endpoint)
    try:
        return PromptSet(_counted_texts(counter, input_tokens, number, source), "tokenize", True)
    except (EndpointError, _NotAdditiveError):
        pass
    if endpoint == "completions" and (ids := _accepted_ids(client, model)) is not None:
        made = (tuple(source.choices(ids, k=input_tokens)) for _ in range(number))
        return PromptSet(tuple(Prompt(token_ids=ids) for ids in made), "token_ids", exact=True)
    words = _words_for(client, model, endpoint, input_tokens)
    return PromptSet(_texts(WORDS, words, number, source), "words", exact=False)


class _NotAdditiveError(Exception):
    """This tokenizer's counts do not add up word by word."""


class TokenCounter:
    """Counts a prompt's tokens by the target's `/tokenize`, as the endpoint would see it."""

    def __init__(self, client: TargetClient, model: str, endpoint: Endpoint) -> None:
        self._client = client
        self._model = model
        self._endpoint = endpoint

    def count(self, text: str) -> int:
        """Tokens of the whole prompt. Raises EndpointError where there is no such service."""
        body: dict[str, Any] = {"model": self._model}
        if self._endpoint == "chat":
            message = {"role": "user", "content": text}
            body |= {"messages": [message], "add_generation_prompt": True}
        else:
            body["prompt"] = text
        answer = self._client.call("POST", "/tokenize", body)
        tokens = answer.get("tokens") if isinstance(answer, dict) else None
        if not isinstance(tokens, list):
            raise EndpointError("/tokenize answers without tokens")
        return len(tokens)


def _counted_texts(
    counter: TokenCounter, tokens: int, number: int, source: random.Random
) -> tuple[Prompt, ...]:
    """Texts of words that are one token each, as many as the template leaves room for."""
    least = counter.count(_FIRST_WORD)
    words = _one_token_words(counter, WORDS, least)
    if len(words) < _FEWEST_WORDS:
        raise _NotAdditiveError
    if tokens <= least:
        raise ConfigError(
            f"input-tokens: got {tokens}; a prompt of one word is {least} tokens at this endpoint"
        )
    texts = [
        " ".join([_FIRST_WORD, *source.choices(words, k=tokens - least)]) for _ in range(number)
    ]
    if any(counter.count(text) != tokens for text in texts[:_CHECKED_PROMPTS]):
        raise _NotAdditiveError
    return tuple(Prompt(text=text) for text in texts)


def _one_token_words(counter: TokenCounter, words: Sequence[str], least: int) -> list[str]:
    """Some of `words` that add exactly one token each; halves groups to need few questions."""
    found: list[str] = []
    groups = [list(words[at : at + _GROUP]) for at in range(0, len(words), _GROUP)]
    for _ in range(_MOST_QUESTIONS):
        if not groups or len(found) >= _ENOUGH_WORDS:
            break
        group = groups.pop()
        if counter.count(" ".join([_FIRST_WORD, *group])) == least + len(group):
            found += group
        elif len(group) > 1:
            middle = len(group) // 2
            groups += [group[:middle], group[middle:]]
    return found


def _texts(
    words: Sequence[str], length: int, number: int, source: random.Random
) -> tuple[Prompt, ...]:
    texts = (" ".join(source.choices(words, k=length)) for _ in range(number))
    return tuple(Prompt(text=text) for text in texts)


def _accepted_ids(client: TargetClient, model: str) -> range | None:
    """A range of ids that the target takes as a prompt; None where it takes no ids."""
    for first, end in _ID_RANGES:
        body = {"model": model, "prompt": [first, end - 1], "max_tokens": 1}
        try:
            usage = client.call("POST", "/v1/completions", body).get("usage") or {}
        except (EndpointError, AttributeError):
            continue
        # Servers that read the list as two prompts, or as text, count otherwise.
        if usage.get("prompt_tokens", 2) in (2, 3):
            return range(first, end)
    return None


def _words_for(client: TargetClient, model: str, endpoint: Endpoint, tokens: int) -> int:
    """How many words make about `tokens` tokens, by the usage of two trials where it is given."""
    try:
        few = _prompt_tokens(client, model, endpoint, _TRIAL_WORDS)
        many = _prompt_tokens(client, model, endpoint, 2 * _TRIAL_WORDS)
    except (EndpointError, KeyError, TypeError):
        return max(1, tokens)
    tokens_per_word = max((many - few) / _TRIAL_WORDS, 0.1)
    template_tokens = few - tokens_per_word * _TRIAL_WORDS
    return max(1, round((tokens - template_tokens) / tokens_per_word))


def _prompt_tokens(client: TargetClient, model: str, endpoint: Endpoint, words: int) -> int:
    text = " ".join(random.Random(words).choices(WORDS, k=words))
    body: dict[str, Any] = {"model": model, "max_tokens": 1}
    if endpoint == "chat":
        path = "/v1/chat/completions"
        body["messages"] = [{"role": "user", "content": text}]
    else:
        path, body["prompt"] = "/v1/completions", text
    return int(client.call("POST", path, body)["usage"]["prompt_tokens"])
