"""A PostgreSQL server of its own, for as long as a test needs one."""

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from pathlib import Path

_FOLDERS = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)


class Postgres:
    """Listens on a free port of 127.0.0.1; `url` lets anybody on this machine in."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="scalellm-postgres-"))
        if (user := _unprivileged()) is not None and os.geteuid() == 0:
            shutil.chown(self._folder, user)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = probe.getsockname()[1]
        self._data = self._folder / "data"
        self._run("initdb", "-D", self._data, "-A", "trust", "-U", "test", "--no-sync")
        self.url = f"postgres://test@127.0.0.1:{self._port}"
        self.start()

    def start(self) -> None:
        options = f"-k {self._folder} -p {self._port} -c listen_addresses=127.0.0.1 -c fsync=off"
        log = self._folder / "log"
        self._run("pg_ctl", "-D", self._data, "-w", "-o", options, "-l", log, "start")

    def stop(self) -> None:
        self._run("pg_ctl", "-D", self._data, "-m", "immediate", "stop")

    def close(self) -> None:
        self.stop()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _run(self, program: str, *arguments: str | Path) -> None:
        found = _program(program)
        assert found is not None
        user = _unprivileged() if os.geteuid() == 0 else None
        done = subprocess.run(
            [found, *map(str, arguments)],
            user=user,
            cwd=self._folder,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr


def _program(name: str) -> str | None:
    for folder in _FOLDERS:
        if (folder / name).is_file():
            return str(folder / name)
    return shutil.which(name)


def _unprivileged() -> str | None:
    try:
        return pwd.getpwnam("postgres").pw_name
    except KeyError:
        return None
