"""A root supervisor in a process of its own, with small stand-ins for gateway and engines."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

DEADLINE_S = 20.0

# Answers /health, /ready and /metrics; on SIGTERM it notes the time, "drains" for a while and ends.
GATEWAY = """
import http.server, os, signal, sys, threading, time
folder, port, drain_s = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        metrics = os.path.join(folder, "metrics")
        body = open(metrics, "rb").read() if os.path.exists(metrics) else b""
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *arguments):
        pass
http.server.ThreadingHTTPServer.allow_reuse_address = True
server = http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler)
def note(text):
    with open(os.path.join(folder, "log"), "a") as log:
        log.write(text + "\\n")
def drain(*arguments):
    note("gateway draining")
    threading.Thread(target=finish).start()
def finish():
    time.sleep(drain_s)
    note("gateway ended")
    os._exit(0)
signal.signal(signal.SIGTERM, drain)
note(f"gateway {os.getpid()}")
server.serve_forever()
"""

# Reports phases and readiness like an engine; starts a child that leaves its group and session.
ENGINE = """
import json, os, signal, subprocess, sys
folder, name = sys.argv[1:3]
status = int(sys.argv[sys.argv.index("--status-fd") + 1])
def note(text):
    with open(os.path.join(folder, "log"), "a") as log:
        log.write(text + "\\n")
def stop(*arguments):
    note(f"{name} ended")
    os._exit(0)
signal.signal(signal.SIGTERM, stop)
grandchild = subprocess.Popen(["sleep", "1000"], start_new_session=True)
note(f"{name} {os.getpid()} {grandchild.pid}")
os.write(status, json.dumps({"phase": "load weights", "seconds": 0.1}).encode() + b"\\n")
os.write(status, json.dumps({"ready": True, "dtype": "float32"}).encode() + b"\\n")
while True:
    signal.pause()
"""

ROOT = """
import json, os, sys
from pathlib import Path
from scalellm.controller.child import PYTHON, Command
from scalellm.controller.policy import Limits
from scalellm.controller.report import Report
from scalellm.controller.supervisor import Plan, Supervisor
from scalellm.errors import ServeError
given = json.loads(sys.argv[1])
folder = Path(given["folder"])
plan = Plan(
    url=given["url"], model="stand-in", gateway=Command(tuple(given["gateway"])),
    controller=Command((*PYTHON, "scalellm.controller")),
    engines={name: (f"unix:{folder}/{name}.sock", Command(tuple(command)))
             for name, command in given["engines"].items()},
    limits=Limits(**given["limits"]), drain_timeout_s=given["drain_timeout_s"], stop_timeout_s=2.0,
)
try:
    sys.exit(Supervisor(plan, folder / "runtime", Report()).run())
except ServeError as error:
    print(f"failed: {error}", file=sys.stderr)
    sys.exit(1)
"""


class Tree:
    """One supervised tree and what it has written so far."""

    def __init__(
        self,
        folder: Path,
        *,
        engines: Mapping[str, str] | None = None,
        gateway: str = GATEWAY,
        drain_s: float = 0.0,
        drain_timeout_s: float = 5.0,
        limits: Mapping[str, float] | None = None,
        nohup: bool = False,
    ) -> None:
        self.folder = folder
        (folder / "runtime").mkdir()
        self.port = free_port()
        sources = {"engine-0": ENGINE} if engines is None else engines
        given = {
            "folder": str(folder),
            "url": f"http://127.0.0.1:{self.port}",
            "gateway": [sys.executable, "-c", gateway, str(folder), str(self.port), str(drain_s)],
            "engines": {
                name: [sys.executable, "-c", source, str(folder), name]
                for name, source in sources.items()
            },
            "limits": dict(limits or {}),
            "drain_timeout_s": drain_timeout_s,
        }
        self._errors = (folder / "stderr").open("w+b")
        # Whoever runs the tests may have been started by nohup.
        hang_up = ["nohup"] if nohup else ["env", "--default-signal=HUP"]
        self.process = subprocess.Popen(
            [*hang_up, sys.executable, "-c", ROOT, json.dumps(given)],
            stdout=subprocess.PIPE,
            stderr=self._errors,
            start_new_session=True,
        )

    def wait_ready(self) -> str:
        """The ready line. Fails when the root ends before."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline().decode()
        assert line.startswith("ready "), self.errors()
        return line

    def errors(self) -> str:
        self._errors.seek(0)
        return self._errors.read().decode()

    def log(self) -> list[str]:
        path = self.folder / "log"
        return path.read_text().splitlines() if path.exists() else []

    def pids(self, name: str) -> list[list[int]]:
        """Pids that `name` noted at each of its starts: its own, then its children's."""
        starts = [line.split() for line in self.log() if line.startswith(name + " ")]
        return [[int(word) for word in words[1:]] for words in starts if words[1].isdigit()]

    def controller_pid(self) -> int:
        """The root's child that runs the controller."""
        for pid in children(self.process.pid):
            if b"\0scalellm.controller\0" in command_line(pid):  # a fork of the root has its text
                return pid
        raise AssertionError("no controller")

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def close(self) -> None:
        """End the tree and check that its root leaves nothing."""
        pids = descendants(self.process.pid)
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(DEADLINE_S)
        if self.process.stdout is not None:
            self.process.stdout.close()
        self._errors.close()
        until(lambda: not any(alive(pid) for pid in pids))


def until(condition: Callable[[], object], deadline_s: float = DEADLINE_S) -> None:
    """Wait for a condition of other processes; fails after the deadline."""
    end = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end, "not met in time"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    """Whether the process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""


def children(pid: int) -> list[int]:
    try:
        return [int(w) for w in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []


def descendants(pid: int) -> list[int]:
    found = children(pid)
    for child in list(found):
        found += descendants(child)
    return found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def stopped(pid: int) -> bool:
    return "T" in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
