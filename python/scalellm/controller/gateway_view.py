"""What a gateway's /health, /ready and /metrics say about it and its replicas."""

import http.client
import re
import urllib.parse
from dataclasses import dataclass

_SAMPLE = re.compile(r"^([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{(.*)\})?\s+(\S+)")
_LABEL = re.compile(r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\]|\\.)*)"')
_ESCAPES = {"\\\\": "\\", '\\"': '"', "\\n": "\n"}

STATE_METRIC = "scalellm_replica_state"
MAX_ANSWER_BYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class Sample:
    """One line of Prometheus' text format."""

    name: str
    labels: dict[str, str]
    value: float


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    body: str


def get(url: str, path: str, timeout_s: float = 2.0, api_key: str = "") -> Answer | None:
    """GET `path` of the endpoint at `url`; None when it cannot be reached."""
    parts = urllib.parse.urlsplit(url)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    connection = kind(parts.hostname or "127.0.0.1", parts.port, timeout=timeout_s)
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        connection.request("GET", parts.path.rstrip("/") + path, headers=headers)
        response = connection.getresponse()
        body = response.read(MAX_ANSWER_BYTES)
        return Answer(response.status, body.decode("utf-8", "replace"))
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


def parse_metrics(text: str) -> list[Sample]:
    """The samples of an exposition; lines that are none are passed over."""
    samples = []
    for line in text.splitlines():
        found = _SAMPLE.match(line)
        if not found:
            continue
        labels = {
            name: re.sub(r'\\[\\"n]', lambda match: _ESCAPES[match.group()], value)
            for name, value in _LABEL.findall(found.group(2) or "")
        }
        try:
            samples.append(Sample(found.group(1), labels, float(found.group(3))))
        except ValueError:
            continue
    return samples


def replica_states(samples: list[Sample]) -> dict[str, str]:
    """For each replica's address the state that the gateway sees it in, e.g. "ready" or "hung"."""
    return {
        sample.labels["replica"]: sample.labels["state"]
        for sample in samples
        if sample.name == STATE_METRIC
        and sample.value == 1
        and {"replica", "state"} <= sample.labels.keys()
    }
