"""Plots and the HTML report; they need matplotlib, which the dev dependencies bring."""

import re
from xml.etree import ElementTree

import pytest
from rich.console import Console

from scalellm.bench import plots
from scalellm.bench.plan import Level, Workload
from scalellm.bench.report import report, write_report
from scalellm.bench.serve import Options, run_bench
from scalellm.bench.slo import Slo
from scalellm.errors import ConfigError


@pytest.fixture
def result(endpoint):
    endpoint.behaviour.models = ["<b>tiny</b>"]
    levels = (
        Level(concurrency=1, requests=2),
        Level(concurrency=2, requests=4),
        Level(rate=50, requests=3),
    )
    workload = Workload(input_tokens=8, output_tokens=3)
    slo = Slo({"ttft": 60_000.0})
    return run_bench(Options(endpoint.url, levels, workload, slo=slo), Console(quiet=True))


def test_plots_are_written_as_png_and_svg(result, tmp_path) -> None:
    png, svg = plots.write_plots(result, tmp_path / "out.v1.svg")
    assert (png.name, svg.name) == ("out.v1.png", "out.v1.svg")
    assert png.read_bytes().startswith(b"\x89PNG")
    text = svg.read_text(encoding="utf-8")
    ElementTree.fromstring(text)
    for words in ("time to first token", "throughput over latency", "concurrent requests"):
        assert words in text
    assert plots.write_plots(result, tmp_path / "plain")[0].name == "plain.png"


def test_the_report_stands_alone_and_escapes_what_servers_say(result, tmp_path) -> None:
    path = tmp_path / "report.html"
    write_report(result, path)
    text = path.read_text(encoding="utf-8")
    assert text.startswith("<!DOCTYPE html>")
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", text), "nothing is fetched"
    assert "<b>tiny</b>" not in text
    assert "&lt;b&gt;tiny&lt;/b&gt;" in text
    for words in ("50/s", "met objectives", "100.0%", "load generator: sends late by"):
        assert words in text


def test_a_run_in_which_nothing_completed_is_drawn_too(endpoint) -> None:
    endpoint.stop()
    options = Options(endpoint.url, (Level(concurrency=1, requests=1),), Workload())
    assert "nothing measured" in report(run_bench(options, Console(quiet=True)))


def test_missing_matplotlib_is_said_before_measuring(monkeypatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"pip install 'scalellm\[plot\]'"):
        plots.check_plots()
