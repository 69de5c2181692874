"""Service level objectives, and the share of requests that meet them (goodput)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from scalellm.bench.records import Records
from scalellm.bench.results import Row
from scalellm.errors import ConfigError

# What an objective can bound, and the column of the records that holds it.
COLUMNS = {
    "ttft": "ttft_ms",
    "tbt": "tbt_ms",
    "e2e": "e2e_ms",
    "max_gap": "max_gap_ms",
}


@dataclass(frozen=True, slots=True)
class Slo:
    """Upper bounds in milliseconds, by name; a request meets them when it meets them all."""

    limits_ms: Mapping[str, float]
    share: float = 0.9  # of the requests that must meet them for a level to hold

    def judge(self, row: Row) -> dict[str, Any]:
        """The row's `slo` field: which share met the objectives, and goodput.

        Failed and timed out requests met nothing; those cancelled by Ctrl-C are not counted. An
        objective that a request has no value for (one token has no TBT) is met. The later half
        is judged alone too: a queue that grows shows there first.
        """
        records = Records.of(row)
        met = [self.is_met(request) for request in records.by_start()]
        later = met[len(met) // 2 :]
        share = sum(met) / len(met) if met else 0.0
        later_share = sum(later) / len(later) if later else 0.0
        duration_s = row["duration_s"]
        return {
            "limits_ms": dict(self.limits_ms),
            "asked_share": self.share,
            "share": share,
            "later_share": later_share,
            "goodput_request_s": sum(met) / duration_s if duration_s else 0.0,
            "held": bool(met) and min(share, later_share) >= self.share,
        }

    def is_met(self, request: Mapping[str, Any]) -> bool:
        if request["outcome"] != "completed":
            return False
        values = ((request[COLUMNS[name]], limit) for name, limit in self.limits_ms.items())
        return all(value is None or value <= limit for value, limit in values)


def parse_slo(text: str, share: float) -> Slo:
    """Read `ttft=2000,tbt=100`. Raises ConfigError with what is allowed."""
    limits: dict[str, float] = {}
    for part in text.split(","):
        name, _, value = part.partition("=")
        try:
            limits[name.strip()] = float(value)
        except ValueError:
            limits[name.strip()] = -1.0
    if not all(name in COLUMNS and 0 < limit < 1e9 for name, limit in limits.items()):
        names = ", ".join(f"{name}=MS" for name in COLUMNS)
        raise ConfigError(f"--slo: got {text!r}, allowed: {names}, with commas between")
    if not 0 < share <= 1:
        raise ConfigError(f"--slo-share: got {share}, allowed: over 0, at most 1")
    return Slo(limits, share)
