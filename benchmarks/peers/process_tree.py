"""What a server and all its processes cost: processor time and memory, from /proc.

A process belongs to the tree if it descends from the root or is of the session that the root leads,
so that a process whose parent has ended still counts.
"""

import os
from dataclasses import dataclass
from pathlib import Path

_PROC = Path("/proc")
# Fields of /proc/PID/stat after the parenthesised name, counted from `state` as 0 (proc(5)).
_PARENT, _SESSION, _UTIME, _STIME, _CUTIME, _CSTIME, _STARTED = 1, 3, 11, 12, 13, 14, 19
_KIB = 1024


@dataclass(frozen=True, slots=True)
class Member:
    """One process; an id alone can be another process's later, id and start time cannot."""

    pid: int
    started_ticks: int


@dataclass(frozen=True, slots=True)
class _Stat:
    pid: int
    parent: int
    session: int
    own_ticks: int
    waited_for_ticks: int
    started_ticks: int


class ProcessTree:
    """The processes of `root`, which leads a session of its own; `proc` is where /proc is."""

    def __init__(self, root: int, proc: Path = _PROC) -> None:
        self._root = root
        self._proc = proc

    def members(self) -> list[Member]:
        return [Member(stat.pid, stat.started_ticks) for stat in self._stats()]

    def is_same(self, member: Member) -> bool:
        """Whether that process is still there."""
        stat = self._stat(member.pid)
        return stat is not None and stat.started_ticks == member.started_ticks

    def cpu_s(self) -> float:
        """Processor seconds so far, user and system, of the living and of children waited for."""
        ticks = sum(stat.own_ticks + stat.waited_for_ticks for stat in self._stats())
        return ticks / os.sysconf("SC_CLK_TCK")

    def pss_bytes(self) -> int:
        """Proportional set size: pages shared by n processes count 1/n in each."""
        return sum(_KIB * self._number(stat.pid, "smaps_rollup", "Pss:") for stat in self._stats())

    def write_calls(self) -> int:
        """Calls of write and writev so far, to sockets and files, of the living; without send."""
        return sum(self._number(stat.pid, "io", "syscw:") for stat in self._stats())

    def _stats(self) -> list[_Stat]:
        """Of every member, parents before children."""
        numbers = (int(entry.name) for entry in self._proc.iterdir() if entry.name.isdigit())
        found = [stat for number in numbers if (stat := self._stat(number)) is not None]
        children: dict[int, list[_Stat]] = {}
        for stat in found:
            children.setdefault(stat.parent, []).append(stat)
        roots = [stat for stat in found if self._root in (stat.pid, stat.session)]
        members = {stat.pid: stat for stat in roots}
        while roots:
            for child in children.get(roots.pop().pid, []):
                if child.pid not in members:
                    members[child.pid] = child
                    roots.append(child)
        return list(members.values())

    def _stat(self, pid: int) -> _Stat | None:
        """None for a process that has ended; the name in parentheses may hold anything."""
        try:
            text = (self._proc / str(pid) / "stat").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return None
        fields = text.rpartition(")")[2].split()
        if fields[0] == "Z":
            return None
        return _Stat(
            pid,
            int(fields[_PARENT]),
            int(fields[_SESSION]),
            int(fields[_UTIME]) + int(fields[_STIME]),
            int(fields[_CUTIME]) + int(fields[_CSTIME]),
            int(fields[_STARTED]),
        )

    def _number(self, pid: int, file: str, name: str) -> int:
        """What a line of one of a process's files says; 0 where there is none."""
        try:
            text = (self._proc / str(pid) / file).read_text(encoding="utf-8")
        except OSError:
            return 0
        line = next((line for line in text.splitlines() if line.startswith(name)), f"{name} 0")
        return int(line.split()[1])
