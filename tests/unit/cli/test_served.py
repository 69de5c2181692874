"""Which models a command line and a file ask for."""

import argparse
from pathlib import Path

import pytest

import scalellm.demo
from scalellm.cli import serve
from scalellm.cli.served import Asked, asked
from scalellm.errors import ConfigError

FILE = """
max_num_seqs = 5
devices = 3

[[models]]
model = "demo"
served_model_name = "small"

[[models]]
model = "demo"
served_model_name = "big"
max_num_seqs = 9
devices = 2
replica = ["tp=2"]
"""


def ask(*arguments: str) -> Asked:
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    return asked(parser.parse_args(arguments))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.usefixtures("folder")
def test_one_model_is_as_it_ever_was() -> None:
    (only,) = ask().models
    assert only.engine.model == "demo"
    (given,) = ask("a/b", "--devices", "2", "--served-model-name", "x").models
    assert (given.engine.model, given.engine.served_model_name) == ("a/b", "x")
    assert given.blueprint.devices == 2


def test_models_as_arguments_share_all_flags(folder: Path) -> None:
    (folder / "e=f").mkdir()
    found = ask("fast=demo", "org/m", "e=f", "--max-num-seqs", "7", "--devices", "4")
    assert [c.engine.served_model_name for c in found.models] == ["fast", None, None]
    assert [c.engine.model for c in found.models] == ["demo", "org/m", "e=f"]
    assert {c.engine.max_num_seqs for c in found.models} == {7}
    assert {c.blueprint.devices for c in found.models} == {None}
    assert found.devices == 4


def test_the_files_models_have_settings_of_their_own(folder: Path) -> None:
    (folder / "scalellm.toml").write_text(FILE)
    found = ask("--max-num-batched-tokens", "64")
    small, big = found.models
    assert (small.engine.max_num_seqs, big.engine.max_num_seqs) == (5, 9)
    assert (small.blueprint.devices, big.blueprint.devices, found.devices) == (None, 2, 3)
    assert big.blueprint.replica == ("tp=2",)
    assert small.engine.max_num_batched_tokens == big.engine.max_num_batched_tokens == 64


def test_several_models_may_do_without_journals(folder: Path) -> None:
    (folder / "scalellm.toml").write_text("journal = 'none'")
    found = ask("a=demo", "b=demo")
    assert [config.blueprint.journal_file for config in found.models] == [None, None]


@pytest.mark.parametrize(
    ("text", "arguments", "said"),
    [
        (FILE, ("demo",), "given as arguments and as [[models]]"),
        ("[[models]]\nmodel = 'demo'\nport = 1", (), "models[0].port: holds for all models"),
        ("[[models]]\nmodel = 'demo'\nmax_num_seq = 1", (), "did you mean 'max_num_seqs'?"),
        ("[[models]]\nmax_num_seqs = 1", (), "models[0].model: missing"),
        ("[[models]]\nmodel = 'demo'\nmax_num_seqs = 0", (), "max_num_seqs: got 0 (file"),
        ("models = 'demo'", (), "models: allowed are sections"),
        ("", ("demo", "demo"), "2 models are called 'demo'; NAME=MODEL"),
        ("", ("a=", "demo"), "got 'a=', allowed: MODEL or NAME=MODEL"),
        ("journal = 'j'", ("a=demo", "b=demo"), "journal: 2 models have 'j'"),
    ],
)
def test_what_cannot_be_is_refused_by_name(
    folder: Path, text: str, arguments: tuple[str, ...], said: str
) -> None:
    (folder / "scalellm.toml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        ask(*arguments)
    assert said in str(caught.value)


def test_nothing_large_is_fetched_for_a_deployment_that_cannot_be(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched = []

    def resolve(model: str, revision: str | None = None, weights: bool = True) -> Path:
        fetched.append((model, revision, weights))
        return Path(scalellm.demo.__file__).parent / "model"

    monkeypatch.setattr(serve, "resolve_model", resolve)
    text = FILE.replace("tp=2", "tp=3").replace("devices = 3", "devices = 6")
    (folder / "scalellm.toml").write_text(text.replace("devices = 2", "devices = 4"))
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    with pytest.raises(ConfigError, match="model 'big': --replica: got tp=3"):
        serve.run(parser.parse_args(["--port", "0"]))
    assert fetched == [("demo", None, False)] * 2


@pytest.mark.parametrize(
    ("given", "replicas"),
    [
        (("--replicas", "3"), 3),
        (("--replica", "tp=2", "--replica", "tp=1,count=2", "--devices", "4"), 3),
        # Two wide and four narrow ones, while the one shape takes over from the other.
        (("--blueprint", "auto", "--cpu-threads", "4", "--switch", "beside"), 6),
        (("--blueprint", "auto", "--cpu-threads", "4"), 4),  # the one, and then the other
    ],
)
def test_kv_caches_that_do_not_fit_together_are_refused(
    monkeypatch: pytest.MonkeyPatch, given: tuple[str, ...], replicas: int
) -> None:
    class FitsError(Exception):
        pass

    def resolved(*_: object) -> None:
        raise FitsError

    demo = Path(scalellm.demo.__file__).parent / "model"
    monkeypatch.setattr(serve, "resolve_model", lambda *_, **__: demo)
    monkeypatch.setattr(serve, "available_cpu_bytes", lambda: replicas * (900 << 20))
    monkeypatch.setattr(serve, "_resolve", resolved)
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)

    def run(size: str) -> None:
        all_given = ["demo", "--port", "0", "--kv-cache-memory", size, *given]
        serve.run(parser.parse_args(all_given))

    with pytest.raises(ConfigError, match=rf"'demo' {replicas} x 1.0 GiB.*900 MiB each"):
        run("1GiB")
    with pytest.raises(FitsError):
        run("900MiB")
