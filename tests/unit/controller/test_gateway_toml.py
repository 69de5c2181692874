"""What `serve` writes for its gateway, and how the controller asks it."""

import http.server
import socketserver
import threading
import tomllib
from pathlib import Path

import pytest

from scalellm.config import (
    BlueprintConfig,
    DeploymentConfig,
    EngineConfig,
    GatewayConfig,
    LogConfig,
    ServeConfig,
)
from scalellm.controller.deployment import Served, plan_deployment
from scalellm.controller.gateway_view import get
from scalellm.controller.launchers.local import LocalLauncher
from scalellm.controller.supervisor import Plan
from scalellm.errors import ConfigError


def config(gateway: GatewayConfig) -> ServeConfig:
    return ServeConfig(
        engine=EngineConfig(),
        gateway=gateway,
        deployment=DeploymentConfig(),
        log=LogConfig(),
        blueprint=BlueprintConfig(),
    )


def planned(gateway: GatewayConfig, port: int, folder: Path) -> Plan:
    served = Served(config(gateway), folder)
    return plan_deployment([served], port, folder, LocalLauncher(folder))


def test_https_is_for_clients_and_a_unix_socket_for_the_controller(tmp_path: Path) -> None:
    made = GatewayConfig(tls_cert="cert.pem", tls_key="/k/key.pem", safety_file="s.toml")
    plan = planned(made, 8443, tmp_path)
    written = tomllib.loads((tmp_path / "gateway.toml").read_text(encoding="utf-8"))
    assert plan.url == "https://127.0.0.1:8443"
    assert plan.inner_url == f"unix:{written['unix_socket']}"
    assert written["tls_cert"] == str(Path("cert.pem").resolve())
    assert written["tls_key"] == "/k/key.pem"
    assert written["models"][0]["safety_file"] == str(Path("s.toml").resolve())


def test_without_a_certificate_the_controller_asks_at_the_url(tmp_path: Path) -> None:
    plan = planned(GatewayConfig(), 8000, tmp_path)
    written = tomllib.loads((tmp_path / "gateway.toml").read_text(encoding="utf-8"))
    assert plan.inner_url == plan.url == "http://127.0.0.1:8000"
    assert not {"unix_socket", "tls_cert", "tls_key"} & written.keys()


def test_half_of_a_certificate_is_refused() -> None:
    with pytest.raises(ConfigError, match="--tls-key: missing, needed with --tls-cert"):
        GatewayConfig(tls_cert="x.pem")
    with pytest.raises(ConfigError, match="--tls-cert: missing, needed with --tls-key"):
        GatewayConfig(tls_key="x.pem")


def test_a_unix_socket_is_asked_like_a_url(tmp_path: Path) -> None:
    path = str(tmp_path / "s")

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(self.path.encode())

        def address_string(self) -> str:
            return "unix"

    with socketserver.UnixStreamServer(path, Handler) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        answer = get(f"unix:{path}", "/health")
        thread.join()
    assert answer is not None
    assert (answer.status, answer.body) == (200, "/health")
    assert get(f"unix:{tmp_path / 'nobody'}", "/health") is None
