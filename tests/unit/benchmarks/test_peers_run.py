"""Systems take turns, one that fails stops no other, and a second call does what is missing."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from peers.measure import Load, Sample
from peers.record import Record, new_record, read_record
from peers.run import Plan, Run
from peers.system import Launch, PeerError, Running, System, free_port, running

# Answers 200 to everything, has a child of its own, and says its and the child's id first.
SERVER = """
import http.server, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("child", child.pid, flush=True)
http.server.ThreadingHTTPServer(
    ("127.0.0.1", int(sys.argv[1])), http.server.SimpleHTTPRequestHandler
).serve_forever()
"""
READY_PATH = "/"


def server(port: int) -> Launch:
    return Launch((sys.executable, "-c", SERVER, str(port)), ready_path=READY_PATH)


def system(name: str) -> System:
    return System(
        name, name.upper(), "bf16", lambda _cache, _log: None, lambda _, port: server(port)
    )


def unbuildable(name: str) -> System:
    def build(_cache: Path, _log: Path) -> None:
        raise PeerError("the registry has no such package")

    return replace(system(name), build=build)


def ends_at_once(name: str) -> System:
    argv = (sys.executable, "-c", "print('out of memory'); raise SystemExit(3)")
    return replace(system(name), launch=lambda _cache, _port: Launch(argv))


class Measured:
    """In the place of the load generator; notes what was asked of it."""

    def __init__(self, completed: int = 4) -> None:
        self.asked: list[tuple[str, int, int]] = []
        self._completed = completed

    def __call__(
        self, server: Running, load: Load, system: str, concurrency: int, repeat: int, _: Path
    ) -> Sample:
        assert server.url.startswith("http://127.0.0.1:") and load.ignore_eos
        self.asked.append((system, concurrency, repeat))
        return Sample(system, concurrency, repeat, requests=4, completed=self._completed)


@pytest.fixture
def record(tmp_path: Path) -> Record:
    return new_record(tmp_path / "systems.json", "python benchmarks/bench_peers.py")


def plan_of(record: Record, *systems: System, repeats: int) -> Plan:
    folder = record.path.parent
    return Plan(systems, (1, 8), repeats, Load(timeout_s=1.0), folder / "cache", folder / "logs")


def run(record: Record, measured: Measured, *systems: System, repeats: int = 1) -> Record:
    plan = plan_of(record, *systems, repeats=repeats)
    measuring = Run(plan, record, lambda _: None, measured)
    measuring.run()
    return measuring.record


def test_systems_take_turns_within_each_repeat(record: Record) -> None:
    measured = Measured()
    run(record, measured, system("a"), system("b"), repeats=2)
    one_turn = [("a", 1), ("a", 8), ("b", 1), ("b", 8)]
    assert measured.asked == [(*turn, repeat) for repeat in (0, 1) for turn in one_turn]


@pytest.mark.parametrize(
    ("broken", "reason"),
    [(unbuildable, "no such package"), (ends_at_once, "ended with code 3 .* out of memory")],
)
def test_a_broken_system_is_written_down_with_its_reason(
    record: Record, broken: type, reason: str
) -> None:
    measured = Measured()
    done = run(record, measured, broken("bad"), system("good"), repeats=2)
    assert {name for name, _, _ in measured.asked} == {"good"}
    for level in (1, 8):
        for repeat in (0, 1):
            sample = done.find("bad", level, repeat)
            assert sample is not None and sample.error is not None
            with pytest.raises(PeerError, match=reason):
                raise PeerError(sample.error)


def test_what_was_measured_before_a_failure_is_kept(record: Record) -> None:
    class FailsAtEight(Measured):
        def __call__(
            self, server: Running, load: Load, system: str, concurrency: int, repeat: int, _: Path
        ) -> Sample:
            if concurrency == 8:
                raise PeerError("the load did not end")
            return super().__call__(server, load, system, concurrency, repeat, _)

    done = run(record, FailsAtEight(), system("a"))
    assert [(s.concurrency, s.error) for s in done.samples] == [
        (1, None),
        (8, "the load did not end"),
    ]


def test_levels_above_a_hopeless_one_are_not_run(record: Record) -> None:
    measured = Measured(completed=1)
    done = run(record, measured, system("a"))
    assert measured.asked == [("a", 1, 0)]
    found = done.find("a", 8, 0)
    assert found is not None and found.skipped_after == 1 and found.timed_out


def test_a_second_call_measures_what_is_missing_and_what_failed(record: Record) -> None:
    run(record, Measured(), system("a"), unbuildable("b"))
    measured = Measured()
    done = run(read_record(record.path), measured, system("a"), system("b"), repeats=2)
    assert measured.asked == [("b", 1, 0), ("b", 8, 0)] + [
        (name, level, 1) for name in ("a", "b") for level in (1, 8)
    ]
    assert read_record(record.path).samples == done.samples
    assert len(done.samples) == 8 and all(sample.error is None for sample in done.samples)


def test_a_record_of_another_machine_is_refused(record: Record) -> None:
    replace(record, machine={**record.machine, "cpu": "another"}).write()
    with pytest.raises(PeerError, match="another machine"):
        read_record(record.path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"samples": [{"nothing": 1}]}'])
def test_a_file_that_is_no_record_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "systems.json"
    path.write_text(text)
    with pytest.raises(PeerError, match="not a record"):
        read_record(path)


def test_ending_a_server_ends_its_children(tmp_path: Path) -> None:
    port = free_port()
    log = tmp_path / "server.log"
    with running(server(port), port, log) as ready:
        assert ready.url == f"http://127.0.0.1:{port}"
        child = int(log.read_text().split()[1])
        pids = {member.pid for member in ready.processes.members()}
        assert child in pids and len(pids) == 2
        assert ready.processes.pss_bytes() > 0
    assert not ready.processes.members()
    # A process that nobody waits for stays as a zombie, which has no program.
    assert not Path(f"/proc/{child}/exe").exists()


def test_the_file_is_json_that_names_schema_and_machine(record: Record) -> None:
    done = run(record, Measured(), system("a"))
    document = json.loads(record.path.read_text())
    assert document["schema"] == 1
    assert document["machine"]["cpu"] == done.machine["cpu"]
    assert [sample["concurrency"] for sample in document["samples"]] == [1, 8]


def test_a_timeout_ends_a_systems_levels_where_requests_are_cut_off_at_a_minute(
    record: Record,
) -> None:
    class Late(Measured):
        def __call__(self, *arguments: Any) -> Sample:
            return replace(super().__call__(*arguments), late=1)

    measured = Late()
    found = run(record, measured, system("a"))
    assert measured.asked == [("a", 1, 0)]
    assert found.samples[1].skipped_after == 1


def test_nothing_is_begun_when_the_budget_is_spent(record: Record) -> None:
    measured = Measured()
    plan = replace(plan_of(record, system("a"), repeats=2), budget_s=-1.0)
    Run(plan, record, lambda _: None, measured).run()
    assert measured.asked == []


def test_a_slow_system_is_measured_once(record: Record) -> None:
    measured = Measured()
    plan = replace(plan_of(record, system("a"), repeats=3), once_after_s=0.0)
    Run(plan, record, lambda _: None, measured).run()
    assert measured.asked == [("a", 1, 0), ("a", 8, 0)]
