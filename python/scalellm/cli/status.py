"""`scalellm status`: readiness, replicas and load of a running endpoint."""

import argparse
import json
import time
from typing import Any

from scalellm.cli.answer import endpoint_of
from scalellm.cli.flags import add_settings, resolve_arguments
from scalellm.cli.table import table
from scalellm.controller.blueprint.shape import Blueprint
from scalellm.controller.gateway_view import Answer, Sample, get, parse_metrics, replica_states
from scalellm.errors import EndpointError

_HTTP_OK = 200
_COLUMNS = (  # heading, metric of a replica without its prefix, format
    ("running", "running_requests", "{:.0f}"),
    ("waiting", "waiting_requests", "{:.0f}"),
    ("backlog", "backlog_tokens", "{:.0f}"),
    ("step ms", "step_seconds", "{:.1f}"),
    ("KV used", "kv", "{:.0%}"),
    ("preempted", "preemptions_total", "{:.0f}"),
)
_PREFIX = "scalellm_replica_"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_settings(parser, "status")
    parser.add_argument("--watch", type=float, metavar="SECONDS", help="print again and again")


def run(arguments: argparse.Namespace) -> int:
    values = resolve_arguments(arguments)
    endpoint = endpoint_of(values)
    keys, admin_keys = values["api_key"].value, values["admin_key"].value
    while True:
        ready = _ask(endpoint.url, "/ready", keys)
        metrics = _ask(endpoint.url, "/metrics", keys)
        lines = report(endpoint.url, ready, parse_metrics(metrics.body))
        lines[1:1] = blueprint_lines(_ask(endpoint.url, "/admin/v1/blueprint", admin_keys))
        print("\n".join(lines), flush=True)
        if not arguments.watch:
            return 0 if ready.status == _HTTP_OK else 1
        time.sleep(arguments.watch)
        print()


def _ask(url: str, path: str, keys: tuple[str, ...]) -> Answer:
    answer = get(url, path, api_key=keys[0] if keys else "")
    if answer is None:
        raise EndpointError(f"cannot reach {url}; is `scalellm serve` running?")
    return answer


def report(url: str, ready: Answer, samples: list[Sample]) -> list[str]:
    """The lines to print."""
    lines = [f"{url} {_readiness(ready)}"]
    in_flight = sum(s.value for s in samples if s.name == "scalellm_requests_in_flight")
    tokens = sum(s.value for s in samples if s.name == "scalellm_output_tokens_total")
    lines.append(f"requests in flight {in_flight:.0f}, tokens generated {tokens:.0f}")
    by_replica: dict[tuple[str, str], dict[str, float]] = {}
    for sample in samples:
        if sample.name.startswith(_PREFIX) and "state" not in sample.labels:
            place = sample.labels.get("model", "?"), sample.labels.get("replica", "?")
            found = by_replica.setdefault(place, {})
            found[sample.name.removeprefix(_PREFIX)] = sample.value
    states = replica_states(samples)
    rows = [["model", "replica", "state", *(heading for heading, _, _ in _COLUMNS)]]
    for model, address in sorted(by_replica):
        found = by_replica[model, address]
        found["kv"] = found.get("kv_blocks_used", 0) / (found.get("kv_blocks_total") or 1)
        found["step_seconds"] = 1e3 * found.get("step_seconds", 0)
        cells = [form.format(found.get(metric, 0)) for _, metric, form in _COLUMNS]
        rows.append([model, address, states.get(address, "?"), *cells])
    return lines + table(rows)


def blueprint_lines(answer: Answer) -> list[str]:
    """Each model's shape, phase and last decision; nothing where the endpoint does not tell."""
    if answer.status != _HTTP_OK:
        return []
    try:
        found = json.loads(answer.body)
        if "models" not in found:
            return _shape_lines(found, "")
        return [
            line for state in found["models"] for line in _shape_lines(state, f"{state['model']}: ")
        ]
    except (ValueError, KeyError, TypeError):
        return []


def _shape_lines(state: dict[str, Any], model: str) -> list[str]:
    shape = Blueprint.of_json(state["blueprint"])
    lines = [f"{model}blueprint {shape} ({state['mode']}), {state['phase']}"]
    given_up: dict[str, str] = state.get("given_up", {})
    lines += [f"{model}{name} given up: {reason}" for name, reason in given_up.items()]
    barred: dict[str, str] = state.get("barred", {})
    lines += [f"{model}{shape} cannot be had: {why}" for shape, why in barred.items()]
    if (decision := state.get("decision")) is not None:
        lines.append(f"{model}last decision: {decision['reason']}")
    return lines


def _readiness(ready: Answer) -> str:
    if ready.status == _HTTP_OK:
        return "ready"
    try:
        reason = json.loads(ready.body)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        reason = f"status {ready.status}"
    return f"not ready: {reason}"
