"""The plots of `scalellm simulate`; they need matplotlib, which the dev dependencies bring."""

import json
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.figure import Figure

from scalellm.bench.lengths import Fixed
from scalellm.bench.plan import Level, Workload
from scalellm.bench.sources import Synthetic
from scalellm.cli.main import main
from scalellm.controller.blueprint.cost import read_calibration
from scalellm.controller.blueprint.policy import Settings
from scalellm.controller.blueprint.shape import uniform
from scalellm.simulator.compare import Setup, run_auto, summary_of
from scalellm.simulator.plots import _panel, write_plot
from scalellm.simulator.report import Objectives
from scalellm.simulator.requests import Open


def texts(svg: Path) -> Counter[str]:
    """What is written in it."""
    found = ElementTree.fromstring(svg.read_text(encoding="utf-8")).iter()
    return Counter("".join(one.itertext()).strip() for one in found if one.tag.endswith("text"))


def test_the_command_draws_every_plan_and_switch_of_its_report(tmp_path: Path) -> None:
    drawn, written = tmp_path / "out.svg", tmp_path / "out.json"
    assert (
        main(["simulate", "--concurrency", "4,200", "--plot", str(drawn), "--json", str(written)])
        == 0
    )
    rows = json.loads(written.read_text())["rows"]
    switches = [one for row in rows for one in row["switched"]]
    assert switches
    wanted = Counter(row["plan"] for row in rows)
    wanted += Counter(f"{g['count']} x TP {g['tp']}" for one in switches for g in one["blueprint"])
    found = texts(drawn)
    assert {name: found[name] for name in wanted} == wanted
    assert found["TTFT ms"] == found["requests"] == len(rows)


def test_a_panel_holds_what_the_report_says(tmp_path: Path) -> None:
    calibration = read_calibration("node-8gpu")
    plans = uniform(calibration.widths, 8)
    levels = [Level(rate=rate, duration_s=20.0) for rate in (4.0, 110.0)]
    workload = Workload(source=Synthetic(Fixed(128), Fixed(64)))
    setup = Setup(calibration, lambda: Open([(one, workload) for one in levels], 2048))
    ran = run_auto(setup, plans, plans[0], Settings("latency", min_stay_s=5.0))
    run, summary = ran[0], summary_of("auto", ran, Objectives(1e9, 1e9))
    axes = Figure().subplots()
    _panel(axes, summary.plan, run)
    counts, *marks = axes.get_lines()
    waits = axes.figure.axes[1].get_lines()[0]
    assert axes.get_title() == "auto"
    assert [line.get_xdata()[0] for line in marks] == [one.at_ms / 1e3 for one in run.switches]
    assert len(marks) == summary.switches > 0
    assert [note.get_text() for note in axes.texts] == [str(one.blueprint) for one in run.switches]
    ttft_ms = np.asarray(waits.get_ydata())
    assert len(ttft_ms) == summary.requests - summary.failed
    assert np.percentile(ttft_ms, 99) == pytest.approx(summary.ttft_ms["p99"])
    at_s, at_once = np.asarray(counts.get_xdata()), np.asarray(counts.get_ydata())
    middle = len(at_s) // 2
    lives = [(one.send.at_ms / 1e3, one.end_ms / 1e3) for one in run.served]
    assert at_once[middle] == sum(begin < at_s[middle] <= end for begin, end in lives) > 0
    assert at_once[-1] <= 1  # the edge is the last one's end

    for name, begin in (("a.png", b"\x89PNG"), ("a.svg", b"<svg")):
        write_plot(["auto"], [run], tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(begin)


def test_another_kind_of_file_is_refused_before_anything_is_simulated(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["simulate", "--plot", str(tmp_path / "out.pdf")]) == 2
    captured = capsys.readouterr()
    assert "--plot: got 'out.pdf', allowed: .svg or .png" in captured.err
    assert captured.out == ""
    assert list(tmp_path.iterdir()) == []
