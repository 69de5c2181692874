"""From settings to a process tree: the commands of gateway, controller and engines."""

import errno
import json
import re
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from scalellm.config import ServeConfig
from scalellm.controller.child import PYTHON, Command
from scalellm.controller.gpus import Gpus
from scalellm.controller.launchers.flags import engine_flags
from scalellm.controller.launchers.launcher import Engine, Launcher
from scalellm.controller.policy import Limits
from scalellm.controller.shapes import (
    WIDTHS,
    Place,
    Shapes,
    changes_on_gpus,
    comes_after,
    initial_state,
    served_name,
    shapes_of,
)
from scalellm.controller.state_file import write_state
from scalellm.controller.supervisor import Plan
from scalellm.errors import AddressInUseError, ConfigError, ServeError


@dataclass(frozen=True, slots=True)
class Served:
    """One model of a `serve`. What holds for all models is the same in each `config`."""

    config: ServeConfig
    path: Path
    cores: int | None = None  # of its replicas together; None: all
    widths: Sequence[int] = WIDTHS  # numbers of ranks that can share it

    @property
    def name(self) -> str:
        return served_name(self.config.engine)


def plan_deployment(models: Sequence[Served], port: int, folder: Path, launcher: Launcher) -> Plan:
    """The tree of one `serve`; writes the configuration files of its processes into `folder`."""
    config = models[0].config
    deployment = config.deployment
    shapes = _shapes(models, folder, launcher)
    engines = _engines(models, shapes, launcher)
    launcher.check(engines)
    addresses = {engine.name: launcher.address(engine) for engine in engines}
    sections = []
    state_files: dict[str, Path] = {}
    for at, (model, found) in enumerate(zip(models, shapes, strict=True)):
        state_file = _state_file(folder, at)
        state = initial_state(found, model.config.deployment.blueprint)
        write_state(state_file, state)
        if found.steering is None:
            state_files |= dict.fromkeys(found.widths, state_file)
        sections.append(_model_section(model, [addresses[n] for n in found.widths], state_file))
    file = folder / "gateway.toml"
    file.touch(mode=0o600)
    has_tls = config.gateway.tls_cert is not None
    url = f"{'https' if has_tls else 'http'}://{_in_url(config.gateway.host)}:{port}"
    # The controller need not believe a certificate of whatever authority.
    inner = folder / "gateway.sock" if has_tls else None
    file.write_text(gateway_toml(_waiting(models), port, sections, inner), encoding="utf-8")
    return Plan(
        url=url,
        inner_url=f"unix:{inner}" if inner else url,
        model=",".join(model.name for model in models),
        gateway=Command((*PYTHON, "scalellm", "gateway", "--config", str(file))),
        controller=Command((*PYTHON, "scalellm.controller")),
        engines={
            engine.name: (addresses[engine.name], launcher.command(engine)) for engine in engines
        },
        limits=Limits(
            hung_after_s=deployment.hung_after_s, start_timeout_s=deployment.start_timeout_s
        ),
        wanted=frozenset().union(*(found.wanted for found in shapes)),
        steering=tuple(found.steering for found in shapes if found.steering is not None),
        state_files=state_files,
        drain_timeout_s=deployment.drain_timeout_s,
    )


def _waiting(models: Sequence[Served]) -> ServeConfig:
    """What the models share; requests wait for a shape that comes after the old one is gone, on a
    GPU also while it loads its weights."""
    config = models[0].config
    after = [model.config for model in models if comes_after(model.config)]
    if not after:
        return config
    gateway = config.gateway
    is_on_gpu = any(found.engine.device == "cuda" for found in after)
    load_s = config.deployment.start_timeout_s if is_on_gpu else 0.0
    replay_s = max(gateway.replay_wait_s, load_s)
    new_s = max(gateway.replica_wait_s, replay_s)
    return replace(config, gateway=replace(gateway, replay_wait_s=replay_s, replica_wait_s=new_s))


def _shapes(models: Sequence[Served], folder: Path, launcher: Launcher) -> list[Shapes]:
    """The replicas of each model. Raises ConfigError naming the model, if there are several."""
    prefixes = _prefixes([model.name for model in models]) if len(models) > 1 else ["engine"]
    found = []
    for at, (model, prefix) in enumerate(zip(models, prefixes, strict=True)):
        place = Place(model.widths, model.cores, prefix, launcher.most_threads, launcher.gpus or 0)
        try:
            found.append(shapes_of(model.config, _state_file(folder, at), place))
        except ConfigError as error:
            named = f"model {model.name!r}: " if len(models) > 1 else ""
            raise ConfigError(f"{named}{error}") from None
    return found


def _state_file(folder: Path, model: int) -> Path:
    return folder / f"blueprint-{model}.json"


def _prefixes(names: Sequence[str]) -> list[str]:
    """What each model's replicas are called: short, fit for a file's name, and none the beginning
    of another, so that no two replicas are called the same."""
    found: list[str] = []
    for at, name in enumerate(names):
        short = re.sub(r"[^a-z0-9]+", "-", name.lower().rpartition("/")[2])[:16].strip("-")
        is_free = bool(short) and not any(short.startswith(other) for other in found)
        found.append(short if is_free else f"{short or 'model'}-m{at}")
    return found


def _engines(
    models: Sequence[Served], shapes: Sequence[Shapes], launcher: Launcher
) -> list[Engine]:
    """All that may run; on GPUs of the launcher each has some of its own, but for replicas of
    different shapes of `auto`: these lie over each other."""
    found: list[Engine] = []
    gpus = _gpus_of_each(models, launcher.gpus or 0)
    for model, shape, own in zip(models, shapes, gpus, strict=True):
        config = model.config
        is_on_gpu = config.engine.device == "cuda"
        there: dict[int, Gpus] = {}  # of the replicas of one width
        for name, ranks in shape.widths.items():
            threads, first = shape.threads[name], 0
            if is_on_gpu and launcher.gpus is not None:
                here, share = ranks // config.engine.nnodes, config.engine.memory_share
                taken = own if shape.steering is None else there.setdefault(ranks, own.untaken())
                first = taken.take(name, here, share)
            shaped = replace(
                config.engine, tensor_parallel_size=ranks, cpu_threads=threads, first_device=first
            )
            flags = tuple(engine_flags(shaped, config.log, model.name))
            place = launcher.model(config.engine.model, model.path)
            found.append(Engine(name, len(found), place, flags, ranks, threads, is_on_gpu))
    return found


def _gpus_of_each(models: Sequence[Served], gpus: int) -> list[Gpus]:
    """The GPUs of each model: the same for all, unless a model's shape changes on them; then
    `sharing.share` has divided them."""
    if len(models) == 1 or not any(changes_on_gpus(model.config) for model in models):
        return [Gpus(gpus)] * len(models)
    shares = [model.config.blueprint.devices or 0 for model in models]
    return [Gpus(own, sum(shares[:at])) for at, own in enumerate(shares)]


def _model_section(model: Served, addresses: Sequence[str], state_file: Path) -> dict[str, object]:
    """The model's part of the gateway's configuration."""
    engine, gateway = model.config.engine, model.config.gateway
    section: dict[str, object] = {
        "name": model.name,
        "path": str(model.path),
        "replicas": list(addresses),
        "routing": gateway.routing,
        "blueprint_file": str(state_file),
    }
    if engine.max_model_len is not None:
        section["max_model_len"] = engine.max_model_len
    for key, file in (
        ("chat_template", gateway.chat_template),
        ("safety_file", gateway.safety_file),
    ):
        if file is not None:
            section[key] = str(Path(file).resolve())
    return section


def gateway_toml(
    config: ServeConfig,
    port: int,
    models: Sequence[Mapping[str, object]],
    unix_socket: Path | None = None,
) -> str:
    """The gateway's configuration file; it listens at `unix_socket` too."""
    gateway, log = config.gateway, config.log
    top: dict[str, object] = {
        "host": gateway.host,
        "port": port,
        "api_keys": list(gateway.api_key),
        "max_body_bytes": gateway.max_body_bytes,
        "max_in_flight": gateway.max_in_flight,
        "max_queued": gateway.max_queued,
        "admin_keys": list(gateway.admin_key),
        "database_down": gateway.database_down,
        "otlp_sample_ratio": gateway.otlp_sample_ratio,
        "request_timeout_s": gateway.request_timeout_s,
        "drain_timeout_s": config.deployment.drain_timeout_s,
        "log_level": log.log_level,
        "log_format": log.log_format,
    }
    if gateway.database_url is not None:
        top["database_url"] = gateway.database_url
    if gateway.otlp_endpoint is not None:
        top["otlp_endpoint"] = gateway.otlp_endpoint
    for key, file in (("tls_cert", gateway.tls_cert), ("tls_key", gateway.tls_key)):
        if file is not None:
            top[key] = str(Path(file).resolve())
    if unix_socket is not None:
        top["unix_socket"] = str(unix_socket)
    faults: dict[str, object] = {
        key: getattr(gateway, key) for key in ("replay", "replay_wait_s", "replica_wait_s")
    }
    lines = [*_lines(top), "", "[faults]", *_lines(faults)]
    for model in models:
        lines += ["", "[[models]]", *_lines(model)]
    return "\n".join(lines) + "\n"


def _lines(section: Mapping[str, object]) -> list[str]:
    return [f"{key} = {_toml(value)}" for key, value in section.items()]


def _toml(value: object) -> str:
    """A value of the few types above; JSON's strings, numbers and lists are TOML's too."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def free_port(host: str, port: int) -> int:
    """The port to listen on: `port` after proof that it can be had, or a free one for 0.

    Raises AddressInUseError when somebody listens there, ServeError when `host` is not ours.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            probe.listen(1)
            return int(probe.getsockname()[1])
    except PermissionError:
        raise ServeError(f"port {port}: not allowed; ports below 1024 need privileges") from None
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise AddressInUseError(
                f"port {port} of {host} is taken; stop what listens there or use --port"
            ) from None
        raise ServeError(f"cannot listen on {host}:{port}: {error.strerror or error}") from None


def _in_url(host: str) -> str:
    """A host to reach the gateway at from this machine, as it stands in a URL."""
    if host in ("0.0.0.0", ""):
        return "127.0.0.1"
    if host == "::":
        return "[::1]"
    return f"[{host}]" if ":" in host else host
