"""Blueprints: how many replicas of which tensor-parallel width."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from scalellm.errors import ConfigError

MAX_DEVICES = 1024
_ALLOWED = "tp=WIDTH,count=NUMBER, e.g. tp=2,count=1"


@dataclass(frozen=True, slots=True, order=True)
class Group:
    """`count` replicas that have `tp` devices each."""

    tp: int
    count: int

    @property
    def devices(self) -> int:
        return self.tp * self.count

    def __str__(self) -> str:
        return f"{self.count} x TP {self.tp}"


@dataclass(frozen=True, slots=True)
class Blueprint:
    """The shape of a deployment; at most one group of each width, widest first."""

    groups: tuple[Group, ...]

    @classmethod
    def of(cls, groups: Iterable[Group]) -> "Blueprint":
        """Add up groups of the same width."""
        counts: dict[int, int] = {}
        for group in groups:
            counts[group.tp] = counts.get(group.tp, 0) + group.count
        return cls(tuple(Group(tp, counts[tp]) for tp in sorted(counts, reverse=True)))

    @property
    def devices(self) -> int:
        return sum(group.devices for group in self.groups)

    @property
    def replicas(self) -> tuple[int, ...]:
        """The width of each replica."""
        return tuple(group.tp for group in self.groups for _ in range(group.count))

    def __str__(self) -> str:
        return " + ".join(str(group) for group in self.groups)

    def to_json(self) -> list[dict[str, int]]:
        return [{"tp": group.tp, "count": group.count} for group in self.groups]

    @classmethod
    def of_json(cls, groups: Iterable[dict[str, int]]) -> "Blueprint":
        return cls.of(Group(int(group["tp"]), int(group["count"])) for group in groups)


def uniform(widths: Sequence[int], devices: int) -> tuple[Blueprint, ...]:
    """Every blueprint of one width that uses all devices it can, narrowest first."""
    return tuple(
        Blueprint((Group(tp, devices // tp),)) for tp in sorted(set(widths)) if 0 < tp <= devices
    )


def parse_group(text: str, origin: str = "--replica") -> Group:
    """Read `tp=2,count=1`; a count of 1 may be left out. Raises ConfigError."""
    fields = {
        name.strip(): value.strip()
        for name, _, value in (part.partition("=") for part in text.split(","))
    }
    try:
        tp, count = int(fields.pop("tp")), int(fields.pop("count", "1"))
    except (KeyError, ValueError):
        tp = count = 0
    if fields or not (1 <= tp <= MAX_DEVICES and 1 <= count <= MAX_DEVICES):
        raise ConfigError(f"{origin}: got {text!r}, allowed: {_ALLOWED}")
    return Group(tp, count)


def parse_groups(texts: Sequence[str], origin: str = "--replica") -> Blueprint:
    """Read several of them, also when their own commas have cut them apart (as in a variable)."""
    parts: list[str] = []
    for part in ",".join(texts).split(","):
        if parts and not part.strip().startswith("tp="):
            parts[-1] += "," + part
        else:
            parts.append(part)
    return Blueprint.of(parse_group(part, origin) for part in parts)


def check_fits(blueprint: Blueprint, devices: int, widths: Sequence[int], origin: str) -> None:
    """Raises ConfigError for a width that cannot be had, or more devices than there are."""
    for group in blueprint.groups:
        if group.tp not in widths:
            allowed = ", ".join(str(width) for width in sorted(widths))
            raise ConfigError(f"{origin}: got tp={group.tp}, allowed here: {allowed}")
    if blueprint.devices > devices:
        fitting = ", ".join(str(found) for found in uniform(widths, devices)) or "nothing"
        raise ConfigError(
            f"{origin}: {blueprint} needs {blueprint.devices} devices, there are {devices}; "
            f"what would fit: {fitting}"
        )
