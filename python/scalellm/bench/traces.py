"""Reads public traces and files of prompts.

Traces, one request a line; the names of the fields tell the format:

    Mooncake   JSONL  timestamp (ms), input_length, output_length, hash_ids (512 tokens each)
    Azure      CSV    TIMESTAMP (date and time), ContextTokens, GeneratedTokens
    BurstGPT   CSV    Timestamp (s), Request tokens, Response tokens

Prompts: JSONL with `prompt` or `text`, or `messages`, and `max_tokens` or `output_tokens` if one
likes; any other file is one prompt a line.
"""

import csv
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from scalellm.bench.plan import Endpoint
from scalellm.bench.prefix import BLOCK_TOKENS
from scalellm.bench.shapes import Prompt, RequestShape
from scalellm.bench.sources import Recorded
from scalellm.errors import ConfigError

MAX_ROWS = 1_000_000
_INPUTS = ("input_length", "input_tokens", "ContextTokens", "Request tokens")
_OUTPUTS = ("output_length", "output_tokens", "GeneratedTokens", "Response tokens")
_TIMES = ("timestamp", "time_s", "TIMESTAMP", "Timestamp")
# Milliseconds in the JSONL of Mooncake, seconds elsewhere.
_MS_FIELD = "timestamp"


def read_trace(path: Path, scale: float = 1.0) -> Recorded:
    """The trace's requests with their times after the first, lengths times `scale`.

    Raises ConfigError naming the file, the line and what was expected there.
    """
    rows = [
        (_time_s(path, number, row), _trace_row(path, number, row, scale))
        for number, row in _rows(path)
    ]
    if not rows:
        raise ConfigError(f"trace: {path} has no requests")
    rows.sort(key=lambda row: row[0])
    begin_s = rows[0][0]
    shapes = tuple(replace(shape, offset_s=at_s - begin_s) for at_s, shape in rows)
    return Recorded(shapes, "trace", path.name)


def read_prompts(path: Path, endpoint: Endpoint, output_tokens: int) -> Recorded:
    """Real prompts, sent as they are. Raises ConfigError naming the file and the line."""
    shapes = []
    for number, line in _lines(path):
        if path.suffix not in (".jsonl", ".json"):
            entry: Any = {"prompt": line}
        else:
            entry = _json_object(path, number, line)
        shapes.append(_prompt_row(path, number, entry, endpoint, output_tokens))
    if not shapes:
        raise ConfigError(f"prompt-file: {path} has no prompts")
    return Recorded(tuple(shapes), "prompts", path.name)


def _rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    if path.suffix == ".csv":
        reader = csv.DictReader(line for _, line in _lines(path))
        yield from enumerate(reader, start=2)
        return
    for number, line in _lines(path):
        yield number, _json_object(path, number, line)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines that are not empty, with their numbers."""
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if number > MAX_ROWS:
                    raise ConfigError(f"{path}: more than {MAX_ROWS} lines")
                if line.strip():
                    yield number, line.rstrip("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {getattr(error, 'strerror', None) or error}") from None


def _json_object(path: Path, number: int, line: str) -> Mapping[str, Any]:
    try:
        entry = json.loads(line)
    except ValueError:
        entry = None
    if not isinstance(entry, dict):
        raise ConfigError(f"{path}, line {number}: got {line[:80]!r}, allowed: a JSON object")
    return entry


def _trace_row(path: Path, number: int, row: Mapping[str, Any], scale: float) -> RequestShape:
    def tokens(names: tuple[str, ...]) -> int:
        name = next((name for name in names if row.get(name) not in (None, "")), None)
        try:
            found = float(row[name or ""])
        except (KeyError, TypeError, ValueError):
            found = -1.0
        if not 0 <= found < 1e8:
            raise ConfigError(f"{path}, line {number}: needs a number of tokens, one of {names}")
        return max(1, round(found * scale))

    ids = row.get("hash_ids") or ()
    if not (isinstance(ids, list | tuple) and all(isinstance(id, int) for id in ids)):
        raise ConfigError(f"{path}, line {number}: hash_ids: allowed: a list of whole numbers")
    return RequestShape(
        tokens(_INPUTS),
        tokens(_OUTPUTS),
        blocks=tuple(ids),
        block_tokens=max(1, round(BLOCK_TOKENS * scale)),
    )


def _time_s(path: Path, number: int, row: Mapping[str, Any]) -> float:
    name = next((name for name in _TIMES if row.get(name) not in (None, "")), None)
    value = row.get(name or "")
    try:
        return float(str(value)) / (1e3 if name == _MS_FIELD else 1.0)
    except (TypeError, ValueError):
        pass
    try:
        moment = datetime.fromisoformat(str(value))
    except ValueError:
        raise ConfigError(f"{path}, line {number}: needs a time, one of {_TIMES}") from None
    # A time without a zone is taken as UTC: no hour may be missing or come twice.
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def _prompt_row(
    path: Path, number: int, entry: Mapping[str, Any], endpoint: Endpoint, output_tokens: int
) -> RequestShape:
    text, messages = entry.get("prompt") or entry.get("text"), entry.get("messages")
    length = entry.get("max_tokens") or entry.get("output_tokens") or output_tokens
    if not (isinstance(length, int) and length > 0):
        raise ConfigError(f"{path}, line {number}: max_tokens: got {length!r}, allowed: 1 or more")
    if isinstance(messages, list) and messages and endpoint == "chat":
        prompt = Prompt(messages=tuple(messages))
    elif isinstance(text, str):
        prompt = Prompt(text=text)
    else:
        allowed = "prompt, text or messages" if endpoint == "chat" else "prompt or text"
        raise ConfigError(f"{path}, line {number}: needs {allowed}")
    return RequestShape(0, length, prompt=prompt)
