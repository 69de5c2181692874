"""Runs a bench: finds out about the target, makes prompts, drives level after level."""

import json
import signal
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console

from scalellm.bench.machine import describe_machine
from scalellm.bench.plan import MAX_PROMPT_TOKENS, Level, Workload
from scalellm.bench.progress import Board
from scalellm.bench.prompts import Speller, is_short, make_speller, spell_all
from scalellm.bench.records import Records
from scalellm.bench.results import Result, Row
from scalellm.bench.schedule import schedule
from scalellm.bench.search import RateSearch
from scalellm.bench.shapes import RequestShape, cut
from scalellm.bench.slo import Slo
from scalellm.bench.sources import describe_shapes
from scalellm.bench.target import PUBLIC_AUTHORITIES, Target, TargetClient, Trust, discover

# Sockets, files and pipes of the process beside one socket for each open request.
_OTHER_FILES = 256
_MAX_OPEN = 20_000
# --find-max goes no lower than this part of where it begins: levels would have hardly a request.
_LOWEST_RATE_SHARE = 1 / 64


@dataclass(frozen=True, slots=True)
class Options:
    """One bench run. An absent model is the first that the target names."""

    url: str
    levels: tuple[Level, ...]
    workload: Workload = field(default_factory=Workload)
    model: str | None = None
    api_key: str = field(default="", repr=False)
    trust: Trust = PUBLIC_AUTHORITIES
    # 16 hexadecimal digits: requests then bear ids and traces, see crates/load-generator, plan.rs.
    trace_prefix: str | None = None
    json_path: Path | None = None
    slo: Slo | None = None
    # The level whose rate is searched after `levels`: its rate is the first to be tried.
    find_max: Level | None = None
    precision: float = 0.05


def run_bench(options: Options, console: Console) -> Result:
    """Measure every level and give the result; after each, `json_path` holds what there is.

    Ctrl-C ends the level in progress and keeps what was measured; a second one raises
    KeyboardInterrupt. Raises ConfigError for options the load generator refuses.
    """
    started = datetime.now(UTC).isoformat(timespec="seconds")
    machine = describe_machine()
    client = TargetClient(options.url, options.api_key, options.trust)
    target = discover(client)
    if target.problem is not None:
        console.print(f"warning: {target.problem}; the bench goes on", style="yellow", markup=False)
    model = options.model or (target.models[0] if target.models else "default")
    workload = options.workload
    with console.status("asking how prompts are counted"):
        speller = make_speller(client, model, workload.endpoint, reachable=target.problem is None)
    rows: list[Row] = []
    drawn: list[RequestShape] = []
    search = None if options.find_max is None else _search(options.find_max, options.precision)

    def result(interrupted: bool) -> Result:
        return Result(
            _describe_target(target, model, options.url),
            machine,
            _describe_workload(workload, speller, drawn),
            tuple(rows),
            interrupted,
            started,
            None if search is None else _describe_search(search, options.slo),
        )

    with _interruptible() as interrupted, Board(console) as board:
        for number, level in enumerate(_levels(options, search, rows)):
            _allow_open_files(level)
            prepared = _prepare(options, level, number, speller, target)
            drawn += prepared.shapes
            rows.append(_run_level(options, prepared, model, target, interrupted, board))
            board.show(rows)
            if options.json_path is not None:
                result(interrupted.is_set()).write(options.json_path)
            if interrupted.is_set():
                break
        found = result(interrupted.is_set())
    if options.json_path is not None:
        found.write(options.json_path)
    return found


def _search(level: Level, precision: float) -> RateSearch:
    start = level.rate or 1.0
    return RateSearch(start, precision, lowest=start * _LOWEST_RATE_SHARE)


def _levels(options: Options, search: RateSearch | None, rows: Sequence[Row]) -> Iterator[Level]:
    """The given levels, then those of the search, each chosen by the rows before it."""
    yield from options.levels
    if search is None or options.find_max is None:
        return
    while (rate := search.next_rate()) is not None:
        yield replace(options.find_max, rate=rate)
        held = rows[-1]["slo"]["held"]
        if not held and rows[-1]["generator"]["bottleneck"]:
            return  # whose miss it was is not known
        search.tell(rate, held)


@dataclass(frozen=True, slots=True)
class _Prepared:
    """A level with all that it will send."""

    level: Level
    shapes: tuple[RequestShape, ...]
    plan_json: Callable[[str, str, str, bool], str]


def _prepare(
    options: Options, level: Level, number: int, speller: Speller, target: Target
) -> _Prepared:
    workload = options.workload
    planned = schedule(level, workload, number)
    shapes = planned.shapes
    if target.max_model_len is not None:
        shapes = tuple(cut(shape, target.max_model_len) for shape in shapes)
    shapes = _bounded(shapes)
    exactly = workload.source is None and not workload.clients
    prompts = spell_all(speller, shapes, f"{workload.seed} level {number}", exactly)

    def plan_json(url: str, model: str, api_key: str, return_token_ids: bool) -> str:
        return workload.plan_json(
            level,
            planned.send_at_s,
            prompts,
            url,
            model,
            api_key,
            return_token_ids,
            options.trust,
            options.trace_prefix,
        )

    return _Prepared(level, shapes, plan_json)


def _bounded(shapes: tuple[RequestShape, ...]) -> tuple[RequestShape, ...]:
    """As many of the first shapes as fit into MAX_PROMPT_TOKENS; the others repeat them."""
    total = 0
    for at, shape in enumerate(shapes):
        total += shape.input_tokens
        if total > MAX_PROMPT_TOKENS and at > 0:
            return shapes[:at]
    return shapes


def _run_level(
    options: Options,
    prepared: _Prepared,
    model: str,
    target: Target,
    interrupted: threading.Event,
    board: Board,
) -> Row:
    from scalellm._core import run_load

    level = prepared.level
    plan = prepared.plan_json(options.url, model, options.api_key, target.tells_token_ids)
    with board.level(level, lambda: not interrupted.is_set()) as on_progress:
        report = json.loads(run_load(plan, on_progress))
    (found,) = report["levels"]
    row: dict[str, Any] = {
        **found,
        "arrivals": level.arrivals if level.rate is not None else None,
        "prompts": report["prompts"],
        "prompts_sent": report["prompts_sent"],
        **_asked(found, prepared.shapes),
    }
    if options.workload.clients:
        row["clients"] = _by_client(found, prepared.shapes)
    if options.slo is not None:
        row["slo"] = options.slo.judge(row)
    return row


def _asked(row: Row, shapes: Sequence[RequestShape]) -> dict[str, int | None]:
    """Tokens that the completed requests asked for; None where the answers decide them."""
    completed = Records.of(row).completed()
    asked = [shapes[request["prompt"]] for request in completed]
    if any(shape.turns or shape.prompt is not None for shape in asked):
        return {"asked_input_tokens": None, "asked_output_tokens": None}
    return {
        "asked_input_tokens": sum(shape.input_tokens for shape in asked),
        "asked_output_tokens": sum(shape.output_tokens for shape in asked),
    }


def _by_client(row: Row, shapes: Sequence[RequestShape]) -> dict[str, Any]:
    """Requests and mean TTFT of each client."""
    waits: dict[str, list[float]] = {}
    for request in Records.of(row).completed():
        client = shapes[request["prompt"]].client or ""
        waits.setdefault(client, []).append(request["ttft_ms"] or 0.0)
    return {
        client: {"completed": len(found), "ttft_ms": {"mean": sum(found) / len(found)}}
        for client, found in sorted(waits.items())
    }


@contextmanager
def _interruptible() -> Generator[threading.Event, None, None]:
    """Turns the first Ctrl-C into an event, the second into KeyboardInterrupt."""
    interrupted = threading.Event()

    def on_signal(number: int, frame: FrameType | None) -> None:
        if interrupted.is_set():
            signal.default_int_handler(number, frame)
        interrupted.set()

    if threading.current_thread() is not threading.main_thread():
        yield interrupted
        return
    before = signal.signal(signal.SIGINT, on_signal)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, before)


def _allow_open_files(level: Level) -> None:
    """Raise the soft limit of open files as far as the level may need and the hard one allows."""
    try:
        import resource
    except ImportError:
        return
    needed = (level.concurrency or _MAX_OPEN) + _OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < needed:
        allowed = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, allowed), hard))


def _describe_target(target: Target, model: str, url: str) -> dict[str, Any]:
    return {
        "url": url,
        "model": model,
        "models": list(target.models),
        "owned_by": target.owned_by,
        "version": target.version,
        "max_model_len": target.max_model_len,
        "problem": target.problem,
    }


def _describe_workload(
    workload: Workload, speller: Speller, drawn: Sequence[RequestShape]
) -> dict[str, Any]:
    short = sum(is_short(shape, speller.least_tokens) for shape in drawn)
    whole = not any(shape.turns or shape.prompt is not None for shape in drawn)
    return {
        "endpoint": workload.endpoint,
        "input_tokens": workload.input_tokens,
        "output_tokens": workload.output_tokens,
        "source": None if workload.clients else workload.requests.describe(),
        "clients": [
            {
                "name": client.name,
                "rate": client.rate,
                "arrivals": client.arrivals,
                "source": client.source.describe(),
            }
            for client in workload.clients
        ],
        "stream": workload.stream,
        "ignore_eos": workload.ignore_eos,
        "temperature": workload.temperature,
        "timeout_s": workload.timeout_s,
        "seed": workload.seed,
        "extra_body": dict(workload.extra_body),
        "prompts": {
            "method": "file" if any(shape.prompt for shape in drawn) else speller.method,
            "exact": speller.exact and short == 0 and whole,
            "distinct": len(drawn),
            "lengthened": short,
            "drawn": describe_shapes(drawn) if drawn else None,
        },
    }


def _describe_search(search: RateSearch, slo: Slo | None) -> dict[str, Any]:
    return {
        "slo_ms": None if slo is None else dict(slo.limits_ms),
        "share": None if slo is None else slo.share,
        "rate": search.held,
        "missed_rate": search.missed,
        "found": search.is_found,
        "probes": [{"rate": rate, "held": held} for rate, held in search.probes],
    }
