"""Engines as pods: Kubernetes itself starts, heals and replaces them, so nothing is started here.

What was asked of `serve` becomes values of the Helm chart (deploy/helm/scalellm), which has the
same parts: gateways, engines, and how they find each other.
"""

from collections.abc import Collection, Sequence
from dataclasses import fields
from typing import Any

from scalellm.config import BlueprintConfig, EngineConfig, GatewayConfig, ServeConfig
from scalellm.controller.blueprint.cost import shipped
from scalellm.controller.blueprint.shape import check_fits, parse_groups
from scalellm.controller.launchers.flags import flags_of
from scalellm.controller.shapes import WIDTHS, check_together, served_name
from scalellm.errors import ConfigError

_OWN_VALUES = {  # settings of an engine that are not among its `args`
    *("model", "served_model_name", "revision", "tensor_parallel_size", "cpu_threads"),
    *("max_model_len", "listen", "model_path", "packed_cache", "first_device"),
    *("nnodes", "node_rank", "master_addr", "master_port"),
}
_GATEWAY_KEYS = ("max_body_bytes", "max_in_flight", "max_queued", "request_timeout_s")
# The chart has no value for them.
_REFUSED = ("chat_template", "replay", "replay_wait_s", "replica_wait_s")
_OWN_SHAPE = ("devices", "replica")  # settings of a blueprint that are not among `args`


def helm_values(configs: Sequence[ServeConfig]) -> dict[str, Any]:
    """The chart's values for these models. Keys and the database's URL are not among them.

    Raises ConfigError for what the chart does not have."""
    shared = configs[0]
    gateway = {
        key: getattr(shared.gateway, key)
        for key in (*_GATEWAY_KEYS, "database_down")
        if getattr(shared.gateway, key) != getattr(GatewayConfig(), key)
    }
    return {
        "models": [_model(config) for config in configs],
        "gateway": {
            "config": gateway,
            "drainTimeoutSeconds": max(1, round(shared.deployment.drain_timeout_s)),
        },
        "engine": {"startupSeconds": max(1, round(shared.deployment.start_timeout_s))},
    }


def _model(config: ServeConfig) -> dict[str, Any]:
    engine, gateway = config.engine, config.gateway
    for name in _REFUSED:
        if getattr(gateway, name) != getattr(GatewayConfig(), name):
            raise ConfigError(f"{name}: the chart has no value for it; allowed with it: local, ray")
    shape, more = _shape(config)
    ranks_here = engine.tensor_parallel_size // engine.nnodes  # in each pod
    threads = engine.cpu_threads or shape.get("devices") or max(2, ranks_here)
    values: dict[str, Any] = {
        "name": served_name(engine),
        "model": engine.model,
        "replicas": config.deployment.replicas,
        "tensorParallelSize": engine.tensor_parallel_size,
        **shape,
        "routing": gateway.routing,
        "args": flags_of(_changed(engine, EngineConfig(), _OWN_VALUES) | more),
        "cpuThreads": threads,
        "resources": {"requests": {"cpu": str(threads)}},
    }
    if engine.device == "cuda":
        gpus = shape.get("devices") or ranks_here
        values["resources"]["limits"] = {"nvidia.com/gpu": str(gpus)}
    if engine.revision is not None:
        values["revision"] = engine.revision
    if engine.nnodes > 1:
        if engine.tensor_parallel_size % engine.nnodes:
            raise ConfigError(
                f"nnodes: got {engine.nnodes}, allowed: what divides tensor_parallel_size "
                f"{engine.tensor_parallel_size}"
            )
        values["hosts"] = engine.nnodes
    if engine.max_model_len is not None:
        values["maxModelLen"] = engine.max_model_len
    return values


def _shape(config: ServeConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """Values of a model whose pods are whole deployments, and settings for its `args`; else none.

    Raises ConfigError for what such a pod could not be."""
    mode, asked = config.deployment.blueprint, config.blueprint
    if mode == "static" and not asked.replica:
        return {}, {}
    check_together(config)
    devices = asked.devices or config.engine.cpu_threads
    if devices is None:
        raise ConfigError("devices: missing; needed to say how many each pod divides")
    if asked.replica:
        blueprint = parse_groups(asked.replica)
        check_fits(blueprint, devices, WIDTHS, "--replica")
        shapes = [f"tp={group.tp},count={group.count}" for group in blueprint.groups]
        return {"shapes": shapes, "devices": devices}, {}
    if asked.journal_file is not None or asked.calibration not in (None, *shipped()):
        name = "calibration" if asked.journal_file is None else "journal"
        raise ConfigError(f"{name}: a file of this machine is not in the pods; leave it out")
    return {"blueprint": mode, "devices": devices}, _changed(asked, BlueprintConfig(), _OWN_SHAPE)


def _changed(given: Any, usual: Any, left_out: Collection[str]) -> dict[str, Any]:
    """The settings that are not as they are by themselves."""
    names = (entry.name for entry in fields(usual) if entry.name not in left_out)
    return {
        name: getattr(given, name) for name in names if getattr(given, name) != getattr(usual, name)
    }
