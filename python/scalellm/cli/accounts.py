"""Keys and usage, asked of a running gateway's /admin/v1 or straight of their database."""

import http.client
import json
import urllib.parse
from collections.abc import Mapping
from typing import Any, Protocol

from scalellm.config import Value
from scalellm.errors import ConfigError, EndpointError

_TIMEOUT_S = 30.0
_OK = 200


class Accounts(Protocol):
    """What both ways can do; each raises ConfigError for what cannot be."""

    def create(self, key: Mapping[str, Any]) -> dict[str, Any]: ...
    def keys(self) -> list[dict[str, Any]]: ...
    def revoke(self, key_id: str) -> dict[str, Any]: ...
    def usage(self, query: Mapping[str, Any]) -> list[dict[str, Any]]: ...


def accounts_of(values: Mapping[str, Value]) -> Accounts:
    """The database if its URL is set, otherwise the gateway at `url`."""
    database_url = values["database_url"].value
    if database_url is not None:
        return DatabaseAccounts(database_url)
    keys = values["admin_key"].value
    return GatewayAccounts(values["url"].value, keys[0] if keys else "")


class DatabaseAccounts:
    def __init__(self, url: str) -> None:
        self._url = url

    def create(self, key: Mapping[str, Any]) -> dict[str, Any]:
        return self._ask({"do": "create_key", "key": key})

    def keys(self) -> list[dict[str, Any]]:
        return _list(self._ask({"do": "list_keys"}))

    def revoke(self, key_id: str) -> dict[str, Any]:
        return self._ask({"do": "revoke_key", "id": key_id})

    def usage(self, query: Mapping[str, Any]) -> list[dict[str, Any]]:
        return _list(self._ask({"do": "usage", "query": query}))

    def _ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        from scalellm._core import accounts_request

        try:
            return _object(accounts_request(self._url, json.dumps(request)))
        except ValueError as error:
            raise ConfigError(str(error)) from None
        except OSError as error:
            raise EndpointError(str(error)) from None


class GatewayAccounts:
    def __init__(self, url: str, admin_key: str) -> None:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"url: got {url!r}; allowed: http://HOST:PORT or https://HOST:PORT")
        self._url = url
        self._secure = parts.scheme == "https"
        self._netloc = parts.netloc
        self._headers = {"Authorization": f"Bearer {admin_key}"} if admin_key else {}

    def create(self, key: Mapping[str, Any]) -> dict[str, Any]:
        return self._ask("POST", "keys", key)

    def keys(self) -> list[dict[str, Any]]:
        return _list(self._ask("GET", "keys"))

    def revoke(self, key_id: str) -> dict[str, Any]:
        return self._ask("DELETE", f"keys/{urllib.parse.quote(key_id, safe='')}")

    def usage(self, query: Mapping[str, Any]) -> list[dict[str, Any]]:
        fields = {**query, "group_by": ",".join(query["group_by"])}
        return _list(self._ask("GET", f"usage?{urllib.parse.urlencode(fields)}"))

    def _ask(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        kind = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
        connection = kind(self._netloc, timeout=_TIMEOUT_S)
        try:
            payload = None if body is None else json.dumps(body)
            connection.request(method, f"/admin/v1/{path}", payload, self._headers)
            response = connection.getresponse()
            text = response.read().decode("utf-8", "replace")
        except (OSError, http.client.HTTPException) as error:
            raise EndpointError(
                f"cannot reach {self._url}: {error}; is `scalellm serve` running? "
                "--database-url asks the database itself"
            ) from None
        finally:
            connection.close()
        if response.status != _OK:
            raise EndpointError(f"{self._url}: {response.status} {_message(text)}")
        return _object(text)


def _object(text: str) -> dict[str, Any]:
    found = json.loads(text)
    if not isinstance(found, dict):
        raise EndpointError("the answer is no JSON object")
    return found


def _list(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    return list(found["data"])


def _message(text: str) -> str:
    try:
        return str(json.loads(text)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return " ".join(text.split())[:200]
