"""Models and settings that cannot be served: one clear line, an exit code, nothing left running."""

import json
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scalellm.demo import model_folder

from ..integration.served import own_environment
from ..integration.supervised import descendants, free_port, until

TIMEOUT_S = 150.0  # of a start that fails: importing torch on a busy machine
BEFORE_TORCH_S = 20.0  # of a mistake that is found without it


def serve(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run `serve` to the end that it has to come to, and check that its processes ended too."""
    process = subprocess.Popen(
        [sys.executable, "-m", "scalellm", "serve", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=own_environment() | {"HF_HUB_OFFLINE": "1"},
        cwd=cwd,
    )
    try:
        output, errors = process.communicate(timeout=TIMEOUT_S)
    finally:
        process.kill()
        process.wait()
    assert descendants(process.pid) == []
    until(lambda: not still_running(process.pid))
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def still_running(root: int) -> list[int]:
    """Processes that carry the mark of a tree that this root made."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"={root}-".encode() in (folder / "environ").read_bytes():
                found.append(int(folder.name))
        except OSError:
            continue
    return found


def complaint(done: subprocess.CompletedProcess[str]) -> str:
    """The line that says what is wrong: the last, or the engine's own before it."""
    assert done.returncode in (1, 2), done
    assert done.stdout == ""
    assert "Traceback" not in done.stderr and "panicked" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("scalellm ")]
    assert lines[-1] == done.stderr.splitlines()[-1]
    assert 1 <= len(lines) <= 2, done.stderr
    assert len(lines[0]) < 600
    return lines[0]


def cut_off(folder: Path) -> None:
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(1_000_000)


def changed(**values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text()) | values
        (folder / "config.json").write_text(json.dumps(config))

    return change


def no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def broken_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"version": "1.0"')


def broken_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def broken_template(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{% for message in messages %}")


BAD_FOLDERS = {
    "weights cut off": (cut_off, r"model\.safetensors"),
    "shapes that do not match": (changed(hidden_size=512), r"256.*512|512.*256"),
    "an unknown architecture": (
        changed(architectures=["WarpDriveForCausalLM"], model_type="warp_drive"),
        "WarpDrive|warp_drive",
    ),
    "no tokenizer": (no_tokenizer, r"tokenizer\.json"),
    "a broken tokenizer": (broken_tokenizer, r"tokenizer\.json"),
    "a broken config": (broken_config, r"config\.json"),
    "a broken chat template": (broken_template, r"chat template .*does not compile: .*default:1"),
}


@pytest.mark.parametrize("name", BAD_FOLDERS)
def test_a_bad_model_folder(tmp_path: Path, name: str) -> None:
    damage, said = BAD_FOLDERS[name]
    folder = shutil.copytree(model_folder(), tmp_path / "model")
    damage(folder)
    assert re.search(said, complaint(serve(str(folder), "--port", "0")))


def test_a_model_too_big_for_the_machine(tmp_path: Path) -> None:
    """Nothing but its configuration and a tokenizer; half a terabyte of weights."""
    folder = shutil.copytree(
        model_folder(), tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors")
    )
    changed(hidden_size=16384, intermediate_size=65536, num_hidden_layers=80)(folder)
    began_s = time.monotonic()
    line = complaint(serve(str(folder), "--port", "0", "--load-format", "dummy"))
    assert "memory" in line
    assert re.search(r"\d\s?[GT]iB", line)
    assert time.monotonic() - began_s < TIMEOUT_S / 2


SETTINGS = {
    "no such folder": (["/nowhere/at/all"], "/nowhere/at/all"),
    "a folder that is no model": (["."], r"config\.json"),
    "a file": (["file"], "file"),
    "no such port": (["demo", "--port", "99999"], "port.*99999.*65535"),
    "a host of somebody else": (["demo", "--host", "192.0.2.1"], r"192\.0\.2\.1"),
    "an unknown dtype": (["demo", "--dtype", "float8"], "dtype.*float8.*bfloat16"),
    "quantisation that is not there": (["demo", "--quantization", "fp8"], "fp8"),
    "a template that is not there": (["demo", "--chat-template", "none.jinja"], r"none\.jinja"),
    "a template that does not compile": (
        ["demo", "--chat-template", "broken.jinja"],
        r"broken\.jinja: .*does not compile",
    ),
    "an empty key": (["demo", "--api-key", ""], r"api_key.*--api-key.*visible ASCII"),
    "a length over the model's": (["demo", "--max-model-len", "99999999"], "99999999.*2048"),
    "a cache of a byte": (["demo", "--kv-cache-memory", "1"], "kv-cache-memory"),
    "no gpu": (["demo", "--device", "cuda"], "cuda|CUDA|GPU"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_bad_setting(tmp_path: Path, name: str) -> None:
    if name == "no gpu" and Path("/dev/nvidia0").exists():
        pytest.skip("this machine has a GPU")
    arguments, said = SETTINGS[name]
    (tmp_path / "file").touch()
    (tmp_path / "broken.jinja").write_text("{% for message in messages %}")
    if "--port" not in arguments:
        arguments = [*arguments, "--port", "0"]
    assert re.search(said, complaint(serve(*arguments, cwd=tmp_path)))


def test_a_taken_port() -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        began_s = time.monotonic()
        line = complaint(serve("demo", "--port", str(port)))
    assert str(port) in line and "taken" in line
    assert time.monotonic() - began_s < BEFORE_TORCH_S


def test_misspelt_flags_and_commands() -> None:
    done = serve("demo", "--max-num-seq", "4", "--port", str(free_port()))
    assert done.returncode == 2
    assert "--max-num-seq" in done.stderr and "Traceback" not in done.stderr
    done = serve("demo", "--max-num-seqs", "many")
    assert done.returncode == 2
    assert "max-num-seqs" in done.stderr and "many" in done.stderr
