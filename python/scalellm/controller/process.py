"""The controller's process: joins the root's facts with the gateway's and sends orders back.

It keeps nothing that it could not be told again: the root sends all facts when it connects and
after every change, so that a controller that crashed goes on where the last one was.
"""

import argparse
import select
import signal
import socket
import time
from typing import Any

from scalellm.controller.channel import Lines, encode
from scalellm.controller.gateway_view import Sample, get, parse_metrics, replica_states
from scalellm.controller.policy import Exit, Facts, GiveUp, Kill, Leave, Limits, Start, decide
from scalellm.controller.steering import Steering

_START_PAUSE_S = 0.1  # between looks while something is starting or waiting
_PAUSE_S = 2.0  # between looks while all is well
_RESPONSIVE = ("ready", "draining")  # states in the gateway's metrics


class Controller:
    """Decides about every wanted replica each time there is news, and now and then without."""

    def __init__(self, link: socket.socket, plan: dict[str, Any]) -> None:
        self._link = link
        self._url = str(plan["url"])
        self._limits = Limits(**plan["limits"])
        self._addresses: dict[str, str] = plan["addresses"]
        self._serving = bool(plan["serving"])
        self._gateway_heard = self._serving
        self._gateway_heard_s = time.monotonic()
        self._missed_since_s: dict[str, float] = {}  # ready replicas the gateway does not hear
        self._facts: dict[str, dict[str, Any]] = {}
        self._facts_s = time.monotonic()
        self._ordered: set[str] = set()  # replicas with an order since the last facts
        self._draining = False
        self._states: dict[str, str] = {}  # of replicas by name, as the gateway sees them
        self._samples: list[Sample] = []
        self._steering = [Steering(found, self._order) for found in plan["steering"]]

    def take(self, message: dict[str, Any]) -> None:
        """One message from the root."""
        if message.get("type") == "facts":
            self._facts = message["replicas"]
            self._facts_s = time.monotonic()
            self._ordered.clear()
        elif message.get("type") == "draining":
            self._draining = True

    def look(self) -> None:
        """Ask the gateway, then decide about each replica."""
        self._order({"type": "alive"})
        if self._draining:
            return
        self._look_at_gateway()
        for name, found in self._facts.items():
            if name in self._ordered or not found["wanted"]:
                continue
            decision = decide(self._facts_of(name), self._limits)
            match decision:
                case Leave():
                    continue
                case Start():
                    self._order({"type": "start", "name": name})
                case Kill(reason):
                    self._order({"type": "kill", "name": name, "reason": reason})
                case GiveUp(reason):
                    self._order({"type": "give_up", "name": name, "reason": reason})
            self._ordered.add(name)
        if self._serving and self._states:
            for steering in self._steering:
                steering.look(self._facts, self._states, self._samples)

    def pause_s(self) -> float:
        """How long to wait for news."""
        settled = self._serving and all(
            found["ready"] or found["given_up"] for found in self._wanted()
        )
        if not settled:
            return _START_PAUSE_S
        return min((steering.pause_s() for steering in self._steering), default=_PAUSE_S)

    def _wanted(self) -> list[dict[str, Any]]:
        return [found for found in self._facts.values() if found["wanted"]]

    def _facts_of(self, name: str) -> Facts:
        """The root's facts, aged to now, with the gateway's view of the replica."""
        found = self._facts[name]
        now = time.monotonic()
        elapsed_s = now - self._facts_s
        return Facts(
            running=found["running"],
            ready=found["ready"],
            age_s=found["age_s"] + elapsed_s,
            ever_ready=found["ever_ready"],
            given_up=bool(found["given_up"]),
            unresponsive_s=now - self._missed_since_s.get(name, now),
            exits=tuple(
                Exit(
                    ago_s=ended["ago_s"] + elapsed_s,
                    by_itself=ended["by_itself"],
                    how=ended["how"],
                )
                for ended in found["exits"]
            ),
        )

    def _look_at_gateway(self) -> None:
        now = time.monotonic()
        all_ready = all(found["ready"] for found in self._wanted())
        if self._gateway_heard and not self._serving and not all_ready:
            return
        answer = get(self._url, "/metrics" if self._serving else "/health")
        if answer is None:
            self._missed_since_s.clear()  # it is the gateway that is not there
            if now - self._gateway_heard_s > self._limits.hung_after_s and self._gateway_heard:
                reason = f"no answer for {now - self._gateway_heard_s:.0f} s"
                self._order({"type": "kill", "name": "gateway", "reason": reason})
                self._gateway_heard_s = now
            return
        self._gateway_heard_s = now
        if not self._gateway_heard:
            self._gateway_heard = True
            self._order({"type": "gateway_listening"})
        if self._serving:
            self._samples = parse_metrics(answer.body)
            states = replica_states(self._samples)
            self._states = {
                name: states.get(address, "") for name, address in self._addresses.items()
            }
            self._note_states(states)
        elif all_ready:
            ready = get(self._url, "/ready")
            if ready is not None and ready.status == 200:
                self._serving = True
                self._order({"type": "serving"})

    def _note_states(self, states: dict[str, str]) -> None:
        """Remember since when the gateway has had no sign of life from a replica.

        It judges by the age of the loop's last step and by silence on the link; how long that has
        lasted is counted here.
        """
        now = time.monotonic()
        for name, found in self._facts.items():
            if not found["ready"] or states.get(self._addresses[name], "ready") in _RESPONSIVE:
                self._missed_since_s.pop(name, None)
            else:
                self._missed_since_s.setdefault(name, now)

    def _order(self, message: dict[str, Any]) -> None:
        self._link.sendall(encode(message))


def main(arguments: list[str] | None = None) -> int:
    """Run until the root closes the link."""
    parser = argparse.ArgumentParser(prog="scalellm.controller")
    parser.add_argument("--fd", type=int, required=True, help="socket to the root")
    link = socket.socket(fileno=parser.parse_args(arguments).fd)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    lines = Lines(link.fileno())
    controller: Controller | None = None
    try:
        while True:
            pause_s = controller.pause_s() if controller else None
            if select.select([link], [], [], pause_s)[0]:
                link.setblocking(False)
                messages = lines.read()
                link.setblocking(True)
                for message in messages:
                    if message.get("type") == "plan":
                        controller = Controller(link, message)
                    elif controller is not None:
                        controller.take(message)
                if lines.closed:
                    return 0
            if controller is not None:
                controller.look()
    except (BrokenPipeError, ConnectionResetError):
        return 0
