"""LiteLLM's proxy: its documented production settings, a worker a core; no database and no keys."""

import json
import os
from pathlib import Path

from peers.environment import python_environment
from peers.gateway import MODEL, Backend, Gateway
from peers.system import Launch

VERSION = "1.106.2"  # the newest whose requirements the registry has
_ENVIRONMENT = "litellm"


def _build(cache: Path, log: Path) -> None:
    python_environment(cache, _ENVIRONMENT, log)


def _launch(cache: Path, port: int, backend: Backend) -> Launch:
    upstream = {
        "model": f"openai/{MODEL}",
        "api_base": f"{backend.url}/v1",
        "api_key": "none",
    }
    config = cache / _ENVIRONMENT / "config.yaml"
    models = [{"model_name": MODEL, "litellm_params": upstream}]
    # JSON is YAML.
    config.write_text(
        json.dumps({"model_list": models, "litellm_settings": {"set_verbose": False}})
    )
    program = cache / _ENVIRONMENT / "env" / "bin" / "litellm"
    listen = ("--host", "127.0.0.1", "--port", str(port))
    workers = ("--num_workers", str(len(os.sched_getaffinity(0))))
    return Launch(
        (str(program), "--config", str(config), *listen, *workers),
        {
            "LITELLM_LOG": "ERROR",
            "LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY": "true",  # it is on loopback
            "LITELLM_MODE": "PRODUCTION",
            "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        },
        ready_path="/health/readiness",
    )


GATEWAY = Gateway(
    "litellm", f"LiteLLM {VERSION}", _build, _launch, slow=True, writes_are_counted=False
)
