"""`scalellm serve` behind a certificate, with checks of requests and answers."""

import json
import socket
import ssl
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from .served import Serve

# Certificate and key of localhost.
PEM = Path(__file__).parents[1] / "unit" / "bench" / "localhost.pem"
HOOKS = """
[[safety]]
hook = "words"
words = ["falcon"]
on = "request"

[[safety]]
hook = "limits"
max_response_chars = 3
"""


def post(url: str, context: ssl.SSLContext, prompt: str) -> dict[str, Any]:
    body = json.dumps({"model": "demo", "prompt": prompt, "max_tokens": 20, "ignore_eos": True})
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}/v1/completions", body.encode(), headers)
    with urllib.request.urlopen(request, timeout=60, context=context) as response:
        answer: dict[str, Any] = json.loads(response.read())
        return answer


def test_clients_speak_https_and_hooks_check_what_they_say(tmp_path: Path) -> None:
    hooks = tmp_path / "safety.toml"
    hooks.write_text(HOOKS, encoding="utf-8")
    serve = Serve(
        tmp_path, "--tls-cert", str(PEM), "--tls-key", str(PEM), "--safety-file", str(hooks)
    )
    try:
        assert serve.url.startswith("https://127.0.0.1:")
        context = ssl.create_default_context(cafile=str(PEM))
        context.check_hostname = False
        choice = post(serve.url, context, "Once upon a time")["choices"][0]
        assert (len(choice["text"]), choice["finish_reason"]) == (3, "length")
        with pytest.raises(urllib.error.HTTPError) as refused:
            post(serve.url, context, "A falcon, once")
        assert json.loads(refused.value.read())["error"]["code"] == "content_filter"
        context.set_alpn_protocols(["h2", "http/1.1"])
        address = ("127.0.0.1", urllib.parse.urlsplit(serve.url).port)
        with (
            socket.create_connection(address, timeout=60) as tcp,
            context.wrap_socket(tcp) as tls,
        ):
            assert tls.selected_alpn_protocol() == "h2"
    finally:
        serve.close()
