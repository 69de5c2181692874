"""Spells requests as prompts of an exact token count, by the best means the target offers.

tokenize    /tokenize is there: words that are one token each, and the count is checked
token_ids   completions that take id arrays: exact without a tokenizer
words       otherwise: words, their number corrected by the usage of two trial requests
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from scalellm.bench.plan import Endpoint
from scalellm.bench.shapes import Prompt, PromptTurn, RequestShape
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
# Between what was said and what the user says next, where both are one text.
_NEXT_TURN = "\n"
_Piece = TypeVar("_Piece", str, int)


@dataclass(frozen=True, slots=True)
class Speller:
    """Turns lengths into words or ids; how many of them a prompt of so many tokens has."""

    method: str
    exact: bool
    endpoint: Endpoint
    words: tuple[str, ...] = WORDS
    ids: range | None = None
    first_word: str = ""
    template_tokens: float = 0.0  # with the first word, where there is one
    tokens_per_word: float = 1.0
    seed: str = ""  # of what is shared: equal ids are equal text within one seed

    @property
    def least_tokens(self) -> int:
        """Length of the shortest prompt that can be made: of one word, or one id."""
        of_a_word = 0.0 if self.first_word else self.tokens_per_word
        return max(1, round(self.template_tokens + of_a_word))

    def spell(self, shape: RequestShape, unique: random.Random) -> Prompt:
        """The prompt of a shape: shared blocks by their ids, the rest from `unique`."""
        if shape.prompt is not None:
            return replace(shape.prompt, max_tokens=shape.output_tokens)
        if shape.turns or shape.system_id is not None:
            return self._conversation(shape, unique)
        if self.ids is not None:
            ids = self._blocks(shape, shape.input_tokens, unique, self._some_ids)
            return Prompt(token_ids=tuple(ids), max_tokens=shape.output_tokens)
        number = self._pieces(shape.input_tokens - self.template_tokens)
        words = self._blocks(shape, number, unique, self._some_words)
        return Prompt(text=self._text(words), max_tokens=shape.output_tokens)

    def _conversation(self, shape: RequestShape, unique: random.Random) -> Prompt:
        """A system prompt by its id, then the user's turns. Template tokens are not counted."""

        def say(tokens: int, source: random.Random) -> str:
            return " ".join(self._some_words(source, self._pieces(tokens)))

        first, turns = say(shape.input_tokens, unique), []
        for turn in shape.turns:
            text = say(turn.input_tokens, unique)
            text = text if self.endpoint == "chat" else f"{_NEXT_TURN}{text}{_NEXT_TURN}"
            turns.append(PromptTurn(text, turn.output_tokens, turn.after_s))
        prompt = Prompt(max_tokens=shape.output_tokens, turns=tuple(turns))
        if shape.system_id is None:
            return replace(prompt, text=first)
        system = say(shape.system_tokens, random.Random(f"{self.seed} system {shape.system_id}"))
        if self.endpoint == "completions":
            return replace(prompt, text=f"{system}{_NEXT_TURN}{first}")
        messages = ({"role": "system", "content": system}, {"role": "user", "content": first})
        return replace(prompt, messages=messages)

    def _pieces(self, tokens: float) -> int:
        return max(0 if self.first_word else 1, round(tokens / self.tokens_per_word))

    def _text(self, words: Sequence[str]) -> str:
        return " ".join([self.first_word, *words] if self.first_word else words)

    def _some_words(self, source: random.Random, number: int) -> list[str]:
        return source.choices(self.words, k=number)

    def _some_ids(self, source: random.Random, number: int) -> list[int]:
        return source.choices(self.ids or range(1), k=number)

    def _blocks(
        self,
        shape: RequestShape,
        number: int,
        unique: random.Random,
        some: Callable[[random.Random, int], list[_Piece]],
    ) -> list[_Piece]:
        """`number` pieces: those of the shape's blocks in order, then unique ones."""
        pieces: list[_Piece] = []
        size = self._pieces(shape.block_tokens)
        for id in shape.blocks:
            if len(pieces) >= number:
                break
            pieces += some(random.Random(f"{self.seed} block {id}"), size)
        return (pieces + some(unique, max(0, number - len(pieces))))[:number]


def make_speller(
    client: TargetClient, model: str, endpoint: Endpoint, reachable: bool = True
) -> Speller:
    """Find out how prompts are counted. A target that is not `reachable` is not asked."""
    if not reachable:
        return Speller("words", False, endpoint)
    try:
        return _by_tokenize(TokenCounter(client, model, endpoint), endpoint)
    except (EndpointError, _NotAdditiveError):
        pass
    if endpoint == "completions" and (ids := _accepted_ids(client, model)) is not None:
        return Speller("token_ids", True, endpoint, ids=ids)
    return _by_usage(client, model, endpoint)


def spell_all(
    speller: Speller, shapes: Sequence[RequestShape], seed: str, exactly: bool
) -> tuple[Prompt, ...]:
    """Prompts of all shapes, no two alike beyond what their blocks share.

    Raises ConfigError for a shape below the shortest prompt if lengths are to be kept `exactly`;
    else it becomes the shortest.
    """
    speller = replace(speller, seed=seed)
    unique = random.Random(f"{seed} prompts")
    least = speller.least_tokens
    short = next((shape for shape in shapes if is_short(shape, least)), None)
    if exactly and short is not None:
        raise ConfigError(
            f"input-tokens: got {short.input_tokens}; a prompt of one word is {least} tokens at "
            "this endpoint"
        )
    return tuple(speller.spell(shape, unique) for shape in shapes)


def is_short(shape: RequestShape, least_tokens: int) -> bool:
    """Whether the endpoint's template leaves no room for the asked length."""
    fixed = shape.prompt is not None or shape.turns or shape.system_id is not None
    return not fixed and shape.input_tokens < least_tokens


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


def _by_tokenize(counter: TokenCounter, endpoint: Endpoint) -> Speller:
    """Words that are one token each, after what the template and the first word take."""
    least = counter.count(_FIRST_WORD)
    words = _one_token_words(counter, WORDS, least)
    if len(words) < _FEWEST_WORDS:
        raise _NotAdditiveError
    speller = Speller(
        "tokenize",
        True,
        endpoint,
        words=tuple(words),
        first_word=_FIRST_WORD,
        template_tokens=least,
    )
    source = random.Random("check")
    for at in range(_CHECKED_PROMPTS):
        shape = RequestShape(least + 8 * (at + 1) ** 2, 1)
        text = speller.spell(shape, source).text or ""
        if counter.count(text) != shape.input_tokens:
            raise _NotAdditiveError
    return speller


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


def _by_usage(client: TargetClient, model: str, endpoint: Endpoint) -> Speller:
    """Words, by the usage of two trials; one token a word where usage is not given."""
    try:
        few = _prompt_tokens(client, model, endpoint, _TRIAL_WORDS)
        many = _prompt_tokens(client, model, endpoint, 2 * _TRIAL_WORDS)
    except (EndpointError, KeyError, TypeError):
        return Speller("words", False, endpoint)
    tokens_per_word = max((many - few) / _TRIAL_WORDS, 0.1)
    return Speller(
        "words",
        False,
        endpoint,
        template_tokens=max(0.0, few - tokens_per_word * _TRIAL_WORDS),
        tokens_per_word=tokens_per_word,
    )


def _prompt_tokens(client: TargetClient, model: str, endpoint: Endpoint, words: int) -> int:
    text = " ".join(random.Random(words).choices(WORDS, k=words))
    body: dict[str, Any] = {"model": model, "max_tokens": 1}
    if endpoint == "chat":
        path = "/v1/chat/completions"
        body["messages"] = [{"role": "user", "content": text}]
    else:
        path, body["prompt"] = "/v1/completions", text
    return int(client.call("POST", path, body)["usage"]["prompt_tokens"])
