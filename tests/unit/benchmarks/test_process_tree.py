"""Who belongs to a server, and what it all costs; on a /proc made here."""

import os
from pathlib import Path

from peers.process_tree import Member, ProcessTree

TICKS_S = os.sysconf("SC_CLK_TCK")


def add_process(
    proc: Path,
    pid: int,
    parent: int,
    session: int,
    *,
    state: str = "S",
    ticks: int = 0,
    waited: int = 0,
    started: int = 0,
    pss_kib: int | None = 0,
    write_calls: int = 0,
    name: str = "worker",
) -> None:
    folder = proc / str(pid)
    folder.mkdir()
    fields = [state, parent, 0, session, *[0] * 7, ticks, ticks, waited, 0, *[0] * 4, started]
    (folder / "stat").write_text(f"{pid} ({name}) {' '.join(map(str, fields))} 0 0\n")
    (folder / "io").write_text(f"wchar: 999\nsyscr: 888\nsyscw: {write_calls}\n")
    if pss_kib is not None:
        (folder / "smaps_rollup").write_text(f"0-1 ---p\nRss: 999 kB\nPss: {pss_kib} kB\n")


def test_children_of_children_and_the_root_s_session_belong_to_the_tree(tmp_path: Path) -> None:
    add_process(tmp_path, 1, parent=0, session=1)
    add_process(tmp_path, 10, parent=1, session=10)
    add_process(tmp_path, 11, parent=10, session=10)
    add_process(tmp_path, 12, parent=11, session=12)  # leads a session of its own
    add_process(tmp_path, 13, parent=1, session=10)  # its parent has ended
    add_process(tmp_path, 20, parent=1, session=20)
    (tmp_path / "meminfo").write_text("")
    found = ProcessTree(10, tmp_path).members()
    assert {member.pid for member in found} == {10, 11, 12, 13}


def test_a_name_may_hold_spaces_and_parentheses(tmp_path: Path) -> None:
    add_process(tmp_path, 10, parent=1, session=10, name="VLLM) S 1 (x")
    assert [member.pid for member in ProcessTree(10, tmp_path).members()] == [10]


def test_time_memory_and_writes_are_sums_over_the_tree(tmp_path: Path) -> None:
    one = {"ticks": TICKS_S, "waited": TICKS_S, "pss_kib": 100, "write_calls": 7}
    two = {"ticks": 2 * TICKS_S, "pss_kib": 23, "write_calls": 5}
    other = {"ticks": 50 * TICKS_S, "pss_kib": 9999, "write_calls": 99}
    add_process(tmp_path, 10, parent=1, session=10, **one)
    add_process(tmp_path, 11, parent=10, session=10, **two)
    add_process(tmp_path, 20, parent=1, session=20, **other)
    tree = ProcessTree(10, tmp_path)
    assert tree.cpu_s() == 2 * 1 + 1 + 2 * 2  # user and system alike
    assert tree.pss_bytes() == 123 * 1024
    assert tree.write_calls() == 12


def test_the_dead_cost_nothing(tmp_path: Path) -> None:
    add_process(tmp_path, 10, parent=1, session=10, state="Z", ticks=TICKS_S)
    add_process(tmp_path, 11, parent=1, session=10, pss_kib=None)
    tree = ProcessTree(10, tmp_path)
    assert [member.pid for member in tree.members()] == [11]
    assert tree.pss_bytes() == 0


def test_an_id_that_another_process_has_now_is_not_the_same(tmp_path: Path) -> None:
    add_process(tmp_path, 10, parent=1, session=10, started=700)
    tree = ProcessTree(10, tmp_path)
    assert tree.is_same(Member(10, 700))
    assert not tree.is_same(Member(10, 699))
    assert not tree.is_same(Member(11, 700))
