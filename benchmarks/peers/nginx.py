"""nginx as a plain proxy: it reads no request, and shows what passing bytes on costs.

The system's own, or else Debian's package, unpacked below the cache folder and not installed.
"""

import shutil
from pathlib import Path

from peers.environment import call
from peers.gateway import Backend, Gateway
from peers.system import Launch, PeerError

_FOLDER = "nginx"
_CONFIG = """\
daemon off;
worker_processes 1;
pid {folder}/nginx.pid;
error_log stderr error;
worker_rlimit_nofile 20000;
events {{ worker_connections 20000; }}
http {{
    access_log off;
    client_max_body_size 16m;
    client_body_buffer_size 512k;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    keepalive_requests 1000000;
    upstream backend {{ server {address}; keepalive 512; keepalive_requests 1000000; }}
    server {{
        listen 127.0.0.1:{port};
        location / {{
            proxy_pass http://backend;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_buffering off;
            proxy_read_timeout 600s;
        }}
    }}
}}
"""


def _program(cache: Path) -> str | None:
    unpacked = cache / _FOLDER / "usr" / "sbin" / "nginx"
    return shutil.which("nginx") or (str(unpacked) if unpacked.exists() else None)


def _build(cache: Path, log: Path) -> None:
    if _program(cache) is not None:
        return
    if shutil.which("apt-get") is None:
        raise PeerError("nginx is not installed")
    folder = cache / _FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    call(["apt-get", "download", "nginx"], log, folder=folder)
    package = next(folder.glob("nginx_*.deb"), None)
    if package is None:
        raise PeerError("apt-get gave no package of nginx")
    call(["dpkg-deb", "-x", str(package), str(folder)], log)


def _launch(cache: Path, port: int, backend: Backend) -> Launch:
    folder = backend.folder / f"nginx-{port}"
    folder.mkdir()
    config = folder / "nginx.conf"
    address = backend.url.removeprefix("http://")
    config.write_text(_CONFIG.format(folder=folder, port=port, address=address), encoding="utf-8")
    return Launch((_program(cache) or "nginx", "-p", str(folder), "-c", str(config)))


GATEWAY = Gateway("nginx", "nginx, plain proxy", _build, _launch)
