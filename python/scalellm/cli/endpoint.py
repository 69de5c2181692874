"""A small client of an OpenAI-compatible endpoint, for the commands that talk to one."""

import http.client
import json
import socket
import urllib.parse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from scalellm.errors import ConfigError, EndpointError

_CONNECT_TIMEOUT_S = 10.0
_MAX_ERROR_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class Piece:
    """One event of a stream: some text, or what the last event says."""

    text: str = ""
    finish_reason: str | None = None
    completion_tokens: int | None = None


class Endpoint:
    """Where to send requests, and as whom."""

    def __init__(self, url: str, api_key: str = "") -> None:
        parts = urllib.parse.urlsplit(url)
        try:
            port = parts.port
        except ValueError:
            port = -1
        if parts.scheme not in ("http", "https") or not parts.hostname or port == -1:
            raise ConfigError(f"url: got {url!r}; allowed: http://HOST:PORT or https://HOST:PORT")
        self.url = url.rstrip("/").removesuffix("/v1")
        self._secure = parts.scheme == "https"
        self._host, self._port = parts.hostname, port
        self._base = urllib.parse.urlsplit(self.url).path
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}

    def models(self) -> list[str]:
        """Names of the served models. Raises EndpointError."""
        connection, response = self._send("GET", "/v1/models", None)
        try:
            found = json.loads(response.read())
            return [str(entry["id"]) for entry in found["data"]]
        except (ValueError, KeyError, TypeError, OSError, http.client.HTTPException):
            raise EndpointError(f"{self.url} does not answer like an OpenAI endpoint") from None
        finally:
            connection.close()

    def stream(self, path: str, body: Mapping[str, Any]) -> Iterator[Piece]:
        """POST a streaming request and yield its events; closing the iterator cancels the request.

        Raises EndpointError, also for an error within the stream and for one that just breaks off.
        """
        body = {**body, "stream": True, "stream_options": {"include_usage": True}}
        connection, response = self._send("POST", path, body)
        try:
            for line in self._lines(response):
                if not line.startswith(b"data:"):
                    continue
                data = line[5:].strip()
                if data == b"[DONE]":
                    return
                yield _piece(data)
            raise EndpointError("the stream broke off")
        finally:
            connection.close()

    def _lines(self, response: http.client.HTTPResponse) -> Iterator[bytes]:
        try:
            while line := response.readline():
                yield line
        except (OSError, http.client.HTTPException) as error:
            raise EndpointError(f"the stream broke off: {error}") from None

    def _send(
        self, method: str, path: str, body: Mapping[str, Any] | None
    ) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        kind = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
        connection = kind(self._host, self._port, timeout=_CONNECT_TIMEOUT_S)
        headers = dict(self._headers)
        payload = None
        if body is not None:
            payload = json.dumps(body).encode()
            headers["Content-Type"] = "application/json"
        try:
            connection.connect()
            if connection.sock is not None:
                connection.sock.settimeout(None)  # a model may think for as long as it likes
                connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            connection.request(method, self._base + path, payload, headers)
            response = connection.getresponse()
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise EndpointError(
                f"cannot reach {self.url}: {reason}; is `scalellm serve` running?"
            ) from None
        if response.status != http.client.OK:
            text = response.read(_MAX_ERROR_BYTES)
            connection.close()
            raise EndpointError(f"{self.url}: {response.status} {_error_text(text)}")
        return connection, response


def _piece(data: bytes) -> Piece:
    try:
        event = json.loads(data)
        if "error" in event:
            raise EndpointError(str(event["error"].get("message", event["error"])))
        usage = event.get("usage") or {}
        choice = event["choices"][0] if event.get("choices") else {}
        text = choice.get("text") or (choice.get("delta") or {}).get("content") or ""
        return Piece(str(text), choice.get("finish_reason"), usage.get("completion_tokens"))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise EndpointError(f"an event of the stream makes no sense: {data[:80]!r}") from None


def _error_text(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return " ".join(body.decode("utf-8", "replace").split())[:200]
