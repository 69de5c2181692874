"""Engines as pods: Kubernetes itself starts, heals and replaces them, so nothing is started here.

What was asked of `serve` becomes values of the Helm chart (deploy/helm/scalellm), which has the
same parts: gateways, engines, and how they find each other.
"""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from scalellm.config import EngineConfig, GatewayConfig, ServeConfig
from scalellm.controller.launchers.flags import flags_of
from scalellm.controller.shapes import served_name
from scalellm.errors import ConfigError

_OWN_VALUES = {  # settings of an engine that are not among its `args`
    *("model", "served_model_name", "revision", "tensor_parallel_size", "cpu_threads"),
    *("max_model_len", "listen", "model_path", "packed_cache"),
}
_GATEWAY_KEYS = ("max_body_bytes", "max_in_flight", "max_queued", "request_timeout_s")
_REFUSED = ("chat_template", "replay", "replay_wait_s")  # the chart has no value for them


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
    engine, shape, gateway = config.engine, config.blueprint, config.gateway
    if config.deployment.blueprint != "static" or shape.replica:
        raise ConfigError(
            "launcher: kubernetes has replicas of one shape for each model; allowed with "
            "--blueprint auto and --replica: local, ray"
        )
    for name in _REFUSED:
        if getattr(gateway, name) != getattr(GatewayConfig(), name):
            raise ConfigError(f"{name}: the chart has no value for it; allowed with it: local, ray")
    given = {
        entry.name: getattr(engine, entry.name)
        for entry in fields(EngineConfig)
        if entry.name not in _OWN_VALUES
        and getattr(engine, entry.name) != getattr(EngineConfig(), entry.name)
    }
    threads = engine.cpu_threads or max(2, engine.tensor_parallel_size)
    values: dict[str, Any] = {
        "name": served_name(engine),
        "model": engine.model,
        "replicas": config.deployment.replicas,
        "tensorParallelSize": engine.tensor_parallel_size,
        "routing": gateway.routing,
        "args": flags_of(given),
        "cpuThreads": threads,
        "resources": {"requests": {"cpu": str(threads)}},
    }
    if engine.revision is not None:
        values["revision"] = engine.revision
    if engine.max_model_len is not None:
        values["maxModelLen"] = engine.max_model_len
    return values
