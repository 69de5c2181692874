"""Finds the highest rate that holds the objectives: doubling until one misses, then bisecting."""

import math
from dataclasses import dataclass, field


@dataclass(slots=True)
class RateSearch:
    """Asks for rates and is told whether they held; the answer is between `held` and `missed`.

    start ──held──> x2 ──held──> x4 ──missed──> geometric middle of held and missed, ...
      └──missed──> /2 ──missed──> /4 ──held──┘   until they are within `precision`
    """

    start: float
    precision: float = 0.05
    most_probes: int = 16
    lowest: float = 0.0  # no rate below is tried
    held: float | None = None
    missed: float | None = None
    probes: list[tuple[float, bool]] = field(default_factory=list)

    def next_rate(self) -> float | None:
        """The rate to try now; None when the search is over."""
        if len(self.probes) >= self.most_probes or self.is_found:
            return None
        if not self.probes:
            return self.start
        if self.missed is None:
            return 2 * max(rate for rate, _ in self.probes)
        if self.held is None:
            half = min(rate for rate, _ in self.probes) / 2
            return half if half >= self.lowest else None
        return _three_digits(math.sqrt(self.held * self.missed))

    def tell(self, rate: float, held: bool) -> None:
        """What came of a rate. A rate that missed bounds the answer, whatever held above it."""
        self.probes.append((rate, held))
        missed = [probe for probe, ok in self.probes if not ok]
        self.missed = min(missed, default=None)
        below = [probe for probe, ok in self.probes if ok and (not missed or probe < min(missed))]
        self.held = max(below, default=None)

    @property
    def is_found(self) -> bool:
        if self.held is None or self.missed is None:
            return False
        middle = _three_digits(math.sqrt(self.held * self.missed))
        return self.missed / self.held <= 1 + self.precision or middle in (self.held, self.missed)


def _three_digits(rate: float) -> float:
    return float(f"{rate:.3g}")
