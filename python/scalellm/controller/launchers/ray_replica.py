"""The root's child that stands for one engine in a Ray cluster: Ray's driver.

It reserves a place for all the engine's ranks in one node, has an actor run the engine there, hands
on what the engine reports, and ends as the engine ends. When the node is lost it ends with an
error; the root starts it again, and Ray finds another place.
"""

import argparse
import json
import os
import signal
import sys
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

from scalellm.controller.channel import encode
from scalellm.controller.child import HAND_OVER
from scalellm.controller.launchers.ray_cluster import connect
from scalellm.controller.launchers.ray_engine import RayEngine

_LOOK_S = 1.0
_LISTEN = "listen"  # the engine's phase whose detail is its address


class Replica:
    """One engine, from its reservation to its end."""

    def __init__(self, given: Mapping[str, Any], status_fd: int) -> None:
        self._engine: dict[str, Any] = given["engine"]
        self._deployment = str(given["deployment"])
        self._address_file = Path(given["address_file"])
        self._status_fd = status_fd
        self._status = b""
        self._signals: list[int] = []
        self._ray = connect(str(given["ray_address"]))
        for number in (signal.SIGTERM, signal.SIGINT, HAND_OVER):  # Ray has put its own in place
            signal.signal(number, self._signalled)

    def _signalled(self, number: int, _frame: FrameType | None) -> None:
        self._signals.append(number)

    def run(self) -> int:
        """Returns the engine's exit code, negative for the signal that killed it."""
        self._address_file.unlink(missing_ok=True)
        try:
            group = self._reserve()
            return self._follow(group) if group is not None else 0
        finally:
            self._address_file.unlink(missing_ok=True)
            self._ray.shutdown()

    def _reserve(self) -> Any:
        """A place for all ranks in one node; None when told to end while waiting."""
        from ray.util.placement_group import placement_group

        bundles = self._bundles()
        name = f"{self._deployment}/{self._engine['name']}"
        target = self._least_used(bundles)
        group = placement_group(
            bundles, strategy="STRICT_PACK", name=name, _soft_target_node_id=target
        )
        waited = False
        while not group.wait(_LOOK_S):
            if self._signals:
                return None
            if not waited:
                waited = True
                self._say(f"{self._engine['name']} waits for {bundles} in one node of the cluster")
        return group

    def _bundles(self) -> list[dict[str, float]]:
        """One for each rank; of GPUs one for all, as an actor sees its own bundle's alone."""
        ranks = self._engine["ranks"]
        if self._engine["is_on_gpu"]:
            return [{"CPU": float(ranks), "GPU": float(ranks)}]
        return [{"CPU": self._engine["threads"] / ranks}] * ranks

    def _least_used(self, bundles: list[dict[str, float]]) -> str | None:
        """The node with the fewest engines of this deployment, among those large enough.

        Engines that start at once see none of each other: each begins to look at another node."""
        from ray.util import placement_group_table

        needed = {kind: sum(bundle[kind] for bundle in bundles) for kind in bundles[0]}
        used: Counter[str] = Counter()
        for group in placement_group_table().values():
            if group["name"].startswith(f"{self._deployment}/") and group["state"] == "CREATED":
                used.update({str(node) for node in group["bundles_to_node_id"].values()})
        nodes = sorted(
            str(node["NodeID"])
            for node in self._ray.nodes()
            if node["Alive"]
            and all(node["Resources"].get(kind, 0) >= needed[kind] for kind in needed)
        )
        first = self._engine["number"] % len(nodes) if nodes else 0
        return min(nodes[first:] + nodes[:first], key=lambda node: used[node], default=None)

    def _follow(self, group: Any) -> int:
        from ray.exceptions import RayError
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        bundle = self._bundles()[0]
        actor = (
            self._ray.remote(RayEngine)
            .options(
                num_cpus=bundle["CPU"],
                num_gpus=bundle.get("GPU", 0),
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, 0),
            )
            .remote(self._engine["model"], self._engine["flags"])
        )
        try:
            while True:
                news = self._ray.get(actor.poll.remote())
                self._hand_on(news["status"])
                sys.stderr.buffer.write(news["errors"])
                sys.stderr.flush()
                if "exit_code" in news:
                    return _exit_code(news)
                while self._signals:
                    self._ray.get(actor.signal.remote(self._signals.pop(0)))
        except RayError as error:
            self._say(f"{self._engine['name']} is lost: {str(error).splitlines()[0]}")
            return -signal.SIGKILL  # it did not end by itself: worth another start, however early

    def _hand_on(self, piece: bytes) -> None:
        """The engine's report; its address is known before it says that it is ready."""
        *lines, self._status = (self._status + piece).split(b"\n")
        for line in lines:
            message = json.loads(line)
            if message.get("phase") == _LISTEN:
                part = self._address_file.with_suffix(".part")
                part.write_text(message["detail"] + "\n", encoding="utf-8")
                part.replace(self._address_file)
            with suppress(BrokenPipeError):  # the root goes, and so will this process
                os.write(self._status_fd, encode(message))

    def _say(self, text: str) -> None:
        sys.stderr.write(f"scalellm: {text}\n")
        sys.stderr.flush()


def _exit_code(news: Mapping[str, Any]) -> int:
    killed_by = news["signal_number"]
    return int(news["exit_code"]) if killed_by is None else -int(killed_by)


def main() -> int:
    parser = argparse.ArgumentParser(prog="scalellm.controller.launchers.ray_replica")
    parser.add_argument("--json", required=True)
    parser.add_argument("--status-fd", type=int, required=True)
    arguments = parser.parse_args()
    try:
        replica = Replica(json.loads(arguments.json), arguments.status_fd)
    except (ImportError, OSError) as error:
        sys.stderr.write(f"scalellm: Ray: {error}\n")
        return 1
    code = replica.run()
    if code < 0:  # the root shall see how the engine ended
        with suppress(OSError):
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    return code


if __name__ == "__main__":
    sys.exit(main())
