"""A run: every system at every level, several times, interleaved; each figure kept at once.

    for each repeat:  for each system:  start, every level that is still missing, stop

Systems take turns within a repeat, so that a machine that changes changes for all. What failed is
written down with its reason, stops nothing else, and is tried again by the next call.
"""

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

from peers.measure import LATE_AFTER_S, Load, Sample, measure
from peers.record import Record
from peers.system import PeerError, Running, System, free_port, running

# Where more than this share of a level's requests did not complete even in the time they are given
# here, larger levels are not run: they would take as long and say the same.
_HOPELESS_SHARE = 0.5


Measure = Callable[[Running, Load, str, int, int, Path], Sample]


@dataclass(frozen=True, slots=True)
class Plan:
    """What to measure, and where environments, models and logs are."""

    systems: tuple[System, ...]
    levels: tuple[int, ...]
    repeats: int
    load: Load
    cache: Path
    logs: Path
    # Seconds after which nothing more is begun.
    budget_s: float = math.inf
    # A system whose levels took longer than this is measured once.
    once_after_s: float = math.inf


class Run:
    """Measures what `record` lacks of `plan`; `record` has it then. `say` gets the progress."""

    def __init__(
        self,
        plan: Plan,
        record: Record,
        say: Callable[[str], None],
        measure: Measure = measure,
    ) -> None:
        self.record = record.without_errors()
        self._plan = plan
        self._say = say
        self._measure = measure
        self._built: set[str] = set()
        self._broken: dict[str, str] = {}
        self._slow: set[str] = set()
        self._until = time.monotonic() + plan.budget_s

    def run(self) -> None:
        """Never raises for a system that fails."""
        for repeat in range(self._plan.repeats):
            for system in self._plan.systems:
                if self._is_over():
                    self._say("the budget is spent; another call goes on from here")
                    return
                if self._missing(system, repeat) and system.name not in self._slow:
                    self._say(f"repeat {repeat + 1} of {self._plan.repeats}: {system.name}")
                    self._run_system(system, repeat)

    def _run_system(self, system: System, repeat: int) -> None:
        """Every missing level of this repeat gets a sample, with figures or with the reason."""
        if system.name not in self._broken:
            try:
                if system.name not in self._built:
                    build(system, self._plan)
                    self._built.add(system.name)
                begun = time.monotonic()
                with start(system, self._plan) as server:
                    self._run_levels(server, system, repeat)
                if time.monotonic() - begun > self._plan.once_after_s:
                    self._slow.add(system.name)
            except (PeerError, OSError) as error:
                self._broken[system.name] = str(error)
        if system.name in self._broken:
            for level in self._missing(system, repeat):
                self._add(Sample(system.name, level, repeat, error=self._broken[system.name]))

    def _run_levels(self, server: Running, system: System, repeat: int) -> None:
        load = replace(self._plan.load, ignore_eos=system.ignore_eos)
        hopeless: int | None = None
        for level in self._missing(system, repeat):
            if self._is_over():
                return
            if hopeless is None:
                folder = self._plan.logs
                sample = self._measure(server, load, system.name, level, repeat, folder)
                load = replace(load, warmup=0)  # the start was what had to be warmed up
            else:
                sample = Sample(system.name, level, repeat, skipped_after=hopeless)
            self._add(sample)
            if self._is_hopeless(sample):
                hopeless = level

    def _is_hopeless(self, sample: Sample) -> bool:
        """Where requests are cut off at a minute, a `timeout` says what larger levels would."""
        cut_off = self._plan.load.timeout_s <= LATE_AFTER_S
        few_finished = sample.unfinished > _HOPELESS_SHARE * sample.requests
        return few_finished or (cut_off and sample.timed_out)

    def _is_over(self) -> bool:
        return time.monotonic() > self._until

    def _add(self, sample: Sample) -> None:
        self.record = self.record.add(sample)
        self._say(describe(sample))

    def _missing(self, system: System, repeat: int) -> list[int]:
        return [
            level
            for level in sorted(self._plan.levels)
            if self.record.find(system.name, level, repeat) is None
        ]


def build(system: System, plan: Plan) -> None:
    """Make the system's environment and model. Raises PeerError with the reason if it cannot be."""
    plan.cache.mkdir(parents=True, exist_ok=True)
    (plan.cache / "models").mkdir(exist_ok=True)
    plan.logs.mkdir(parents=True, exist_ok=True)
    log = plan.logs / f"{system.name}.build.log"
    log.write_bytes(b"")
    system.build(plan.cache, log)


def start(system: System, plan: Plan) -> AbstractContextManager[Running]:
    """The context in which the built `system` runs; see peers.system.running."""
    port = free_port()
    return running(system.launch(plan.cache, port), port, plan.logs / f"{system.name}.log")


def describe(sample: Sample) -> str:
    """One line for the terminal."""
    where = f"  {sample.system} at {sample.concurrency}: "
    if sample.error is not None:
        return f"{where}not measured: {sample.error}"
    if sample.skipped_after is not None:
        return f"{where}not run, {sample.skipped_after} took too long already"
    latencies = f"TTFT {_ms(sample.ttft_ms)}, TBT {_ms(sample.tbt_ms)} ms"
    late = f", {sample.late} of {sample.requests} late" if sample.late else ""
    return f"{where}{latencies}, {sample.output_tok_s:.1f} tok/s{late}"


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
