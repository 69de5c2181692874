"""Which file a deployment's decisions go to."""

import os
from pathlib import Path

import pytest

from scalellm.cli.journalled import journalled
from scalellm.config import (
    BlueprintConfig,
    DeploymentConfig,
    EngineConfig,
    GatewayConfig,
    LogConfig,
    ServeConfig,
)
from scalellm.controller.report import Report


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    return tmp_path / "scalellm" / "journals"


def kept(journal: str | None = None, model: str = "some/model") -> Path | None:
    """The file of one start."""
    config = ServeConfig(
        EngineConfig(model=model),
        GatewayConfig(),
        DeploymentConfig(blueprint="auto"),
        LogConfig(),
        BlueprintConfig(journal=journal),
    )
    return journalled(config, Report()).blueprint.journal_file


def test_each_start_has_a_file_of_its_own(state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [kept(), kept(), kept(model="x y")]
    assert sorted(files, key=str) == sorted(state.iterdir())
    names = [file.name for file in files if file is not None]
    assert [name.split("-2")[0] for name in names] == ["model", "model", "x-y"]
    said = capsys.readouterr().err
    assert all(f"decisions about the shape are kept in {file}" in said for file in files)
    assert state.stat().st_mode & 0o077 == 0


def test_the_oldest_files_go(state: Path) -> None:
    state.mkdir(parents=True)
    for age_s in range(40):
        old = state / f"model-{age_s}.jsonl.1"
        old.touch()
        os.utime(old, (1e9 - age_s, 1e9 - age_s))
    assert kept() is not None
    left = {file.name for file in state.iterdir() if file.name.endswith(".1")}
    assert left == {f"model-{age_s}.jsonl.1" for age_s in range(31)}


def test_another_place_or_none_can_be_asked_for(
    state: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert kept("mine.jsonl") == Path("mine.jsonl")
    assert "are kept in mine.jsonl" in capsys.readouterr().err
    assert kept("none") is None
    assert capsys.readouterr().err == ""
    assert not state.exists()


def test_a_folder_that_cannot_be_written_is_said_once(
    state: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state.parent.touch()
    assert kept() is None
    said = capsys.readouterr().err
    assert said.count("decisions about the shape are not kept") == said.count("\n") == 1
