"""The command line's frame: instant help, one-line errors, exit codes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from scalellm.cli.main import COMMANDS

HEAVY = {"torch", "numpy", "transformers", "huggingface_hub", "safetensors", "rich", "tokenizers"}
MODULES_SHOWN = (
    "import sys, json; from scalellm.cli.main import main\n"
    "try:\n    main({arguments})\n"
    "except SystemExit:\n    pass\n"
    "print(json.dumps(sorted(sys.modules)), file=sys.stderr)"
)


def modules_after(*arguments: str) -> set[str]:
    source = MODULES_SHOWN.format(arguments=list(arguments))
    done = subprocess.run(
        [sys.executable, "-c", source], capture_output=True, text=True, check=True, timeout=60
    )
    return set(json.loads(done.stderr.splitlines()[-1]))


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("SCALELLM_")}
    return subprocess.run(
        [sys.executable, "-m", "scalellm", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=clean | environment,
    )


def test_help_imports_next_to_nothing() -> None:
    bare = json.loads(
        subprocess.run(
            [
                sys.executable,
                "-c",
                "import sys, json, argparse; print(json.dumps(list(sys.modules)))",
            ],
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        ).stdout
    )
    added = modules_after("--help") - set(bare)
    assert len(added) < 30, sorted(added)


@pytest.mark.parametrize("command", ["serve", "engine", "gateway", "chat", "doctor", "config"])
def test_no_command_needs_anything_heavy_to_explain_itself(command: str) -> None:
    tops = {name.partition(".")[0] for name in modules_after(command, "--help")}
    assert not tops & HEAVY


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_has_help(command: str) -> None:
    done = run(command, "--help")
    assert done.returncode == 0, done.stderr
    assert "usage: scalellm " + command in done.stdout


def test_no_command_prints_help_and_says_usage() -> None:
    done = run()
    assert done.returncode == 2
    assert all(name in done.stderr for name in COMMANDS)


@pytest.mark.parametrize(
    ("arguments", "exit_code", "expected"),
    [
        (("serve", "/no/such/folder"), 2, "model folder /no/such/folder does not exist"),
        (("serve", "--port", "banana"), 2, "port: got 'banana' (flag --port)"),
        (("serve", "--launcher", "slurm"), 2, "allowed: local, ray, kubernetes"),
        (("serve", "--launcher", "kubernetes", "--replica", "tp=2"), 2, "devices: missing"),
        (("serve", "--config", "/no/such.toml"), 2, "config: no file '/no/such.toml'"),
        (("engine", "/no/such/folder"), 2, "model folder /no/such/folder does not exist"),
        (("gateway", "--config", "/no/such.toml"), 2, "No such file"),
        (("chat", "--url", "http://127.0.0.1:9"), 1, "cannot reach http://127.0.0.1:9"),
        (("complete", "--url", "tcp://x", "hi"), 2, "url: got 'tcp://x'"),
        (("status", "--url", "http://127.0.0.1:9"), 1, "cannot reach http://127.0.0.1:9"),
    ],
)
def test_errors_are_one_line(
    arguments: tuple[str, ...], exit_code: int, expected: str, tmp_path: Path
) -> None:
    done = run(*arguments, HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1")
    assert done.returncode == exit_code, done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith(f"scalellm {arguments[0]}: ")
    assert expected in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_debug_adds_the_traceback() -> None:
    done = run("serve", "/no/such/folder", "--log-level", "debug")
    assert "Traceback" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("scalellm serve: model folder")


def test_config_show_tells_each_origin(tmp_path: Path) -> None:
    file = tmp_path / "s.toml"
    file.write_text("max_num_seqs = 5\n")
    done = run(
        "config", "--config", str(file), "show",
        SCALELLM_PORT="81", SCALELLM_API_KEY="hush", SCALELLM_PROT="1",
    )  # fmt: skip
    lines = {line.split()[0]: line for line in done.stdout.splitlines()}
    assert lines["max_num_seqs"].endswith(f"file {file}")
    assert "81" in lines["port"]
    assert lines["port"].endswith("environment SCALELLM_PORT")
    assert lines["block_size"].endswith("default")
    assert "hush" not in done.stdout
    assert "SCALELLM_PROT is no setting and has no effect; did you mean" in done.stderr


def test_a_folder_without_weights_says_which_flag_helps(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tokenizer.json").write_text("{}")
    done = run("serve", str(tmp_path), "--port", "0")
    assert done.returncode == 2
    assert "has no *.safetensors; --load-format dummy" in done.stderr


def test_a_damaged_config_is_found_before_anything_starts(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"a": ')
    (tmp_path / "tokenizer.json").write_text("{}")
    done = run("serve", str(tmp_path), "--load-format", "dummy", "--port", "0")
    assert done.returncode == 1
    assert "config.json: Expecting value" in done.stderr
