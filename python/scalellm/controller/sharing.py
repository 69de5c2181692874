"""Devices divided among the models of one deployment."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from scalellm.config import ServeConfig
from scalellm.controller.blueprint.shape import parse_groups
from scalellm.controller.shapes import changes_on_gpus, served_name
from scalellm.errors import ConfigError

_SHAPES_OF_AUTO = 2  # one wide replica or two narrow ones: less than that is nothing to choose


def share(
    configs: Sequence[ServeConfig], cores: int, devices: int | None, gpus: int = 0
) -> list[tuple[ServeConfig, int]]:
    """Each model with its devices, and the cores that go with them.

    `devices`: those that several models divide; None: one for each core, or GPU if these are more
    or a model's shape changes on them. One model has all cores. Raises ConfigError as `divide`
    does, and for a shape that changes on GPUs beside models on the CPU."""
    if len(configs) == 1:
        return [(configs[0], cores)]
    wishes = [Wish.of(config) for config in configs]
    changing = [served_name(config.engine) for config in configs if changes_on_gpus(config)]
    if changing:
        beside = [served_name(c.engine) for c in configs if c.engine.device != "cuda"]
        if beside:
            raise ConfigError(
                f"device: got cpu for {beside[0]!r}, allowed beside --blueprint auto on GPUs, as "
                f"{changing[0]!r} has it: cuda, as all models then divide the GPUs"
            )
        if devices is not None and devices > gpus:
            raise ConfigError(
                f"--devices: got {devices}, allowed: at most {gpus}, one for each GPU"
            )
        devices = devices or gpus
    devices = devices or max(cores, gpus)
    shares = divide(wishes, devices, has_cores=not changing)
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


def divide(wishes: Sequence[Wish], devices: int, has_cores: bool = True) -> tuple[int, ...]:
    """Devices of each model: what is assigned to it, or else what its plan needs and an equal part
    of what is left.

    `has_cores`: not GPUs. Raises ConfigError for plans that do not fit, with what would."""
    for wish in wishes:
        if wish.given is not None and wish.given < wish.least:
            raise ConfigError(
                f"devices: got {wish.given} for {wish.name!r}, allowed: at least {wish.least}, "
                f"which its replicas need"
            )
    needed = sum(wish.needed for wish in wishes)
    if needed > devices:
        each = ", ".join(f"{wish.name!r} {wish.needed}" for wish in wishes)
        more = f", or --devices {needed}, which lets CPU replicas share cores" if has_cores else ""
        raise ConfigError(
            f"models: {each}: together {needed} devices, and there are {devices}; what would fit: "
            f"{_fitting(wishes, devices)}{more}"
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
