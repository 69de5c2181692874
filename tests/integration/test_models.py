"""Several models behind one address, sharing this machine."""

import json
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from scalellm.cli.status import blueprint_lines
from scalellm.controller.gateway_view import get

from .made_models import made_model
from .served import START_S, Serve, own_environment
from .supervised import children, command_line, kill, until

FILE = """
devices = 4
kv_cache_memory_bytes = "16MiB"

[[models]]
model = "demo"
served_model_name = "first"

[[models]]
model = "demo"
served_model_name = "second"
replica = ["tp=2"]

[[models]]
model = {tiny}
served_model_name = "tiny"
load_format = "dummy"
max_model_len = 64
"""


def text_of(served: Serve, model: str) -> str:
    fields = {"model": model, "prompt": "What is 12 + 30?", "temperature": 0, "max_tokens": 8}
    with served.post(fields) as response:
        return str(json.loads(response.read())["choices"][0]["text"])


def works(served: Serve, model: str) -> bool:
    try:
        return bool(text_of(served, model))
    except (urllib.error.HTTPError, ConnectionError, urllib.error.URLError):
        return False


def blueprints(served: Serve) -> list[dict[str, Any]]:
    with urllib.request.urlopen(served.url + "/admin/v1/blueprint", timeout=10) as answer:
        found: list[dict[str, Any]] = json.loads(answer.read())["models"]
        return found


@pytest.mark.slow
def test_models_share_the_machine_and_do_not_disturb_each_other(tmp_path: Path) -> None:
    file = tmp_path / "models.toml"
    file.write_text(
        FILE.replace("{tiny}", json.dumps(str(made_model(tmp_path / "tiny", num_hidden_layers=2))))
    )
    served = Serve(tmp_path, "--config", str(file), model=None)
    try:
        assert " model=first,second,tiny replicas=3 " in served.line
        with urllib.request.urlopen(served.url + "/v1/models", timeout=10) as answer:
            listed = [model["id"] for model in json.loads(answer.read())["data"]]
        assert listed == ["first", "second", "tiny"]
        # One process or two ranks: the same weights give the same tokens.
        assert text_of(served, "first") == text_of(served, "second") != text_of(served, "tiny")
        shapes = [(found["model"], found["blueprint"]) for found in blueprints(served)]
        assert shapes == [
            ("first", [{"tp": 1, "count": 1}]),
            ("second", [{"tp": 2, "count": 1}]),
            ("tiny", [{"tp": 1, "count": 1}]),
        ]
        told = get(served.url, "/admin/v1/blueprint")
        assert told is not None
        assert blueprint_lines(told)[1] == "second: blueprint 1 x TP 2 (static), steady"
        (engine,) = [
            pid
            for pid in children(served.process.pid)
            if b"\0tiny\0" in command_line(pid) and b"\0engine\0" in command_line(pid)
        ]
        kill(engine)
        assert works(served, "first")
        until(lambda: works(served, "tiny"), START_S)
    finally:
        served.close()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("a=demo", "b=demo", "--devices", "1"), "at most 1 of them with a device each"),
        (("a=demo", "b=/no/such"), "/no/such"),
        (
            ("a=demo", "b=demo", "--devices", "6", "--replica", "tp=3"),
            "model 'a': --replica: got tp=3",
        ),
    ],
)
def test_plans_that_do_not_fit_end_before_anything_starts(
    arguments: tuple[str, ...], said: str, tmp_path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "scalellm", "serve", *arguments, "--port", "0"],
        capture_output=True,
        text=True,
        timeout=START_S,
        check=False,
        cwd=tmp_path,
        env=own_environment() | {"XDG_RUNTIME_DIR": str(tmp_path)},
    )
    assert done.returncode == 2
    assert said in done.stderr
    assert "engine" not in done.stderr.rpartition("scalellm serve:")[0]
    assert list(tmp_path.iterdir()) == []
