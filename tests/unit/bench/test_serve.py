import io
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from scalellm.bench.plan import Level, Workload
from scalellm.bench.results import check_writable
from scalellm.bench.serve import Options, run_bench
from scalellm.bench.table import markdown_table, notes, print_result
from scalellm.cli.main import main
from scalellm.errors import ConfigError

CONTRACT = {
    "concurrency", "rate", "completed", "failed", "timed_out", "duration_s", "output_tok_s",
    "ttft_ms", "tbt_ms", "itl_ms", "max_gap_ms", "e2e_ms", "level",
}  # fmt: skip


def bench(endpoint, *levels: Level, json_path: Path | None = None, **workload):
    workload = {"input_tokens": 16, "output_tokens": 4, **workload}
    options = Options(endpoint.url, levels, Workload(**workload), json_path=json_path)
    return run_bench(options, Console(quiet=True))


def printed(result) -> str:
    console = Console(width=120, record=True, file=io.StringIO())
    print_result(result, console)
    return console.export_text()


def test_rows_follow_the_contract(endpoint, tmp_path) -> None:
    path = tmp_path / "result.json"
    closed = Level(concurrency=2, requests=6, warmup=1)
    opened = Level(rate=200.0, requests=5)
    result = bench(endpoint, closed, opened, json_path=path)
    document = json.loads(path.read_text())
    assert document == json.loads(json.dumps(result.to_json()))
    assert document["schema"] == 1
    assert document["machine"]["cores"] >= 1
    assert document["target"]["model"] == "tiny"
    first, second = document["rows"]
    assert set(first) >= CONTRACT
    assert (first["concurrency"], first["rate"], first["completed"]) == (2, None, 6)
    assert (second["concurrency"], second["rate"], second["completed"]) == (None, 200.0, 5)
    for name in ("ttft_ms", "tbt_ms", "itl_ms", "max_gap_ms", "e2e_ms"):
        assert set(first[name]) >= {"mean", "p50", "p90", "p99"}
    assert first["output_tokens"] == 6 * 4
    assert first["input_tokens"] == 6 * 16
    assert first["level"] == "ok"
    assert result.failed == 0


def test_no_prompt_is_sent_twice_over_warm_ups_and_levels(endpoint) -> None:
    level = Level(concurrency=2, requests=6, warmup=2)
    bench(endpoint, level, level)
    prompts = [body["prompt"] for body in endpoint.behaviour.bodies]
    assert len(prompts) == 16
    assert len(set(prompts)) == 16


def test_requests_ask_for_greedy_full_length_answers(endpoint) -> None:
    endpoint.behaviour.owned_by = "vllm"
    bench(endpoint, Level(concurrency=1, requests=1), extra_body={"top_k": 5})
    body = endpoint.behaviour.bodies[-1]
    expected = {
        "temperature": 0.0, "ignore_eos": True, "max_tokens": 4, "stream": True, "top_k": 5,
        "return_token_ids": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    assert expected.items() <= body.items()


def test_the_table_shows_each_level_and_the_generators_lag(endpoint) -> None:
    text = printed(bench(endpoint, Level(concurrency=2, requests=4), Level(rate=50, requests=2)))
    assert "TTFT" in text
    assert "50/s" in text
    assert "load generator: sends late by" in text


def test_chunks_counted_as_tokens_are_said_so(endpoint) -> None:
    endpoint.behaviour.gives_usage = False
    result = bench(endpoint, Level(concurrency=1, requests=2))
    assert result.rows[0]["output_tokens"] == 8
    assert any("no token counts" in str(line) for line in notes(result))


def test_a_wrong_model_is_counted_with_the_endpoints_words(endpoint) -> None:
    level = (Level(concurrency=2, requests=3),)
    options = Options(endpoint.url, level, Workload(output_tokens=2), model="other")
    result = run_bench(options, Console(quiet=True))
    assert result.failed == 3
    assert result.rows[0]["failures"]["status"]["count"] == 3
    assert "no model 'other'" in printed(result)


def test_an_unreachable_endpoint_is_counted_and_the_run_goes_on(endpoint) -> None:
    endpoint.stop()
    result = bench(endpoint, Level(concurrency=1, requests=2), Level(concurrency=2, requests=2))
    assert [row["failures"]["connect"]["count"] for row in result.rows] == [2, 2]
    assert "refused" in result.target["problem"]
    assert "| 1 | failed | failed | 0.0 | 0 of 2 |" in markdown_table(result.rows)


def test_a_level_where_too_many_time_out_is_marked(endpoint) -> None:
    endpoint.behaviour.hang_after = 2
    result = bench(endpoint, Level(concurrency=1, requests=4), timeout_s=0.3)
    row = result.rows[0]
    assert (row["completed"], row["timed_out"], row["level"]) == (2, 2, "timeout")
    assert row["level_published_rule"] == "ok"
    assert "| 1 | timeout | timeout |" in markdown_table(result.rows)
    assert "2 timeout" in printed(result)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--concurrency", "1,x"], "--concurrency: got '1,x'"),
        (["--concurrency", "0"], "--concurrency: got '0'"),
        (["--rate", "-1"], "--rate: got '-1'"),
        (["--requests", "0"], "--requests: got 0"),
        (["--timeout", "0"], "--timeout: got 0"),
        (["--input-tokens", "0"], "--input-tokens: got 0"),
        (["--extra-body", "[1]"], "--extra-body: got '[1]'"),
        (["--url", "ftp://a"], "url: got 'ftp://a'"),
        (["--json", "/no/such/folder/a.json"], "json: there is no folder"),
    ],
)
def test_wrong_flags_name_what_is_allowed(flags, message, capsys) -> None:
    assert main(["bench", "serve", *flags]) == 2
    assert message in capsys.readouterr().err


def test_the_exit_code_says_whether_requests_failed(endpoint, tmp_path, capsys) -> None:
    path = tmp_path / "out.json"
    flags = ["--url", endpoint.url, "--concurrency", "2", "--requests", "3", "--output-tokens", "2"]
    assert main(["bench", "serve", *flags, "--json", str(path)]) == 0
    assert "TTFT" in capsys.readouterr().out
    assert json.loads(path.read_text())["rows"][0]["completed"] == 3
    assert main(["bench", "serve", *flags, "--model", "other"]) == 1


def test_ctrl_c_writes_what_was_measured(endpoint, tmp_path) -> None:
    endpoint.behaviour.hang_after = 3
    path = tmp_path / "out.json"
    command = [sys.executable, "-m", "scalellm.cli.main", "bench", "serve", "--url", endpoint.url]
    flags = ["--concurrency", "1,2", "--output-tokens", "2", "--warmup", "0", "--json", str(path)]
    process = subprocess.Popen(command + flags, stdout=subprocess.PIPE, text=True)
    try:
        while len(endpoint.behaviour.bodies) < 4:
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 130
    document = json.loads(path.read_text())
    assert document["interrupted"]
    (row,) = document["rows"]
    assert (row["completed"], row["cancelled"]) == (3, 1)
    assert "TTFT" in output


def test_an_unwritable_result_is_refused_before_measuring(tmp_path) -> None:
    with pytest.raises(ConfigError, match="is a folder"):
        check_writable(tmp_path)
