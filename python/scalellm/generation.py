"""Follows one prompt's requests from token ids to text; used by the Python API."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from scalellm.outputs import (
    CompletionOutput,
    Logprob,
    PositionLogprobs,
    RequestOutput,
    RequestTimes,
)
from scalellm.sampling_params import SamplingParams

if TYPE_CHECKING:
    from scalellm._core import Detokenizer, Tokenizer

_FINISH = {"eos": "stop", "stop_token": "stop"}


@dataclass(frozen=True, slots=True)
class Prompt:
    """What is to be continued; `text` is None when ids were given."""

    text: str | None
    token_ids: tuple[int, ...]


class Choice:
    """One answer in the making."""

    def __init__(
        self, index: int, key: int, detokenizer: "Detokenizer | None", params: SamplingParams
    ) -> None:
        self.key = key
        self.finished = False
        self._index = index
        self._detokenizer = detokenizer
        self._params = params
        self._token_ids: list[int] = []
        self._pieces: list[str] = []
        self._entries: list[Any] = []
        self._finish_reason = ""
        self._stop_reason: int | str | None = None
        self._error: str | None = None
        self._times: RequestTimes | None = None

    def take(self, output: tuple[Any, ...]) -> str:
        """Take in an output of the engine; returns the new text. May finish before the engine
        does, by a stop string; the caller then cancels the request."""
        _, token_ids, reason, _, logprobs, _, times, stop_token_id, self._error = output
        if self.finished:
            return ""
        self._token_ids += token_ids
        self._entries += logprobs or ()
        if times is not None:
            self._times = RequestTimes(*times[:6])  # what follows is for profiles
        piece, stopped = self._text_of(token_ids)
        if stopped:
            self._finish("stop", None)
            piece = self._cut_stop(piece)
        elif reason is not None:
            self._finish(_FINISH.get(reason, reason), stop_token_id)
            if self._detokenizer is not None:
                piece += self._detokenizer.finish()
        self._pieces.append(piece)
        return piece

    def _text_of(self, token_ids: Sequence[int]) -> tuple[str, bool]:
        if self._detokenizer is None or not token_ids:
            return "", False
        return self._detokenizer.push(token_ids)

    def _cut_stop(self, piece: str) -> str:
        """`piece` ends with a stop string: whole, because its beginnings are held back."""
        found = max((s for s in self._params.stop if piece.endswith(s)), key=len, default="")
        self._stop_reason = found
        if self._params.include_stop_str_in_output or not found:
            return piece
        return piece[: -len(found)]

    def _finish(self, reason: str, stop_reason: int | None) -> None:
        self.finished = True
        self._finish_reason = reason
        self._stop_reason = stop_reason

    def result(self, token_text: Callable[[int], str]) -> CompletionOutput:
        entries: tuple[PositionLogprobs, ...] | None = None
        if self._params.logprobs is not None:
            entries = tuple(position_logprobs(entry, token_text) for entry in self._entries)
        return CompletionOutput(
            index=self._index,
            text="".join(self._pieces),
            token_ids=tuple(self._token_ids),
            finish_reason=self._finish_reason,
            stop_reason=self._stop_reason,
            logprobs=entries,
            error=self._error,
            times=self._times,
        )


class Generation:
    """One prompt and its choices."""

    def __init__(
        self,
        prompt: Prompt,
        params: SamplingParams,
        keys: Sequence[int],
        tokenizer: "Tokenizer | None",
    ) -> None:
        self.choices = {
            key: Choice(index, key, _detokenizer(tokenizer, prompt, params), params)
            for index, key in enumerate(keys)
        }
        self._prompt = prompt
        self._tokenizer = tokenizer
        self._prompt_entries: list[Any] | None = None
        self._cached_tokens = 0
        self._left = len(keys)

    @property
    def finished(self) -> bool:
        return self._left == 0

    def take(self, output: tuple[Any, ...]) -> str:
        """Take in an output of one of the choices; returns its new text."""
        choice = self.choices[output[0]]
        if output[5] is not None:
            self._prompt_entries = output[5]
        self._cached_tokens = max(self._cached_tokens, output[3])
        was_finished = choice.finished
        piece = choice.take(output)
        if choice.finished and not was_finished:
            self._left -= 1
        return piece

    def result(self) -> RequestOutput:
        prompt_logprobs: tuple[PositionLogprobs | None, ...] | None = None
        if self._prompt_entries is not None:
            prompt_logprobs = tuple(
                None if entry is None else position_logprobs(entry, self._token_text)
                for entry in self._prompt_entries
            )
        return RequestOutput(
            prompt=self._prompt.text,
            prompt_token_ids=self._prompt.token_ids,
            outputs=tuple(choice.result(self._token_text) for choice in self.choices.values()),
            prompt_logprobs=prompt_logprobs,
            cached_tokens=self._cached_tokens,
        )

    def _token_text(self, token_id: int) -> str:
        if self._tokenizer is None:
            return ""
        return self._tokenizer.decode([token_id], skip_special_tokens=False)


def _detokenizer(
    tokenizer: "Tokenizer | None", prompt: Prompt, params: SamplingParams
) -> "Detokenizer | None":
    if tokenizer is None:
        return None
    from scalellm._core import Detokenizer

    # the stop string is cut by Choice, which wants to know which one it was
    return Detokenizer(
        tokenizer,
        prompt.token_ids,
        tuple(params.stop),
        params.skip_special_tokens,
        include_stop=True,
        min_tokens=params.min_tokens,
    )


def position_logprobs(entry: Any, token_text: Callable[[int], str]) -> PositionLogprobs:
    token_id, logprob, rank, top_ids, top_logprobs = entry
    found: PositionLogprobs = {
        top_id: Logprob(value, place, token_text(top_id))
        for place, (top_id, value) in enumerate(zip(top_ids, top_logprobs, strict=True), 1)
    }
    found.setdefault(token_id, Logprob(logprob, rank, token_text(token_id)))
    return found


def bias_pairs(bias: Mapping[int, float] | None) -> list[tuple[int, float]]:
    return [] if bias is None else [(token_id, float(value)) for token_id, value in bias.items()]
