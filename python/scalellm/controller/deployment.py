"""From settings to a process tree: the commands of gateway, controller and engines."""

import errno
import json
import socket
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

from scalellm.config import SETTINGS, EngineConfig, LogConfig, ServeConfig
from scalellm.controller.child import PYTHON, Command
from scalellm.controller.launchers.launcher import Engine, Launcher
from scalellm.controller.policy import Limits
from scalellm.controller.shapes import STATE_FILE, WIDTHS, initial_state, shapes_of
from scalellm.controller.supervisor import Plan
from scalellm.errors import AddressInUseError, ServeError


def plan_deployment(
    config: ServeConfig,
    model_path: Path,
    port: int,
    folder: Path,
    launcher: Launcher,
    widths: Sequence[int] = WIDTHS,
) -> Plan:
    """The tree of one `serve`; writes the configuration files of its processes into `folder`.

    `widths`: numbers of ranks that can share the model."""
    deployment = config.deployment
    shapes = shapes_of(config, folder, widths)
    engines = [
        _engine(config, model_path, name, shapes.widths[name], shapes.threads[name])
        for name in shapes.widths
    ]
    launcher.check(engines)
    addresses = [launcher.address(engine) for engine in engines]
    state = initial_state(shapes, deployment.blueprint)
    (folder / STATE_FILE).write_text(json.dumps(state), encoding="utf-8")
    file = folder / "gateway.toml"
    file.touch(mode=0o600)
    text = gateway_toml(config, model_path, port, addresses, folder / STATE_FILE)
    file.write_text(text, encoding="utf-8")
    return Plan(
        url=f"http://{_in_url(config.gateway.host)}:{port}",
        model=served_name(config.engine),
        gateway=Command((*PYTHON, "scalellm", "gateway", "--config", str(file))),
        controller=Command((*PYTHON, "scalellm.controller")),
        engines={
            engine.name: (address, launcher.command(engine))
            for engine, address in zip(engines, addresses, strict=True)
        },
        limits=Limits(
            hung_after_s=deployment.hung_after_s, start_timeout_s=deployment.start_timeout_s
        ),
        wanted=shapes.wanted,
        steering=shapes.steering,
        drain_timeout_s=deployment.drain_timeout_s,
    )


def _engine(config: ServeConfig, model_path: Path, name: str, ranks: int, threads: int) -> Engine:
    shaped = replace(config.engine, tensor_parallel_size=ranks, cpu_threads=threads)
    flags = engine_flags(shaped, config.log, served_name(config.engine))
    return Engine(name, str(model_path), tuple(flags), ranks, threads)


def served_name(engine: EngineConfig) -> str:
    return engine.served_model_name or engine.model


def engine_flags(engine: EngineConfig, log: LogConfig, name: str) -> list[str]:
    """Every setting spelt out, so that an engine runs with what `serve` has resolved."""
    special = {"model": None, "listen": None, "served_model_name": name}
    given = {entry.name: getattr(engine, entry.name) for entry in fields(engine)}
    given |= {entry.name: getattr(log, entry.name) for entry in fields(log)} | special
    flags = []
    for setting_name, value in given.items():
        if value is None or setting_name not in SETTINGS:
            continue
        flag = SETTINGS[setting_name].flag
        if isinstance(value, bool):
            flags.append(flag if value else f"--no-{flag[2:]}")
        else:
            flags += [flag, str(value)]
    return flags


def gateway_toml(
    config: ServeConfig, model_path: Path, port: int, addresses: Sequence[str], state_file: Path
) -> str:
    """The gateway's configuration file."""
    gateway, log = config.gateway, config.log
    top: dict[str, object] = {
        "host": gateway.host,
        "port": port,
        "api_keys": list(gateway.api_key),
        "max_body_bytes": gateway.max_body_bytes,
        "blueprint_file": str(state_file),
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
    model: dict[str, object] = {
        "name": served_name(config.engine),
        "path": str(model_path),
        "replicas": list(addresses),
        "routing": gateway.routing,
    }
    if config.engine.max_model_len is not None:
        model["max_model_len"] = config.engine.max_model_len
    if gateway.chat_template is not None:
        model["chat_template"] = str(Path(gateway.chat_template).resolve())
    faults: dict[str, object] = {"replay": gateway.replay, "replay_wait_s": gateway.replay_wait_s}
    lines = [f"{key} = {_toml(value)}" for key, value in top.items()]
    lines += ["", "[faults]", *(f"{key} = {_toml(value)}" for key, value in faults.items())]
    lines += ["", "[[models]]", *(f"{key} = {_toml(value)}" for key, value in model.items())]
    return "\n".join(lines) + "\n"


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
