"""Runs a bench: finds out about the target, makes prompts, drives level after level."""

import json
import signal
import threading
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console

from scalellm.bench.machine import describe_machine
from scalellm.bench.plan import Level, Prompt, Workload
from scalellm.bench.progress import level_progress
from scalellm.bench.prompts import PromptSet, make_prompts
from scalellm.bench.results import Result, Row
from scalellm.bench.target import Target, TargetClient, discover

# Sockets, files and pipes of the process beside one socket for each open request.
_OTHER_FILES = 256


@dataclass(frozen=True, slots=True)
class Options:
    """One bench run. An absent model is the first that the target names."""

    url: str
    levels: tuple[Level, ...]
    workload: Workload = field(default_factory=Workload)
    model: str | None = None
    api_key: str = field(default="", repr=False)
    json_path: Path | None = None


def run_bench(options: Options, console: Console) -> Result:
    """Measure every level and give the result; after each, `json_path` holds what there is.

    Ctrl-C ends the level in progress and keeps what was measured; a second one raises
    KeyboardInterrupt. Raises ConfigError for options the load generator refuses.
    """
    started = datetime.now(UTC).isoformat(timespec="seconds")
    machine = describe_machine()
    client = TargetClient(options.url, options.api_key)
    target = discover(client)
    if target.problem is not None:
        console.print(f"warning: {target.problem}; the bench goes on", style="yellow", markup=False)
    model = options.model or (target.models[0] if target.models else "default")
    wanted = sum(level.prompts_wanted() for level in options.levels)
    with console.status("making prompts"):
        made = make_prompts(
            client,
            model,
            options.workload.endpoint,
            options.workload.input_tokens,
            wanted,
            options.workload.seed,
            reachable=target.problem is None,
        )
    rows: list[Row] = []

    def result(interrupted: bool) -> Result:
        workload = _describe_workload(options.workload, made)
        about = _describe_target(target, model, options.url)
        return Result(about, machine, workload, tuple(rows), interrupted, started)

    prompts = made.prompts
    with _interruptible() as interrupted:
        for level in options.levels:
            _allow_open_files(level)
            rows.append(_run_level(options, level, prompts, model, target, interrupted, console))
            # Each level starts with prompts that no level before has sent.
            taken = level.prompts_wanted()
            prompts = prompts[taken:] + prompts[:taken]
            if options.json_path is not None:
                result(interrupted.is_set()).write(options.json_path)
            if interrupted.is_set():
                break
    return result(interrupted.is_set())


def _run_level(
    options: Options,
    level: Level,
    prompts: Sequence[Prompt],
    model: str,
    target: Target,
    interrupted: threading.Event,
    console: Console,
) -> Row:
    from scalellm._core import run_load

    plan = options.workload.plan_json(
        level,
        prompts[: level.prompts_wanted()],
        options.url,
        model,
        options.api_key,
        return_token_ids=target.tells_token_ids,
    )
    with level_progress(level, console, lambda: not interrupted.is_set()) as on_progress:
        report = json.loads(run_load(plan, on_progress))
    (row,) = report["levels"]
    about = {"prompts": report["prompts"], "prompts_sent": report["prompts_sent"]}
    return {**row, "arrivals": level.arrivals if level.rate is not None else None, **about}


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
    needed = (level.concurrency or 20_000) + _OTHER_FILES
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
        "problem": target.problem,
    }


def _describe_workload(workload: Workload, made: PromptSet) -> dict[str, Any]:
    return {
        "endpoint": workload.endpoint,
        "input_tokens": workload.input_tokens,
        "output_tokens": workload.output_tokens,
        "stream": workload.stream,
        "ignore_eos": workload.ignore_eos,
        "temperature": workload.temperature,
        "timeout_s": workload.timeout_s,
        "seed": workload.seed,
        "extra_body": dict(workload.extra_body),
        "prompts": {
            "method": made.method,
            "exact": made.exact,
            "distinct": len(made.prompts),
        },
    }
