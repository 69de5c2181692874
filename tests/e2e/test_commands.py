"""The commands that talk to a running server, as programs with pipes around them."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from ..integration.served import START_S, Serve, own_environment

CONTRACT = {
    *("concurrency", "rate", "completed", "failed", "timed_out", "duration_s", "output_tok_s"),
    *("ttft_ms", "tbt_ms", "itl_ms", "max_gap_ms", "e2e_ms", "level"),
}


def scalellm(server: Serve, *arguments: str, typed: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "scalellm", *arguments],
        input=typed,
        capture_output=True,
        text=True,
        timeout=START_S,
        check=False,
        env=own_environment() | {"SCALELLM_URL": server.url},
    )


def test_chat_answers_each_line(server: Serve) -> None:
    typed = "What is the capital of Spain?\n\nWhat is the opposite of big?\n"
    done = scalellm(server, "chat", "--temperature", "0", typed=typed)
    assert done.stdout == "The capital of Spain is Madrid.\nThe opposite of big is small.\n"
    assert (done.returncode, done.stderr) == (0, "")


def test_chat_remembers_and_forgets(server: Serve) -> None:
    typed = "What is the capital of Spain?\n/history\n/reset\n/history\n/exit\nnot read\n"
    done = scalellm(server, "chat", "--temperature", "0", typed=typed)
    assert done.stdout.splitlines() == [
        "The capital of Spain is Madrid.",
        "user: What is the capital of Spain?",
        "assistant: The capital of Spain is Madrid.",
        "(forgotten)",
    ]
    assert done.returncode == 0


def test_complete_takes_its_prompt_from_a_pipe_too(server: Serve) -> None:
    flags = ("--temperature", "0", "--max-tokens", "8")
    given = scalellm(server, "complete", "The capital of", *flags)
    piped = scalellm(server, "complete", "-", *flags, typed="The capital of")
    assert given.stdout == piped.stdout
    assert len(given.stdout.strip()) > 0
    assert (given.returncode, piped.returncode) == (0, 0)


def test_what_cannot_be_asked_is_said_in_one_line(server: Serve) -> None:
    for arguments, said in (
        (("complete", "x", "--model", "other"), "other"),
        (("complete", "x", "--temperature", "9"), "temperature"),
        (("complete", ""), "prompt"),
        (("chat", "--url", "http://127.0.0.1:1"), "127.0.0.1:1"),
        (("chat", "--url", "nonsense"), "nonsense"),
    ):
        done = scalellm(server, *arguments, typed="hi\n")
        assert done.returncode in (1, 2)
        assert done.stderr.startswith(f"scalellm {arguments[0]}: ") and said in done.stderr
        assert done.stderr.count("\n") == 1


def test_status(server: Serve) -> None:
    done = scalellm(server, "status")
    assert done.returncode == 0
    assert done.stdout.startswith(f"{server.url} ready\n")
    assert " ready " in done.stdout.splitlines()[-1]


def test_bench_writes_the_json_of_its_contract(server: Serve, tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    done = scalellm(
        server,
        *("bench", "serve", "--requests", "3", "--concurrency", "1,2", "--warmup", "0"),
        *("--input-tokens", "16", "--output-tokens", "8", "--json", str(file)),
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(file.read_text())
    assert found["schema"] == 1
    assert {"target", "machine", "workload", "rows"} <= found.keys()
    assert [row["concurrency"] for row in found["rows"]] == [1, 2]
    for row in found["rows"]:
        assert row.keys() >= CONTRACT
        assert (row["completed"], row["failed"], row["timed_out"]) == (3, 0, 0)
        assert (row["rate"], row["level"]) == (None, "ok")
        assert row["output_tok_s"] > 0 and row["duration_s"] > 0
        for name in ("ttft_ms", "tbt_ms", "itl_ms", "max_gap_ms", "e2e_ms"):
            assert {"mean", "p50", "p90", "p99"} <= row[name].keys()
            assert 0 <= row[name]["p50"] <= row[name]["p90"] <= row[name]["p99"]
        assert 0 < row["ttft_ms"]["p50"] < row["e2e_ms"]["p50"]
        a_millisecond = row["output_tok_s"] / 1000  # to which the duration is given
        assert abs(row["output_tok_s"] * row["duration_s"] - 3 * 8) <= a_millisecond
