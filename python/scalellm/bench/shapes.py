"""One request: its shape as a source draws it, and the prompt that is sent."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from scalellm.bench.prefix import BLOCK_TOKENS


@dataclass(frozen=True, slots=True)
class PromptTurn:
    """What the user says after an answer, and how long after it."""

    text: str
    max_tokens: int
    after_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Prompt:
    """What is sent: text, token ids (completions) or messages (chat), and the turns after it."""

    text: str | None = None
    token_ids: tuple[int, ...] | None = None
    messages: tuple[Mapping[str, Any], ...] | None = None
    max_tokens: int | None = None  # None: the workload's
    turns: tuple[PromptTurn, ...] = ()

    def fields(self) -> dict[str, Any]:
        """For the load generator (crates/load-generator, plan.rs)."""
        content: dict[str, Any] = {
            "text": self.text,
            "token_ids": self.token_ids,
            "messages": self.messages,
        }
        found = {name: value for name, value in content.items() if value is not None}
        if self.max_tokens is not None:
            found["max_tokens"] = self.max_tokens
        if self.turns:
            found["turns"] = [asdict(turn) for turn in self.turns]
        return found


@dataclass(frozen=True, slots=True)
class TurnShape:
    """What a user says after an answer."""

    input_tokens: int
    output_tokens: int
    after_s: float


@dataclass(frozen=True, slots=True)
class RequestShape:
    """One request, or the beginning of a conversation."""

    input_tokens: int
    output_tokens: int
    blocks: tuple[int, ...] = ()  # content ids, each of block_tokens; equal ids are equal text
    block_tokens: int = BLOCK_TOKENS
    system_id: int | None = None  # of a conversation: which system prompt
    system_tokens: int = 0
    turns: tuple[TurnShape, ...] = ()
    prompt: Prompt | None = None  # spelled already, in a file
    client: str | None = None
    offset_s: float | None = None  # of a trace: when, after its beginning


def cut(shape: RequestShape, max_tokens: int) -> RequestShape:
    """The request made to fit a context of `max_tokens`: the prompt is cut, then the answer."""
    output_tokens = min(shape.output_tokens, max_tokens - 1)
    input_tokens = min(shape.input_tokens, max_tokens - output_tokens)
    return replace(shape, input_tokens=input_tokens, output_tokens=output_tokens)
