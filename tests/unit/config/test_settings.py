"""Settings: ranges, origins, the file, and that each is documented."""

from pathlib import Path
from typing import Any

import pytest

from scalellm.cli.config import markdown
from scalellm.cli.main import COMMANDS
from scalellm.config import (
    GROUPS,
    SETTINGS,
    EngineConfig,
    GatewayConfig,
    build,
    resolve,
)
from scalellm.errors import ConfigError
from scalellm.settings import declared, parse_bytes

DOCS = Path(__file__).parents[3] / "docs" / "settings.md"


@pytest.mark.parametrize("name", sorted(SETTINGS))
def test_every_setting_is_documented(name: str) -> None:
    setting = SETTINGS[name]
    assert f"`{setting.variable}`" in DOCS.read_text(encoding="utf-8"), "make docs"
    assert len(setting.declaration.help) > 10
    assert "\n" not in setting.declaration.help
    assert set(setting.declaration.commands) <= set(COMMANDS)


def test_docs_are_what_the_declarations_say() -> None:
    assert DOCS.read_text(encoding="utf-8") == markdown(), "make docs"


def test_names_and_flags_are_unique() -> None:
    names = [name for group in GROUPS for name in declared(group)]
    assert len(names) == len(set(names))
    flags = [found.flag for found in SETTINGS.values()]
    assert len(flags) == len(set(flags))


def test_defaults_are_valid() -> None:
    for group in GROUPS:
        group()


def test_flag_beats_environment_beats_file_beats_default(tmp_path: Path) -> None:
    file = tmp_path / "scalellm.toml"
    file.write_text('port = 1\nhost = "::1"\nmax_num_seqs = 7\n')
    environment = {"SCALELLM_PORT": "2", "SCALELLM_HOST": "0.0.0.0"}
    values = resolve({"port": 3}, environment, file)
    assert (values["port"].value, values["port"].origin) == (3, "flag --port")
    assert (values["host"].value, values["host"].origin) == (
        "0.0.0.0",
        "environment SCALELLM_HOST",
    )
    assert values["max_num_seqs"].value == 7
    assert values["max_num_seqs"].origin == f"file {file}"
    assert values["block_size"].origin == "default"
    assert build(EngineConfig, values).max_num_seqs == 7
    assert build(GatewayConfig, values).port == 3


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("prot = 8000\n", "unknown setting 'prot'; did you mean 'port'?"),
        ("port = '8000'\n", "port: got '8000'"),
        ("port = 70000\n", "allowed: a whole number from 0 to 65535"),
        ("port = true\n", "port: got True"),
        ("enable_prefix_caching = 1\n", "allowed: true or false"),
        ("api_key = [1]\n", "api_key: got a secret"),
        ("api_key = ['']\n", "api_key: got an empty text"),
        ("api_key = 'k 1'\n", "api_key: got a secret with other characters"),
        ("port = \n", "Invalid value"),
        ("[engine]\nport = 1\n", "unknown setting 'engine'"),
    ],
)
def test_a_wrong_file_is_refused_by_name(tmp_path: Path, text: str, expected: str) -> None:
    file = tmp_path / "scalellm.toml"
    file.write_text(text)
    with pytest.raises(ConfigError) as error:
        resolve({}, {}, file)
    assert expected in str(error.value)
    assert str(file) in str(error.value)


@pytest.mark.parametrize(
    ("variable", "text", "expected"),
    [
        (
            "SCALELLM_PORT",
            "x",
            "port: got 'x' (environment SCALELLM_PORT); allowed: a whole number",
        ),
        ("SCALELLM_GPU_MEMORY_UTILIZATION", "nan", "allowed: a number above 0, at most 1"),
        ("SCALELLM_ENABLE_PREFIX_CACHING", "maybe", "allowed: true or false"),
        ("SCALELLM_DTYPE", "float8", "allowed: auto, float32, bfloat16"),
        ("SCALELLM_QUANTIZATION", "int3", "allowed: auto, none, int8, int4"),
        ("SCALELLM_KV_CACHE_MEMORY_BYTES", "4 parsecs", "kv_cache_memory_bytes: got"),
    ],
)
def test_a_wrong_variable_is_refused_by_name(variable: str, text: str, expected: str) -> None:
    with pytest.raises(ConfigError) as error:
        resolve({}, {variable: text})
    assert expected in str(error.value)


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_num_seqs": 0},
        {"max_num_seqs": 2.0},
        {"step_budget_ms": 0},
        {"gpu_memory_utilization": float("nan")},
        {"model": 3},
        {"max_model_len": 0},
        {"tensor_parallel_size": 9},
    ],
)
def test_configs_check_themselves(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        EngineConfig(**wrong)


def test_whole_numbers_are_numbers() -> None:
    budget = EngineConfig(step_budget_ms=50).step_budget_ms
    assert budget == 50.0
    assert isinstance(budget, float)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1048576", 1 << 20),
        ("4GiB", 4 << 30),
        ("1.5 GiB", 3 << 29),
        ("2g", 2 * 10**9),
        ("8MB", 8 * 10**6),
    ],
)
def test_sizes_take_units(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "4 TiB", "-", "1k2", "inf", "nan", "4kg", "4ib"])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(ValueError):
        parse_bytes(text)


def test_texts_are_separated_by_commas() -> None:
    values = resolve({}, {"SCALELLM_API_KEY": "one, two"})
    assert values["api_key"].value == ("one", "two")
