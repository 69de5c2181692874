"""Devices divided among the models of one deployment."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from scalellm.config import ServeConfig
from scalellm.controller.blueprint.shape import parse_groups
from scalellm.controller.shapes import served_name
from scalellm.errors import ConfigError

_SHAPES_OF_AUTO = 2  # one wide replica or two narrow ones: less than that is nothing to choose


def share(
    configs: Sequence[ServeConfig], cores: int, devices: int | None
) -> list[tuple[ServeConfig, int]]:
    """Each model with its devices, and the cores that these are.

    `devices`: those that several models divide; None: one for each core. One model has all cores.
    Raises ConfigError as `divide` does."""
    if len(configs) == 1:
        return [(configs[0], cores)]
    devices = devices or cores
    shares = divide([Wish.of(config) for config in configs], devices)
    each = max(1, cores // devices)
    return [
        (replace(config, blueprint=replace(config.blueprint, devices=own)), own * each)
        for config, own in zip(configs, shares, strict=True)
    ]


@dataclass(frozen=True, slots=True)
class Wish:
    """What one model's plan asks for, in devices."""

    name: str
    least: int
    given: int | None  # assigned to it, neither more nor less

    @classmethod
    def of(cls, config: ServeConfig) -> "Wish":
        deployment, shape = config.deployment, config.blueprint
        if shape.replica:
            least = parse_groups(shape.replica).devices
        elif deployment.blueprint == "auto":
            least = _SHAPES_OF_AUTO
        else:
            least = deployment.replicas * config.engine.tensor_parallel_size
        return cls(served_name(config.engine), least, shape.devices)

    @property
    def needed(self) -> int:
        return self.given or self.least


def divide(wishes: Sequence[Wish], devices: int) -> tuple[int, ...]:
    """Devices of each model: what is assigned to it, or else what its plan needs and an equal part
    of what is left.

    Raises ConfigError for plans that do not fit, with what would."""
    for wish in wishes:
        if wish.given is not None and wish.given < wish.least:
            raise ConfigError(
                f"devices: got {wish.given} for {wish.name!r}, allowed: at least {wish.least}, "
                f"which its replicas need"
            )
    needed = sum(wish.needed for wish in wishes)
    if needed > devices:
        each = ", ".join(f"{wish.name!r} {wish.needed}" for wish in wishes)
        raise ConfigError(
            f"models: {each}: together {needed} devices, and there are {devices}; what would fit: "
            f"{_fitting(wishes, devices)}, or --devices {needed}, which lets CPU replicas share "
            f"cores"
        )
    left = devices - needed
    takers = [at for at, wish in enumerate(wishes) if wish.given is None]
    shares = [wish.needed for wish in wishes]
    for turn, at in enumerate(takers):
        shares[at] += left // len(takers) + (turn < left % len(takers))
    return tuple(shares)


def _fitting(wishes: Sequence[Wish], devices: int) -> str:
    """The same models with less each, or fewer models."""
    if len(wishes) > devices:
        return f"at most {devices} of them with a device each"
    each, more = divmod(devices, len(wishes))
    parts = (f"{wish.name!r} {each + (at < more)}" for at, wish in enumerate(wishes))
    return f"devices of {', '.join(parts)}"
