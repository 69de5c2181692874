"""What answers at a URL: its models, its kind, and its tokenizer where it offers one."""

import http.client
import json
import ssl
import time
import urllib.parse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scalellm.errors import ConfigError, EndpointError

_TIMEOUT_S = 60.0
_ANSWER_WITHIN_S = 10.0
_MAX_ANSWER_BYTES = 64 << 20
_READ_BYTES = 1 << 16
# Servers known to take `return_token_ids`, by what they say owns their models.
_TELLS_TOKEN_IDS = ("scalellm", "vllm")


@dataclass(frozen=True, slots=True)
class Trust:
    """Whom to believe of an https target, beside the public authorities."""

    ca_pem: str | None = None  # certificates of authorities
    insecure: bool = False  # anyone

    @staticmethod
    def read(ca_file: Path | None, insecure: bool) -> "Trust":
        """Raises ConfigError for a file that holds no certificates."""
        if ca_file is None:
            return Trust(None, insecure)
        try:
            trust = Trust(ca_file.read_text(encoding="ascii"), insecure)
            trust.context()
        except OSError as error:
            # Also what ssl raises, for what is not a certificate.
            raise ConfigError(f"--ca-cert: {ca_file}: {error.strerror or error}") from None
        except ValueError:
            raise ConfigError(f"--ca-cert: {ca_file}: not PEM") from None
        return trust

    def context(self) -> ssl.SSLContext:
        context = ssl.create_default_context()
        if self.ca_pem is not None:
            context.load_verify_locations(cadata=self.ca_pem)
        if self.insecure:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        return context

    def plan_fields(self) -> dict[str, Any]:
        """As the load generator wants it."""
        return {"ca_pem": self.ca_pem, "insecure": self.insecure}


PUBLIC_AUTHORITIES = Trust()


class TargetClient:
    """Small requests to the target, beside the load. Not for measuring."""

    def __init__(
        self,
        url: str,
        api_key: str = "",
        trust: Trust = PUBLIC_AUTHORITIES,
        *,
        flag: str = "url",
    ) -> None:
        parts = urllib.parse.urlsplit(url)
        self._tls = trust.context() if parts.scheme == "https" else None
        try:
            port = parts.port or (80 if self._tls is None else 443)
        except ValueError:
            port = 0
        if parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
            raise ConfigError(f"{flag}: got {url!r}; allowed: http[s]://HOST[:PORT]")
        self.url = url.rstrip("/").removesuffix("/v1")
        self.host = parts.hostname
        self._port = port
        self._prefix = urllib.parse.urlsplit(self.url).path
        self._headers = {"Content-Type": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"

    def _connection(self) -> http.client.HTTPConnection:
        if self._tls is None:
            return http.client.HTTPConnection(self.host, self._port, timeout=_TIMEOUT_S)
        return http.client.HTTPSConnection(
            self.host, self._port, timeout=_TIMEOUT_S, context=self._tls
        )

    def call(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """The JSON of a 2xx answer. Raises EndpointError on anything else."""
        connection = self._connection()
        payload = None if body is None else json.dumps(body)
        try:
            connection.request(method, self._prefix + path, payload, self._headers)
            response = connection.getresponse()
            text = _read(response, time.monotonic() + _ANSWER_WITHIN_S)
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise EndpointError(f"{self.url}{path}: {reason}") from None
        finally:
            connection.close()
        if not 200 <= response.status < 300:
            words = " ".join(text[:300].decode("utf-8", "replace").split())
            raise EndpointError(f"{self.url}{path}: HTTP {response.status} {words}")
        try:
            return json.loads(text)
        except ValueError:
            raise EndpointError(f"{self.url}{path}: the answer is not JSON") from None


def _read(response: http.client.HTTPResponse, until: float) -> bytes:
    """The whole answer. Raises TimeoutError for one that goes on and on."""
    parts, length = [], 0
    while part := response.read1(_READ_BYTES):
        parts.append(part)
        length += len(part)
        if length > _MAX_ANSWER_BYTES or time.monotonic() > until:
            raise TimeoutError(f"the answer does not end: {length} bytes")
    return b"".join(parts)


@dataclass(frozen=True, slots=True)
class Target:
    """What was found. `problem`: why it does not look like an endpoint; the bench goes on."""

    url: str
    models: tuple[str, ...]
    owned_by: str | None
    version: str | None
    problem: str | None
    max_model_len: int | None = None  # where it tells (vLLM does)

    @property
    def tells_token_ids(self) -> bool:
        return self.owned_by is not None and self.owned_by.lower() in _TELLS_TOKEN_IDS


def discover(client: TargetClient) -> Target:
    """Ask for models and version; never raises for a target that is absent or strange."""
    try:
        entries = client.call("GET", "/v1/models")["data"]
        models = tuple(str(entry["id"]) for entry in entries)
        owners = [entry.get("owned_by") for entry in entries]
        limits = [entry.get("max_model_len") for entry in entries]
    except EndpointError as error:
        return Target(client.url, (), None, None, str(error))
    except (KeyError, TypeError, AttributeError):
        problem = f"{client.url}/v1/models does not answer like an OpenAI endpoint"
        return Target(client.url, (), None, None, problem)
    owner = next((str(owner) for owner in owners if owner), None)
    limit = next((limit for limit in limits if isinstance(limit, int) and limit > 1), None)
    return Target(client.url, models, owner, _version(client), None, limit)


def _version(client: TargetClient) -> str | None:
    try:
        found = client.call("GET", "/version")
    except EndpointError:
        return None
    version = found.get("version") if isinstance(found, dict) else None
    return None if version is None else str(version)
