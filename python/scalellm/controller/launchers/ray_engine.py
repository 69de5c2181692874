"""The engine's end of a Ray replica: what the actor on some node does."""

import os
import select
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scalellm.controller.child import PYTHON, Child, Command

_POLL_S = 0.25
_READ_BYTES = 1 << 16


class RayEngine:
    """Runs `scalellm engine` on its node. The engine ends with the actor's process, which Ray ends
    with the driver, which ends with the root."""

    def __init__(self, model: str, flags: Sequence[str], host: str = "") -> None:
        """`host`: where it listens; by default the address by which the cluster knows the node."""
        host = host or _own_host()
        self._folder = tempfile.TemporaryDirectory(prefix="scalellm-")
        config = Path(self._folder.name) / "engine.toml"
        config.write_text("", encoding="utf-8")
        status, status_end = os.pipe()
        errors, errors_end = os.pipe()
        own = ("--config", str(config), "--listen", f"{host}:0", "--status-fd", str(status_end))
        command = Command((*PYTHON, "scalellm", "engine", model, *flags, *own))
        environment = {k: v for k, v in os.environ.items() if not k.startswith("SCALELLM_")}
        self._engine = Child("engine", command, environment, (status_end,), stderr=errors_end)
        os.close(status_end)
        os.close(errors_end)
        self._open = {status: "status", errors: "errors"}

    def poll(self) -> dict[str, Any]:
        """What it has reported since; waits a moment for news. The last answer has its ending."""
        news: dict[str, Any] = {"status": b"", "errors": b""}
        for descriptor in select.select(list(self._open), [], [], _POLL_S)[0]:
            piece = os.read(descriptor, _READ_BYTES)
            news[self._open[descriptor]] += piece
            if not piece:
                os.close(descriptor)
                del self._open[descriptor]
        ending = self._engine.poll() if not self._open else None
        if ending is not None:
            news["exit_code"], news["signal_number"] = ending.exit_code, ending.signal_number
        return news

    def signal(self, number: int) -> None:
        self._engine.signal(number)


def _own_host() -> str:
    from ray.util import get_node_ip_address

    host = str(get_node_ip_address())
    return f"[{host}]" if ":" in host else host
