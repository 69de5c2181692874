"""`scalellm fetch`: what is copied, and what is refused."""

import argparse
from pathlib import Path

import pytest

from scalellm.cli import fetch
from scalellm.errors import ConfigError, ModelNotFoundError


def run(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    fetch.add_arguments(parser)
    return fetch.run(parser.parse_args(arguments))


def test_a_gateway_needs_no_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    to = tmp_path / "deep" / "demo"
    assert run("demo", "--no-weights", "--to", str(to)) == 0
    assert capsys.readouterr().out == f"{to}\n"
    names = {file.name for file in to.iterdir()}
    assert {"tokenizer.json", "config.json", "chat_template.jinja"} <= names
    assert not any(".safetensors" in name or name.endswith(".part") for name in names)
    assert run("demo", "--to", str(to)) == 0
    assert (to / "model.safetensors").is_file()


def test_without_a_target_the_folder_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("demo") == 0
    assert Path(capsys.readouterr().out.strip(), "config.json").is_file()


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="to: "):
        run("demo", "--to", str(tmp_path / "file"))
    with pytest.raises(ModelNotFoundError):
        run(str(tmp_path / "none"))
