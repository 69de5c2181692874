"""What a caller of the Python API may ask of one generation."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scalellm.errors import RequestError

MAX_LOGPROBS = 20
MAX_CHOICES = 128
# As the listener of a served engine allows; beyond them float32 scores lose their meaning.
MAX_TEMPERATURE = 100.0
REPETITION_PENALTIES = (0.01, 100.0)
MAX_PRIORITY = 1_000_000


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Settings of one generation; names and defaults follow vLLM's.

    `logprobs` and `prompt_logprobs` give how many alternatives to report beside each token, of the
    model's own distribution before temperature and penalties. `top_k` 0 and -1 are off.
    Raises RequestError, which names the field, what it got and what is allowed.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    seed: int | None = None
    max_tokens: int | None = 16  # None: as many as fit
    min_tokens: int = 0
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    priority: int = 0

    def __post_init__(self) -> None:
        self._integer("n", 1, MAX_CHOICES)
        self._number("temperature", 0.0, MAX_TEMPERATURE, "a number from 0 to 100")
        self._number("top_p", 0.0, 1.0, "a number above 0, at most 1", above=True)
        self._integer("top_k", -1)
        self._number("min_p", 0.0, 1.0, "a number from 0 to 1")
        self._number("repetition_penalty", *REPETITION_PENALTIES, "a number from 0.01 to 100")
        self._number("presence_penalty", -2.0, 2.0, "a number from -2 to 2")
        self._number("frequency_penalty", -2.0, 2.0, "a number from -2 to 2")
        self._integer("seed", 0, 2**64 - 1, optional=True)
        self._integer("max_tokens", 1, optional=True)
        self._integer("min_tokens", 0)
        self._integer("logprobs", 0, MAX_LOGPROBS, optional=True)
        self._integer("prompt_logprobs", 0, MAX_LOGPROBS, optional=True)
        self._integer("priority", -MAX_PRIORITY, MAX_PRIORITY)
        for name in ("ignore_eos", "skip_special_tokens", "include_stop_str_in_output"):
            if not isinstance(getattr(self, name), bool):
                raise self._error(name, "True or False")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise self._error("min_tokens", f"at most max_tokens, {self.max_tokens}")
        object.__setattr__(self, "stop", self._stop_strings())
        ids = self.stop_token_ids
        if isinstance(ids, str) or not isinstance(ids, Sequence) or not all(map(_is_id, ids)):
            raise self._error("stop_token_ids", "a list of token ids")
        object.__setattr__(self, "stop_token_ids", tuple(ids))
        self._check_bias()

    def _stop_strings(self) -> tuple[str, ...]:
        given = (self.stop,) if isinstance(self.stop, str) else self.stop
        if not isinstance(given, Sequence) or not all(isinstance(s, str) and s for s in given):
            raise self._error("stop", "a text or a list of texts, none of them empty")
        return tuple(given)

    def _check_bias(self) -> None:
        if self.logit_bias is None:
            return
        allowed = "a mapping from token id to a number from -100 to 100"
        if not isinstance(self.logit_bias, Mapping):
            raise self._error("logit_bias", allowed)
        for token_id, bias in self.logit_bias.items():
            if not _is_id(token_id) or not _is_number(bias) or not -100 <= bias <= 100:
                raise self._error("logit_bias", allowed)

    def _integer(
        self, name: str, least: int, most: int | None = None, optional: bool = False
    ) -> None:
        value = getattr(self, name)
        if value is None and optional:
            return
        is_integer = isinstance(value, int) and not isinstance(value, bool)
        if not is_integer or value < least or (most is not None and value > most):
            bounds = f"at least {least}" if most is None else f"from {least} to {most}"
            none = ", or None" if optional else ""
            raise self._error(name, f"a whole number {bounds}{none}")

    def _number(
        self, name: str, least: float, most: float, allowed: str, above: bool = False
    ) -> None:
        value = getattr(self, name)
        fits = _is_number(value) and least <= value <= most and not (above and value == least)
        if not fits:
            raise self._error(name, allowed)

    def _error(self, name: str, allowed: str) -> RequestError:
        return RequestError(f"{name}: got {getattr(self, name)!r}; allowed is {allowed}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
