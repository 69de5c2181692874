"""A deployment of the demo model that can be told which of two shapes to have."""

import json
from http import HTTPStatus
from pathlib import Path
from typing import Any

from ..e2e.wire import call
from ..integration.served import Serve
from ..integration.supervised import until

WIDE, NARROW = [{"tp": 2, "count": 1}], [{"tp": 1, "count": 2}]
SWITCH_S = 90.0
# Both shapes cost the same: the policy has no reason to move.
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


def serve_two_shapes(folder: Path, *more: str) -> Serve:
    calibration = folder / "equal.toml"
    shapes = "".join(_SHAPE.format(tp=tp) for tp in (1, 2))
    calibration.write_text(f'name = "equal"\nsource = "derived"\nnote = "for tests"\n{shapes}')
    return Serve(
        folder,
        *("--blueprint", "auto", "--devices", "2", "--cpu-threads", "2"),
        *("--calibration", str(calibration), "--kv-cache-memory", "128MiB"),
        *("--hand-over-s", "3", *more),
    )


def state(serve: Serve) -> dict[str, Any]:
    reply = call(serve.url, "/admin/v1/blueprint")
    assert reply.status == HTTPStatus.OK, reply.body
    found: dict[str, Any] = json.loads(reply.body)
    return found


def wish(serve: Serve, blueprint: list[dict[str, int]] | None) -> None:
    reply = call(serve.url, "/admin/v1/blueprint", {"blueprint": blueprint}, method="PUT")
    assert reply.status == HTTPStatus.OK, reply.body


def switch(serve: Serve, blueprint: list[dict[str, int]]) -> None:
    """Wish for a shape, and wait until the deployment has it and nothing else."""
    wish(serve, blueprint)

    def has_it() -> bool:
        found = state(serve)
        return bool(found["phase"] == "steady" and found["blueprint"] == blueprint)

    until(has_it, SWITCH_S)
