"""The root's replicas: started, signalled and reaped, and what they say of their start."""

import selectors
import signal
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from scalellm.controller.child import GO, HAND_OVER, Child, Command, Ending
from scalellm.controller.replica import Replica
from scalellm.controller.report import Report

_ENDING_SIGNALS = {"hand over": HAND_OVER, "stop": signal.SIGTERM, "kill": signal.SIGKILL}


class Replicas:
    """All that may run, by name. `changed` is called when the facts of one have changed."""

    def __init__(
        self,
        engines: Mapping[str, tuple[str, Command]],
        environment: dict[str, str],
        selector: selectors.BaseSelector,
        report: Report,
        changed: Callable[[], None],
    ) -> None:
        """`engines`: name -> (address, how to start it). Their status pipes wake `selector`."""
        self._all = {name: Replica(name, *found) for name, found in engines.items()}
        self._environment = environment
        self._selector = selector
        self._report = report
        self._changed = changed
        self.have_started = False  # the deployment as a whole: phases of later starts are not told

    def __iter__(self) -> Iterator[Replica]:
        return iter(self._all.values())

    def get(self, name: str) -> Replica | None:
        return self._all.get(name)

    def want(
        self,
        of: Collection[str],
        wanted: Collection[str],
        target: Collection[str],
        held: Collection[str],
    ) -> None:
        """Replicas that are not wanted are not started again; the controller ends them.

        `of` are those that are spoken of, `held` those that stand by until they are let go."""
        for name in of:
            replica = self._all[name]
            replica.wanted, replica.target = name in wanted, name in target
            replica.held = name in held

    def order(self, replica: Replica, kind: str, reason: str) -> None:
        """`start` it, `kill` it, `end` it as `reason` says, or let it `go`, unless it is done."""
        if kind == "start" and replica.child is None and not replica.given_up:
            lines = replica.start(self._environment)
            self._selector.register(
                lines.descriptor, selectors.EVENT_READ, lambda: self._read_status(replica)
            )
        elif kind == "kill" and replica.child is not None:
            self._report.event(f"killing {replica.name}: {reason}")
            replica.child.signal(signal.SIGKILL)
            replica.ready = False
        elif kind == "end" and replica.child is not None:
            replica.child.signal(_ENDING_SIGNALS.get(reason, signal.SIGKILL))
        elif kind == "go" and replica.child is not None and replica.standing_by:
            replica.held = False
            replica.child.signal(GO)
        self._changed()

    def give_way(self) -> None:
        """End those whose place others are to take."""
        for replica in self:
            if not replica.wanted:
                self.order(replica, "end", "stop")

    def let_go(self) -> None:
        """Let those go that stand by, if nobody else has memory that they wait for."""
        if all(replica.target for replica in self if replica.child is not None):
            for replica in self:
                self.order(replica, "go", "")

    def reap(self) -> list[tuple[Replica, Ending]]:
        """Those that have ended since the last time."""
        ended = []
        for replica in self:
            if replica.child is not None and (ending := replica.child.poll()):
                self._read_status(replica)
                self._forget_status(replica)
                replica.ended(ending)
                ended.append((replica, ending))
        return ended

    def living(self) -> list[Child]:
        return [replica.child for replica in self if replica.child is not None]

    def forget(self) -> None:
        """Hear nothing of them any more."""
        for replica in self:
            self._forget_status(replica)

    def facts(self) -> dict[str, Any]:
        """As the controller reads them."""
        return {replica.name: replica.facts() for replica in self}

    def told(self) -> dict[str, Any]:
        """What all that are ready say of themselves alike."""
        infos = [found.info for found in self if found.info]
        first = infos[0] if infos else {}
        alike = {k: v for k, v in first.items() if all(info.get(k) == v for info in infos)}
        return {"replicas": sum(found.wanted for found in self)} | alike

    def _read_status(self, replica: Replica) -> None:
        """Phases of an engine's start, that it stands by, and that it is ready."""
        if replica.status is None:
            return
        for line in replica.status.read():
            if "phase" in line and not self.have_started:
                seconds = float(line.get("seconds", 0.0))
                self._report.phase(
                    f"{replica.name} {line['phase']}", seconds, str(line.get("detail", ""))
                )
            if line.get("standing_by"):
                replica.standing_by = True
                self._changed()
            if line.get("ready"):
                again = " again" if replica.ever_ready else ""
                replica.ready = replica.ever_ready = True
                replica.standing_by = False
                replica.info = {k: v for k, v in line.items() if k != "ready"}
                if self.have_started:
                    self._report.event(f"{replica.name} is ready{again}")
                self._changed()
        if replica.status.closed:
            self._forget_status(replica)

    def _forget_status(self, replica: Replica) -> None:
        if replica.status is not None:
            self._selector.unregister(replica.status.descriptor)
            replica.close_status()
