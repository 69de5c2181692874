"""How many tokens prompts and answers have."""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from scalellm.errors import ConfigError


class Lengths(Protocol):
    def draw(self, number: int, random: np.random.Generator) -> list[int]:
        """`number` lengths in tokens, each at least 1."""
        ...

    def describe(self) -> Any:
        """JSON-ready."""
        ...


@dataclass(frozen=True, slots=True)
class Fixed:
    tokens: int

    def draw(self, number: int, random: np.random.Generator) -> list[int]:
        del random  # nothing is left to chance
        return [self.tokens] * number

    def describe(self) -> Any:
        return self.tokens


@dataclass(frozen=True, slots=True)
class LogNormal:
    """exp(mu + sigma * normal) tokens, times `scale`; what is over `at_most` is cut to it."""

    mu: float
    sigma: float
    scale: float = 1.0
    at_most: int | None = None

    def draw(self, number: int, random: np.random.Generator) -> list[int]:
        tokens = np.rint(self.scale * random.lognormal(self.mu, self.sigma, number))
        return [int(value) for value in np.clip(tokens, 1, self.at_most)]

    def describe(self) -> Any:
        return {
            "lognormal": [self.mu, self.sigma],
            "scale": self.scale,
            "at_most": self.at_most,
        }


@dataclass(frozen=True, slots=True)
class Preset:
    """The (mu, sigma) of a public trace's prompt and answer lengths, and its prefix reuse."""

    input: tuple[float, float]
    output: tuple[float, float]
    prefix_reuse: float = 0.0


# Azure: the LLM inference traces of 2023 (Splitwise, ISCA 2024). Mooncake: FAST 2025, where 37% to
# 64% of the prompts' tokens could come from a prefix cache, by trace; the middle of it.
PRESETS = {
    "azure-conversation": Preset((6.63, 0.99), (5.02, 0.86)),
    "azure-code": Preset((7.00, 1.36), (2.79, 0.85)),
    "mooncake": Preset((8.74, 1.20), (5.34, 1.36), prefix_reuse=0.5),
}


def parse_lognormal(flag: str, text: str, scale: float, at_most: int | None) -> LogNormal:
    """Read `MU/SIGMA`. Raises ConfigError, naming the flag."""
    try:
        mu, sigma = (float(part) for part in text.split("/"))
    except ValueError:
        mu = sigma = -1.0
    if not (0 <= mu <= 20 and 0 <= sigma <= 5):
        raise ConfigError(f"--{flag}: got {text!r}, allowed: MU/SIGMA, at most 20/5, as 6.63/0.99")
    return LogNormal(mu, sigma, scale, at_most)
