import io
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from scalellm.bench.lengths import Fixed
from scalellm.bench.plan import Client, Level, Workload
from scalellm.bench.results import check_writable
from scalellm.bench.search import RateSearch
from scalellm.bench.serve import Options, _levels, run_bench
from scalellm.bench.slo import Slo
from scalellm.bench.sources import Conversations, Synthetic
from scalellm.bench.table import markdown_table, notes, print_result
from scalellm.cli.main import main
from scalellm.errors import ConfigError

CONTRACT = {
    "concurrency", "rate", "completed", "failed", "timed_out", "duration_s", "output_tok_s",
    "ttft_ms", "tbt_ms", "itl_ms", "max_gap_ms", "e2e_ms", "level",
}  # fmt: skip


def bench(target, *levels: Level, json_path: Path | None = None, **workload):
    workload = {"input_tokens": 16, "output_tokens": 4, **workload}
    options = Options(target.url, levels, Workload(**workload), json_path=json_path)
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


def test_requests_sent_again_are_no_failures_and_are_said(endpoint) -> None:
    endpoint.behaviour.closes_unsaid = True
    result = bench(endpoint, Level(concurrency=1, requests=4))
    (row,) = result.rows
    assert (row["completed"], row["failed"]) == (4, 0)
    row["resent"] = 2  # whether the generator saw an end before it sent is a race
    assert any("2 sent again" in str(line) for line in notes(result))


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
        (["--arrivals", "often"], "arrivals: got 'often'"),
        (["--slo", "ttft=x"], "--slo: got 'ttft=x'"),
        (["--find-max"], "--find-max: needs --slo"),
        (["--find-max", "--slo", "ttft=1", "--no-stream"], "--find-max: needs --stream"),
        (["--workload", "mooncake", "--prompt-file", "a"], "--prompt-file and --workload: allowed"),
        (["--trace", "/no/such.jsonl"], "/no/such.jsonl: No such file"),
        (["--input-lognormal", "7"], "--input-lognormal: got '7'"),
        (["--prefix-reuse", "1"], "--prefix-reuse: got 1.0"),
        (["--client", "cv=3"], "--client: got 'cv=3', allowed: rate=R"),
        (["--client", "rate=1,colour=red"], "--client: got"),
        (["--client", "rate=1,input=x"], "--client: got"),
        (["--repeat", "0"], "--repeat: got 0"),
        (["--plot", "/no/such/folder/a"], "plot: there is no folder"),
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


def test_objectives_stand_in_rows_and_table(endpoint, tmp_path, capsys) -> None:
    path = tmp_path / "out.json"
    flags = ["--url", endpoint.url, "--concurrency", "2", "--requests", "4", "--output-tokens", "2"]
    goals = ["--slo", "ttft=60000,tbt=60000", "--json", str(path), "--repeat", "2"]
    assert main(["bench", "serve", *flags, *goals]) == 0
    rows = json.loads(path.read_text())["rows"]
    assert [row["slo"]["share"] for row in rows] == [1.0, 1.0]
    assert "100%" in capsys.readouterr().out


def searched(limit: float, bottleneck_from: float = float("inf")):
    """The rates that are tried at a target that holds up to `limit`, and what is known then."""
    search, rows, tried = RateSearch(1.0), [], []
    options = Options("http://h", (), find_max=Level(rate=1.0, requests=1))
    for level in _levels(options, search, rows):
        tried.append(level.rate)
        bottleneck = level.rate >= bottleneck_from
        held = {"held": level.rate <= limit and not bottleneck}
        rows.append({"generator": {"bottleneck": bottleneck}, "slo": held})
    return tried, search


def test_find_max_drives_levels_until_the_rate_is_known() -> None:
    tried, search = searched(limit=5.0)
    assert tried[:4] == [1.0, 2.0, 4.0, 8.0]
    assert search.is_found
    assert search.held <= 5.0 < search.missed


def test_find_max_ends_where_the_generator_is_the_bottleneck() -> None:
    tried, search = searched(limit=100.0, bottleneck_from=8.0)
    assert tried == [1.0, 2.0, 4.0, 8.0]
    assert (search.held, search.missed) == (4.0, None)


def test_find_max_writes_what_it_tried(endpoint) -> None:
    slo, level = Slo({"ttft": 1e-6}), Level(rate=640.0, requests=2)
    options = Options(
        endpoint.url, (), Workload(input_tokens=4, output_tokens=2), slo=slo, find_max=level
    )
    result = run_bench(options, Console(quiet=True))
    found = result.to_json()["find_max"]
    assert (found["rate"], found["found"], found["slo_ms"]) == (None, False, {"ttft": 1e-6})
    rates = [row["rate"] for row in result.rows]
    assert rates[0] == 640.0
    assert min(rates) >= 10.0
    assert "no rate held the objectives" in printed(result)


def test_conversations_send_the_answers_back(endpoint) -> None:
    source = Conversations(Fixed(5), Fixed(3), turns=3, systems=1, system_tokens=6)
    result = bench(endpoint, Level(concurrency=1, requests=6), endpoint="chat", source=source)
    assert result.failed == 0
    assert not result.workload["prompts"]["exact"]
    said = [body["messages"] for body in endpoint.behaviour.bodies]
    assert [len(messages) for messages in said] == [2, 4, 6, 2, 4, 6]
    assert said[2][2] == {"role": "assistant", "content": "xxx"}
    assert len({messages[0]["content"] for messages in said}) == 1
    assert result.rows[0]["asked_input_tokens"] is None


def test_clients_are_counted_one_by_one(endpoint) -> None:
    clients = (
        Client("a", 1.0, "constant", Synthetic(Fixed(4), Fixed(2))),
        Client("b", 3.0, "gamma:2", Synthetic(Fixed(8), Fixed(3))),
    )
    level = Level(rate=100.0, arrivals="clients", requests=40)
    result = bench(endpoint, level, clients=clients)
    row = result.rows[0]
    assert sum(client["completed"] for client in row["clients"].values()) == 40
    assert row["asked_input_tokens"] == row["input_tokens"]
    assert row["asked_output_tokens"] == row["output_tokens"]
    assert [client["name"] for client in result.workload["clients"]] == ["a", "b"]


def test_lengths_are_cut_to_the_context_that_the_target_tells(endpoint) -> None:
    endpoint.behaviour.max_model_len = 50
    source = Synthetic(Fixed(500), Fixed(20))
    bench(endpoint, Level(concurrency=1, requests=2), source=source)
    body = endpoint.behaviour.bodies[-1]
    assert (endpoint.behaviour.count(body["prompt"]), body["max_tokens"]) == (30, 20)


@pytest.mark.parametrize(
    "flags",
    [
        ["--workload", "azure-conversation", "--length-scale", "0.01"],
        ["--workload", "mooncake", "--length-scale", "0.01", "--max-input-tokens", "90"],
        ["--workload", "conversations", "--turns", "2", "--system-tokens", "5"],
        ["--rate", "200", "--arrivals", "onoff:0.05/0.05"],
        ["--client", "rate=50,cv=3,input=9", "--client", "rate=99,workload=azure-code,output=2"],
        ["--prefix-reuse", "0.4", "--output-lognormal", "0.5/0.2"],
    ],
)
def test_every_workload_runs_from_the_command_line(endpoint, flags, capsys) -> None:
    common = ["--url", endpoint.url, "--requests", "6", "--input-tokens", "12", "--warmup", "1"]
    if not any(flag in flags for flag in ("--rate", "--client")):
        common += ["--concurrency", "2"]
    assert main(["bench", "serve", *common, "--output-tokens", "2", *flags]) == 0
    assert "TTFT" in capsys.readouterr().out


def test_a_ramp_is_refused_that_no_level_could_have(capsys) -> None:
    for ramp in ("-1", "nan", "1e9"):
        assert main(["bench", "serve", "--concurrency", "2", f"--ramp={ramp}"]) == 2
        assert "--ramp: got" in capsys.readouterr().err


def test_a_trace_and_a_file_of_prompts_run_from_the_command_line(endpoint, tmp_path) -> None:
    trace, prompts, out = (tmp_path / name for name in ("t.jsonl", "p.txt", "out.json"))
    times = [{"timestamp": at, "input_length": 9, "output_length": 2} for at in (0, 20, 40)]
    trace.write_text("".join(json.dumps(row) + "\n" for row in times))
    prompts.write_text("what is this\nand that\n")
    common = ["bench", "serve", "--url", endpoint.url, "--json", str(out)]
    assert main([*common, "--trace", str(trace), "--trace-speed", "2"]) == 0
    (row,) = json.loads(out.read_text())["rows"]
    starts = sorted(request[2] for request in row["records"]["rows"])
    assert (row["completed"], starts) == (3, [0.0, 10.0, 20.0])
    flags = ["--prompt-file", str(prompts), "--concurrency", "1", "--warmup", "0"]
    assert main([*common, *flags, "--output-tokens", "2"]) == 0
    assert json.loads(out.read_text())["workload"]["prompts"]["method"] == "file"
    assert [body["prompt"] for body in endpoint.behaviour.bodies[-2:]] == [
        "what is this", "and that",
    ]  # fmt: skip


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
