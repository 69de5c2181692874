"""What a gateway's /health, /ready and /metrics say about it and its replicas."""

import http.client
import re
import socket
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


class _UnixConnection(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: str, timeout_s: float) -> None:
        super().__init__("localhost", timeout=timeout_s)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def _connection(
    parts: urllib.parse.SplitResult, timeout_s: float
) -> tuple[http.client.HTTPConnection, str]:
    """A connection that is not open yet, and what its paths begin with."""
    if parts.scheme == "unix":
        return _UnixConnection(parts.path, timeout_s), ""
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    host = parts.hostname or "127.0.0.1"
    return kind(host, parts.port, timeout=timeout_s), parts.path.rstrip("/")


def get(url: str, path: str, timeout_s: float = 2.0, api_key: str = "") -> Answer | None:
    """GET `path` of the endpoint at `url`, perhaps unix:PATH; None when it cannot be reached."""
    connection, base = _connection(urllib.parse.urlsplit(url), timeout_s)
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        connection.request("GET", base + path, headers=headers)
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
