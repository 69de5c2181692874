"""A connection to a Ray cluster; as a program, `python -m ... ADDRESS` writes down its nodes."""

import json
import logging
import socket
import sys
from typing import Any

_CONNECT_S = 5.0
NAMESPACE = "scalellm"


def connect(address: str) -> Any:
    """The `ray` module, connected to a cluster that runs; never starts one.

    Raises ImportError without Ray, OSError when nobody is there."""
    import ray

    _check_reachable(address)
    ray.init(
        address=address,
        namespace=NAMESPACE,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    return ray


def _check_reachable(address: str) -> None:
    """Ray itself would wait for minutes for an address at which nobody listens."""
    host, sign, port = address.removeprefix("ray://").rpartition(":")
    if not sign:
        return
    if not port.isdigit():
        raise OSError(f"{port!r} is no port")
    socket.create_connection((host.strip("[]"), int(port)), _CONNECT_S).close()


def nodes_of(ray: Any) -> list[dict[str, Any]]:
    """Name, CPUs and GPUs of the nodes that live."""
    return [
        {
            "name": str(node["NodeManagerHostname"]),
            "cpus": float(node["Resources"].get("CPU", 0)),
            "gpus": float(node["Resources"].get("GPU", 0)),
        }
        for node in ray.nodes()
        if node["Alive"]
    ]


def main() -> int:
    try:
        answer: dict[str, Any] = {"nodes": nodes_of(connect(sys.argv[1]))}
    except ImportError:
        answer = {"missing": "ray"}
    except Exception as error:  # Ray raises its own, of several kinds
        answer = {"error": " ".join(str(error).split()) or type(error).__name__}
    sys.stdout.write("\n" + json.dumps(answer) + "\n")
    sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
