"""Gateways' figures: kept, gone on from, and put into a table."""

from dataclasses import replace
from pathlib import Path

import pytest
from bench_gateway import Record, table
from gateway_measures import Amounts, Figures
from peers.gateway import Backend, Cores
from peers.nginx import GATEWAY as NGINX
from peers.system import PeerError

FOUND = Figures("nginx", 0, request_s=60_000.0, cpu_us_chunk=5.0, cpu_us_paced_chunk=13.0)


def test_what_was_measured_is_kept_and_what_failed_is_tried_again(tmp_path: Path) -> None:
    record = Record.open(tmp_path / "gateways.json", fresh=False)
    record.add(FOUND).add(Figures("smg", 0, error="no wheel"))
    again = Record.open(tmp_path / "gateways.json", fresh=False)
    assert again.figures == (FOUND,)
    assert again.has("nginx", 0) and not again.has("nginx", 1) and not again.has("smg", 0)
    assert Record.open(tmp_path / "gateways.json", fresh=True).figures == ()


def test_cells_are_medians_and_gateways_without_figures_are_named() -> None:
    slower = replace(FOUND, repeat=1, request_s=50_000.0)
    failed = Figures("litellm", 0, error="no\nwheel")
    text = table(Record(Path("g.json"), "2026", (FOUND, slower, failed)))
    (row,) = [line for line in text.splitlines() if line.startswith("| nginx")]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[:4] == ["nginx, plain proxy", "55000", "-", "5.00, 13.0"]
    assert "- Not measured: LiteLLM" in text and "no wheel" in text


def test_a_slow_gateway_is_asked_less() -> None:
    amounts = Amounts(3.0)
    assert amounts.for_slow().held < amounts.held


def test_one_core_is_not_enough() -> None:
    assert Cores.of([4, 7, 8]) == Cores(4, 7)
    with pytest.raises(PeerError, match="second"):
        Cores.of([0])


def test_nginx_is_told_where_to_pass_requests_on(tmp_path: Path) -> None:
    behind = Backend("unix:/e", "http://127.0.0.1:4321", tmp_path)
    launch = NGINX.launch(tmp_path, 1234, behind)
    config = Path(launch.argv[-1]).read_text()
    assert "server 127.0.0.1:4321;" in config and "listen 127.0.0.1:1234;" in config
