"""From settings to commands, files and addresses."""

import argparse
import json
import socket
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from scalellm.cli.flags import add_settings, resolve_arguments
from scalellm.config import (
    BlueprintConfig,
    DeploymentConfig,
    EngineConfig,
    GatewayConfig,
    LogConfig,
    ServeConfig,
    build,
)
from scalellm.controller.deployment import Served, free_port, plan_deployment
from scalellm.controller.launchers.local import LocalLauncher
from scalellm.controller.runtime_folder import make_runtime_folder
from scalellm.errors import AddressInUseError, ConfigError, ServeError


def serve_config(**engine: Any) -> ServeConfig:
    return ServeConfig(
        engine=EngineConfig(**engine),
        gateway=GatewayConfig(api_key=('k"1', "k\\2"), host="0.0.0.0"),
        deployment=DeploymentConfig(replicas=2, drain_timeout_s=7),
        log=LogConfig(log_format="json"),
    )


def test_an_engine_gets_exactly_what_serve_resolved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = serve_config(
        model="demo", max_num_seqs=9, enable_prefix_caching=False, kv_cache_memory_bytes=1 << 20
    )
    model = Served(config, tmp_path / "model")
    plan = plan_deployment([model], 8123, tmp_path, LocalLauncher(tmp_path))
    address, command = plan.engines["engine-1"]
    arguments = command.arguments[command.arguments.index("engine") + 1 :]
    parser = argparse.ArgumentParser()
    add_settings(parser, "engine", positional=("model",))
    # an environment or a file of the working folder that says otherwise does not matter
    monkeypatch.chdir(tmp_path)
    Path("scalellm.toml").write_text("max_num_seqs = 5\nmax_model_len = 64\n")
    environment = {"SCALELLM_MAX_NUM_SEQS": "3", "SCALELLM_CONFIG": "scalellm.toml"}
    values = resolve_arguments(parser.parse_args(arguments), environment)
    engine = build(EngineConfig, values)
    assert engine.model == str(tmp_path / "model")
    assert engine.served_model_name == "demo"
    assert engine.max_num_seqs == 9
    assert engine.max_model_len is None
    assert engine.enable_prefix_caching is False
    assert engine.kv_cache_memory_bytes == 1 << 20
    assert engine.listen == address == f"unix:{tmp_path}/engine-1.sock"
    assert engine.cpu_threads is not None
    assert values["log_format"].value == "json"
    assert plan.url == "http://127.0.0.1:8123"


def test_the_gateways_file_is_private_toml(tmp_path: Path) -> None:
    template = tmp_path / "t.jinja"
    name = 'd"\x7f\U0001f600'
    config = serve_config(model="demo", served_model_name=name, max_model_len=77)
    model = Served(config, tmp_path / "model")
    plan_deployment([model], 8123, tmp_path, LocalLauncher(tmp_path))
    file = tmp_path / "gateway.toml"
    assert file.stat().st_mode & 0o777 == 0o600
    found = tomllib.loads(file.read_text(encoding="utf-8"))
    assert found["port"] == 8123
    assert found["api_keys"] == ['k"1', "k\\2"]
    assert found["drain_timeout_s"] == 7
    assert found["models"] == [
        {
            "name": name,
            "path": str(tmp_path / "model"),
            "replicas": [f"unix:{tmp_path}/engine-{i}.sock" for i in range(2)],
            "routing": "prefix",
            "blueprint_file": f"{tmp_path}/blueprint-0.json",
            "max_model_len": 77,
        }
    ]
    assert not template.exists()


def test_several_models_have_replicas_and_sections_of_their_own(tmp_path: Path) -> None:
    names = ["org/Big Model", "big", "big model two"]
    models = [
        Served(serve_config(model="demo", served_model_name=name), tmp_path / name, cores=4)
        for name in names
    ]
    plan = plan_deployment(models, 8123, tmp_path, LocalLauncher(tmp_path))
    assert list(plan.engines) == [
        *("big-model-0", "big-model-1", "big-0", "big-1", "big-model-two-m2-0"),
        "big-model-two-m2-1",
    ]
    assert plan.model == ",".join(names)
    found = tomllib.loads((tmp_path / "gateway.toml").read_text(encoding="utf-8"))
    assert [model["name"] for model in found["models"]] == names
    assert found["models"][1]["replicas"] == [f"unix:{tmp_path}/big-{at}.sock" for at in (0, 1)]
    for at in range(3):
        state = json.loads((tmp_path / f"blueprint-{at}.json").read_text())
        assert state["blueprint"] == [{"tp": 1, "count": 2}]
    _, command = plan.engines["big-1"]
    threads = command.arguments[command.arguments.index("--cpu-threads") + 1]
    assert threads == "2"


def test_the_root_tells_of_static_models_alone(tmp_path: Path) -> None:
    static, auto = (serve_config(model="demo", served_model_name=name) for name in ("a", "b"))
    auto = replace(
        auto,
        deployment=replace(auto.deployment, replicas=1, blueprint="auto"),
        blueprint=BlueprintConfig(devices=2, calibration="cpu-qwen3-0.6b-int8"),
    )
    models = [Served(config, tmp_path, cores=2, widths=(1, 2)) for config in (auto, static)]
    plan = plan_deployment(models, 8123, tmp_path, LocalLauncher(tmp_path))
    assert [steering["model"] for steering in plan.steering] == ["b"]
    assert plan.state_files == dict.fromkeys(("a-0", "a-1"), tmp_path / "blueprint-1.json")


def test_a_refused_plan_names_its_model(tmp_path: Path) -> None:
    good, bad = (serve_config(model="demo", served_model_name=name) for name in ("good", "bad"))
    bad = replace(bad, blueprint=BlueprintConfig(replica=("tp=1",)))
    models = [Served(config, tmp_path) for config in (good, bad)]
    with pytest.raises(ConfigError, match=r"^model 'bad': --replica and --replicas"):
        plan_deployment(models, 8123, tmp_path, LocalLauncher(tmp_path))


def test_a_taken_port_is_said_at_once() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(AddressInUseError, match=f"port {port} of 127.0.0.1 is taken"):
            free_port("127.0.0.1", port)
    assert free_port("127.0.0.1", port) == port


def test_port_zero_is_any_free_one() -> None:
    assert free_port("127.0.0.1", 0) > 0


def test_an_address_that_is_not_ours_is_refused() -> None:
    with pytest.raises(ServeError, match="cannot listen on 192"):
        free_port("192.0.2.1", 8000)


def test_the_runtime_folder_is_private_and_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    folder = make_runtime_folder()
    assert folder.stat().st_mode & 0o777 == 0o700
    deep = tmp_path / ("d" * 100)
    deep.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(deep))
    shorter = make_runtime_folder()
    assert len(str(shorter / "engine-1023.sock")) <= 107
    assert list(deep.iterdir()) == []
    shorter.rmdir()
