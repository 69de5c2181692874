"""When an open loop sends: times from the level's start, drawn before anything is sent.

poisson      exponential gaps: many users who know nothing of each other
constant     equal gaps
gamma:CV     gaps of that coefficient of variation (deviation / mean); 1 is poisson, more is bursts
onoff:ON/OFF Poisson within ON seconds, then nothing for OFF seconds, over and over

All keep the asked rate on average.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from scalellm.errors import ConfigError

# Most sends one level may schedule (crates/load-generator has the same limit of requests).
MAX_SENDS = 5_000_000
_BLOCK = 4096
_ALLOWED = "poisson, constant, gamma:CV (0.01 to 100), onoff:ON_S/OFF_S (over 0)"


@dataclass(frozen=True, slots=True)
class Arrivals:
    """A renewal process of gaps with mean 1 / rate, run only while the source is on."""

    kind: Literal["poisson", "constant", "gamma", "onoff"] = "poisson"
    cv: float = 1.0
    on_s: float = 1.0
    off_s: float = 0.0

    def times_s(
        self,
        rate: float,
        random: np.random.Generator,
        number: int | None = None,
        until_s: float | None = None,
    ) -> NDArray[np.float64]:
        """Ascending send times: `number` of them, those below `until_s`, or what ends sooner.

        Raises ConfigError if that is none at all or more than MAX_SENDS.
        """
        most = MAX_SENDS + 1 if number is None else number
        blocks: list[NDArray[np.float64]] = []
        drawn, last_s = 0, 0.0
        while drawn < most and (until_s is None or last_s < until_s):
            gaps = self._gaps(rate, random, min(_BLOCK, most - drawn))
            begin = last_s - gaps[0] if self.kind == "constant" and not blocks else last_s
            block = begin + np.cumsum(gaps)
            blocks.append(block)
            drawn, last_s = drawn + len(block), float(block[-1])
        active = np.concatenate(blocks)
        found = self._wall_s(active)
        if until_s is not None:
            found = found[found < until_s]
        if not 0 < len(found) <= MAX_SENDS:
            raise ConfigError(
                f"rate: {rate:g}/s gives {len(found)} sends; allowed: 1 to {MAX_SENDS}"
            )
        return found

    def _gaps(self, rate: float, random: np.random.Generator, number: int) -> NDArray[np.float64]:
        if self.kind == "constant":
            return np.full(number, 1.0 / rate)
        if self.kind == "gamma":
            shape = 1.0 / self.cv**2
            return random.gamma(shape, 1.0 / (rate * shape), number)
        active_rate = rate * (self.on_s + self.off_s) / self.on_s if self.kind == "onoff" else rate
        return random.exponential(1.0 / active_rate, number)

    def _wall_s(self, active_s: NDArray[np.float64]) -> NDArray[np.float64]:
        """Times counted while the source is on, as times on the wall."""
        if self.kind != "onoff":
            return active_s
        periods, within_s = np.divmod(active_s, self.on_s)
        return periods * (self.on_s + self.off_s) + within_s


def parse_arrivals(text: str) -> Arrivals:
    """Read a `--arrivals` value. Raises ConfigError with what is allowed."""
    kind, _, numbers = text.partition(":")
    try:
        if kind == "poisson" and not numbers:
            return Arrivals()
        if kind == "constant" and not numbers:
            return Arrivals("constant")
        if kind == "gamma" and 0.01 <= float(numbers) <= 100:
            return Arrivals("gamma", cv=float(numbers))
        if kind == "onoff":
            on_s, off_s = (float(part) for part in numbers.split("/"))
            if 0 < on_s <= 1e5 and 0 < off_s <= 1e5:
                return Arrivals("onoff", on_s=on_s, off_s=off_s)
    except ValueError:
        pass
    raise ConfigError(f"arrivals: got {text!r}, allowed: {_ALLOWED}")
