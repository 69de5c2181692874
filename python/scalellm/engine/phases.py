"""Where the loop's time goes: phases that follow each other without a gap.

    | schedule | prepare | forward ... | sample | hand over | update | between steps |
    '------------------------- one step ----------------------------------------'

A request's wait between two moments is the difference of the totals at these moments, whoever the
work in between was done for. So the parts of a request's time add up to it, and keeping them costs
a request nothing at each step.
"""

import time
from collections.abc import Mapping

PhaseTotals = Mapping[str, int]  # phase -> microseconds since the clock was made


class PhaseClock:
    """Gives every microsecond to one phase."""

    def __init__(self) -> None:
        self._totals: dict[str, int] = {}
        self._marked_ns = time.perf_counter_ns()

    def mark(self, phase: str) -> None:
        """What has passed since the last mark was `phase`."""
        self._add(phase, self._since_mark_us())

    def mark_parts(self, parts_ms: Mapping[str, float], rest: str) -> None:
        """What has passed since the last mark was `parts_ms`, and for the remainder `rest`."""
        left_us = self._since_mark_us()
        for phase, ms in parts_ms.items():
            us = min(round(ms * 1e3), left_us)
            self._add(phase, us)
            left_us -= us
        self._add(rest, left_us)

    def totals(self) -> PhaseTotals:
        """A copy, up to the last mark."""
        return dict(self._totals)

    def _since_mark_us(self) -> int:
        passed_us = (time.perf_counter_ns() - self._marked_ns) // 1000
        self._marked_ns += passed_us * 1000
        return passed_us

    def _add(self, phase: str, us: int) -> None:
        self._totals[phase] = self._totals.get(phase, 0) + us


def phases_between(earlier: PhaseTotals | None, later: PhaseTotals) -> list[tuple[str, int]]:
    """Phases that took time between two moments; none where the earlier one is not known."""
    if earlier is None:
        return []
    taken = ((phase, us - earlier.get(phase, 0)) for phase, us in later.items())
    return [(phase, us) for phase, us in taken if us > 0]
