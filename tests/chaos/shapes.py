"""A deployment of the demo model that can be told which of two shapes to have."""

import json
from http import HTTPStatus
from pathlib import Path
from typing import Any

from ..e2e.wire import Reply, call
from ..integration.served import Serve
from ..integration.supervised import until

WIDE, NARROW = [{"tp": 2, "count": 1}], [{"tp": 1, "count": 2}]
SWITCH_S = 90.0
_SHAPE = """
[[shapes]]
tp = {tp}
base_ms = 2.0
per_sequence_ms = 0.1
max_num_seqs = 256
max_num_batched_tokens = 2048
step_budget_ms = 800
kv_tokens = 65536
"""


def serve_two_shapes(folder: Path, *more: str, model: str = "demo") -> Serve:
    return Serve(
        folder,
        *("--blueprint", "auto", "--devices", "2", "--cpu-threads", "2"),
        *("--calibration", str(equal_costs(folder)), "--kv-cache-memory", "128MiB"),
        *("--hand-over-s", "3", *more),
        model=model,
    )


def equal_costs(folder: Path) -> Path:
    """A calibration by which a step of either width costs the same."""
    calibration = folder / "equal.toml"
    shapes = "".join(_SHAPE.format(tp=tp) for tp in (1, 2))
    calibration.write_text(f'name = "equal"\nsource = "derived"\nnote = "for tests"\n{shapes}')
    return calibration


def state(serve: Serve, model: str | None = None) -> dict[str, Any]:
    """Of the only model, or of one of several."""
    reply = call(serve.url, "/admin/v1/blueprint")
    assert reply.status == HTTPStatus.OK, reply.body
    found: dict[str, Any] = json.loads(reply.body)
    if model is None:
        return found
    (own,) = (one for one in found["models"] if one["model"] == model)
    return dict(own)


def ask_for(
    serve: Serve, blueprint: list[dict[str, int]] | None, model: str | None = None
) -> Reply:
    of = {} if model is None else {"model": model}
    return call(serve.url, "/admin/v1/blueprint", of | {"blueprint": blueprint}, method="PUT")


def wish(serve: Serve, blueprint: list[dict[str, int]] | None, model: str | None = None) -> None:
    reply = ask_for(serve, blueprint, model)
    assert reply.status == HTTPStatus.OK, reply.body


def switch(serve: Serve, blueprint: list[dict[str, int]], model: str | None = None) -> None:
    """Wish for a shape, and wait until the deployment has it and nothing else."""
    wish(serve, blueprint, model)

    def has_it() -> bool:
        found = state(serve, model)
        return bool(found["phase"] == "steady" and found["blueprint"] == blueprint)

    until(has_it, SWITCH_S)
