"""`scalellm bench offline`: tokens a second of the Python API."""

import argparse
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

from scalellm.cli.flags import add_settings, resolve_arguments
from scalellm.cli.model import check_folder, resolve_model
from scalellm.config import EngineConfig, build
from scalellm.errors import ConfigError

if TYPE_CHECKING:
    from scalellm.bench.offline import Repeat

_EXIT_OK, _EXIT_INTERRUPTED = 0, 130
_EPILOG = """\
All prompts are given at once, of random token ids, greedy, end of sequence ignored. Engine settings
are those of `scalellm engine`.

examples:
  scalellm bench offline --model demo --input-len 64 --output-len 32 --num-prompts 16
  scalellm bench offline --model /models/Qwen3-0.6B --quantization int8 --json offline.json
"""


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "offline",
        help="the Python API in this process, without a server",
        description="Measures how many tokens a second LLM.generate reaches.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    load = parser.add_argument_group("load")
    for flag, default, text in (
        ("--input-len", 128, "tokens of each prompt"),
        ("--output-len", 64, "tokens of each answer"),
        ("--num-prompts", 64, "prompts, all at once"),
        ("--repeats", 3, "calls, each with prompts of its own"),
    ):
        load.add_argument(
            flag, type=int, default=default, metavar="N", help=f"{text}; default: {default}"
        )
    load.add_argument("--json", type=Path, metavar="FILE", dest="bench_json")
    add_settings(parser, "engine")
    parser.set_defaults(bench_run=run)


def run(arguments: argparse.Namespace) -> int:
    for name in ("input_len", "output_len", "num_prompts", "repeats"):
        if getattr(arguments, name) < 1:
            flag = name.replace("_", "-")
            raise ConfigError(f"--{flag}: got {getattr(arguments, name)}, allowed: 1 or more")
    config = build(EngineConfig, resolve_arguments(arguments))
    folder = resolve_model(config.model, config.revision, config.load_format != "dummy")
    check_folder(folder, needs_tokenizer=False, needs_weights=config.load_format != "dummy")

    from scalellm.bench.offline import Options, run_offline
    from scalellm.bench.results import check_writable, write_document
    from scalellm.llm import LLM
    from scalellm.loader.config import read_model_config

    if arguments.bench_json is not None:
        check_writable(arguments.bench_json)
    options = Options(
        input_len=arguments.input_len,
        output_len=arguments.output_len,
        num_prompts=arguments.num_prompts,
        repeats=arguments.repeats,
        vocab_size=read_model_config(folder).vocab_size,
        seed=config.seed,
    )
    config = replace(config, model=str(folder))
    settings = {
        entry.name: getattr(config, entry.name)
        for entry in fields(config)
        if entry.name not in ("model", "model_path")
    }
    with LLM(config.model, **settings) as llm:
        result = run_offline(llm, options, _say)
    if result.repeats:
        print(f"output tok/s  {result.spread('output_tok_s')}")
        print(f"total tok/s   {result.spread('total_tok_s')}")
        print(f"requests/s    {result.spread('requests_s')}")
    if arguments.bench_json is not None:
        shown = {"model": folder.name, **settings}
        write_document(result.to_json(shown), arguments.bench_json)
    return _EXIT_INTERRUPTED if result.interrupted else _EXIT_OK


def _say(repeat: "Repeat") -> None:
    print(
        f"{repeat.requests} requests in {repeat.elapsed_s:.2f} s: "
        f"{repeat.output_tok_s:,.1f} output tok/s",
        flush=True,
    )
