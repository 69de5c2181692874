"""Shows one streamed answer in the terminal, with its speed."""

import argparse
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from scalellm.cli.endpoint import Endpoint, Piece
from scalellm.config import Value
from scalellm.errors import EndpointError


@dataclass(frozen=True, slots=True)
class Answer:
    """What was shown."""

    text: str
    interrupted: bool
    tokens: int
    ttft_ms: float
    tokens_per_s: float | None  # of decoding; None for fewer than two tokens

    def speed(self) -> str:
        rate = "" if self.tokens_per_s is None else f", {self.tokens_per_s:.1f} tok/s"
        return f"{self.tokens} tokens, first after {self.ttft_ms:.0f} ms{rate}"


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """Flags that become fields of the request; unset ones are the endpoint's to default."""
    parser.add_argument("--model", dest="request_model", help="which model; default: the first")
    parser.add_argument("--max-tokens", type=int, dest="request_max_tokens", metavar="N")
    parser.add_argument("--temperature", type=float, dest="request_temperature", metavar="T")
    parser.add_argument("--top-p", type=float, dest="request_top_p", metavar="P")
    parser.add_argument("--seed", type=int, dest="request_seed", metavar="N")


def request_fields(arguments: argparse.Namespace, endpoint: Endpoint) -> dict[str, Any]:
    """The request's fields from `add_sampling`'s flags, with the model filled in."""
    given = {
        name.removeprefix("request_"): value
        for name, value in vars(arguments).items()
        if name.startswith("request_") and value is not None
    }
    if "model" not in given:
        models = endpoint.models()
        if not models:
            raise EndpointError(f"{endpoint.url} serves no model")
        given["model"] = models[0]
    return given


def endpoint_of(values: dict[str, Value]) -> Endpoint:
    keys = values["api_key"].value
    return Endpoint(values["url"].value, keys[0] if keys else "")


def show(pieces: Iterator[Piece]) -> Answer:
    """Write pieces to standard output as they come; Ctrl-C ends the answer, not the program."""
    started_s = time.monotonic()
    first_s = last_s = started_s
    texts: list[str] = []
    chunks, tokens = 0, None
    interrupted = False
    try:
        for piece in pieces:
            if piece.text:
                last_s = time.monotonic()
                first_s = first_s if chunks else last_s
                chunks += 1
                texts.append(piece.text)
                sys.stdout.write(piece.text)
                sys.stdout.flush()
            if piece.completion_tokens is not None:
                tokens = piece.completion_tokens
    except KeyboardInterrupt:
        interrupted = True
    finally:
        close = getattr(pieces, "close", None)
        if close is not None:
            close()
    shown = chunks if tokens is None else tokens
    rate = (shown - 1) / (last_s - first_s) if shown > 1 and last_s > first_s else None
    return Answer("".join(texts), interrupted, shown, 1e3 * (first_s - started_s), rate)
