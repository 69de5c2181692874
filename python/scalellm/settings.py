"""How a setting declares itself, and how text and values are checked against the declaration.

Mechanism only: the settings themselves are in `config`.
"""

import difflib
import math
import typing
from collections.abc import Iterable
from dataclasses import MISSING, dataclass, field, fields
from types import NoneType
from typing import Any

from scalellm.errors import ConfigError

ENVIRONMENT_PREFIX = "SCALELLM_"
SERVERS = ("serve", "engine")  # commands that take a setting unless it says otherwise
_BYTE_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}
_TRUE, _FALSE = ("1", "true", "yes", "on"), ("0", "false", "no", "off")


@dataclass(frozen=True, slots=True)
class Declaration:
    """What a field says about itself besides name, type and default."""

    help: str
    commands: tuple[str, ...]
    choices: tuple[str, ...] = ()
    minimum: float | None = None
    maximum: float | None = None
    above: float | None = None  # exclusive minimum
    flag: str = ""  # where it differs from the name
    secret: bool = False


def setting(default: Any, help: str, commands: tuple[str, ...] = SERVERS, **more: Any) -> Any:
    """A dataclass field that is a setting; `more` are fields of Declaration."""
    return field(default=default, metadata={"setting": Declaration(help, commands, **more)})


@dataclass(frozen=True, slots=True)
class Setting:
    """A declared setting, as the sources and the docs see it."""

    name: str
    kind: type  # bool, int, float, str or tuple (of str)
    optional: bool
    default: Any
    group: type
    declaration: Declaration

    @property
    def flag(self) -> str:
        return self.declaration.flag or "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        return ENVIRONMENT_PREFIX + self.name.upper()

    @property
    def is_bytes(self) -> bool:
        return self.name.endswith("_bytes")

    @property
    def allowed(self) -> str:
        """What is allowed, in words; for messages and docs."""
        said = self.declaration
        if said.choices:
            return ", ".join(said.choices)
        words = {bool: "true or false", str: "text", tuple: "texts"}
        if self.kind in words:
            return words[self.kind]
        noun = "a whole number" if self.kind is int else "a number"
        if said.above is not None:
            noun += f" above {said.above:g}"
        if said.minimum is not None and said.minimum == said.maximum:
            return f"{said.minimum:g}"
        low = "" if said.minimum is None else f"{_plain(said.minimum)}"
        high = "" if said.maximum is None else f"{_plain(said.maximum)}"
        if low and high:
            return f"{noun} from {low} to {high}"
        return noun + (f", at least {low}" if low else "") + (f", at most {high}" if high else "")

    @property
    def metavar(self) -> str:
        """What stands for the value in a usage line."""
        if self.declaration.choices:
            return "{" + ",".join(self.declaration.choices) + "}"
        if self.is_bytes:
            return "BYTES"
        return "TEXT" if self.kind in (str, tuple) else "N"

    @property
    def help_text(self) -> str:
        """One line of help with the default."""
        if self.default in (None, ()):
            return self.declaration.help
        shown = str(self.default).lower() if self.kind is bool else self.default
        return f"{self.declaration.help} (default: {shown})"

    def parse(self, text: str, origin: str) -> Any:
        """The value that a flag's or a variable's text stands for."""
        try:
            if self.kind is bool:
                lowered = text.strip().lower()
                if lowered not in _TRUE + _FALSE:
                    raise ValueError
                value: Any = lowered in _TRUE
            elif self.is_bytes:
                value = parse_bytes(text)
            elif self.kind is tuple:
                value = tuple(part.strip() for part in text.split(",") if part.strip())
            else:
                value = self.kind(text)
        except ValueError:
            raise ConfigError(self._refusal(text, origin)) from None
        return self.check(value, origin)

    def check(self, value: Any, origin: str = "") -> Any:
        """Return `value` in the setting's type, or raise ConfigError: field, got, allowed."""
        if value is None and self.optional:
            return None
        if self.kind is float and type(value) is int:
            value = float(value)
        if self.is_bytes and isinstance(value, str):
            return self.parse(value, origin)
        said = self.declaration
        if self.kind is tuple:
            value = (
                (value,)
                if isinstance(value, str)
                else tuple(value)
                if isinstance(value, list)
                else value
            )
            if not isinstance(value, tuple) or not all(isinstance(part, str) for part in value):
                raise ConfigError(self._refusal(value, origin))
            if said.secret and not all(map(_is_sendable, value)):
                source = f" ({origin})" if origin else ""
                got = "an empty text" if "" in value else "a secret with other characters"
                raise ConfigError(f"{self.name}: got {got}{source}; allowed: visible ASCII")
            return value
        wrong = type(value) is not self.kind or (bool(said.choices) and value not in said.choices)
        if not wrong and self.kind in (int, float):
            wrong = (
                value != value
                or (said.minimum is not None and value < said.minimum)
                or (said.maximum is not None and value > said.maximum)
                or (said.above is not None and value <= said.above)
            )
        if wrong:
            raise ConfigError(self._refusal(value, origin))
        return value

    def _refusal(self, value: Any, origin: str) -> str:
        shown = "a secret" if self.declaration.secret else repr(value)
        source = f" ({origin})" if origin else ""
        return f"{self.name}: got {shown}{source}; allowed: {self.allowed}"


def _is_sendable(key: str) -> bool:
    """Whether a key can stand in an HTTP header as it is."""
    return bool(key) and all("!" <= character <= "~" for character in key)


def _plain(number: float) -> str:
    return str(int(number)) if number == int(number) else str(number)


def parse_bytes(text: str) -> int:
    """`4GiB`, `512MB`, `1048576` in bytes. Raises ValueError."""
    lowered = text.strip().lower().removesuffix("b")
    digits = lowered.rstrip("kmgi")
    unit = lowered[len(digits) :]
    if unit not in _BYTE_UNITS or not math.isfinite(number := float(digits)):
        raise ValueError(f"{text!r} is no size")
    return int(number * _BYTE_UNITS[unit])


def declared(group: type) -> dict[str, Setting]:
    """The settings among a dataclass's fields, by name."""
    hints = typing.get_type_hints(group)
    found = {}
    for entry in fields(group):
        if "setting" not in entry.metadata:
            continue
        hint = hints[entry.name]
        members = typing.get_args(hint)
        optional = NoneType in members
        kind = next(m for m in members if m is not NoneType) if optional else hint
        default = None if entry.default is MISSING else entry.default
        found[entry.name] = Setting(
            entry.name, typing.get_origin(kind) or kind, optional, default, group,
            entry.metadata["setting"],
        )  # fmt: skip
    return found


def suggestion(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'port'?`, or nothing when no name is near."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


_of_group: dict[type, dict[str, Setting]] = {}  # what was declared does not change


def check_fields(config: Any) -> None:
    """Check every setting of a config dataclass; ConfigError for the first that cannot be."""
    group = type(config)
    if group not in _of_group:
        _of_group[group] = declared(group)
    for name, found in _of_group[group].items():
        object.__setattr__(config, name, found.check(getattr(config, name)))
