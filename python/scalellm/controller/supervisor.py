"""The root of the process tree: mechanism without policy.

It spawns, reaps and signals; the controller says over a socket which replicas to start again, kill
or give up. The gateway and the controller are the root's own to restart. It runs on one thread:
signals, the controller's socket and the engines' status pipes all wake one selector.

    STARTING --ready--> SERVING --signal--> DRAINING --gateway gone--> STOPPING --all gone--> ENDED
       |                   |                    |                         |                     ^
       |     given up      |                    |     second signal       |                     |
       '-------------------'----------> SIGKILL to all <------------------'---------------------'
"""

import enum
import os
import selectors
import signal
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from scalellm.controller.channel import Lines, encode
from scalellm.controller.child import Child, Command, Ending
from scalellm.controller.policy import Limits
from scalellm.controller.replica import Replica
from scalellm.controller.replicas import Replicas
from scalellm.controller.report import Report
from scalellm.controller.restarted import Restarted
from scalellm.controller.state_file import note_given_up
from scalellm.controller.watchdog import MARK_VARIABLE, Watchdog, kill_marked
from scalellm.errors import ServeError

_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_GATEWAY_GRACE_S = 5.0  # beyond the drain timeout, for the gateway to close its connections
_LEAST_SILENCE_S = 6.0  # a look at a gateway that does not answer takes the controller seconds


@dataclass(frozen=True, slots=True)
class Plan:
    """What the tree consists of."""

    url: str
    model: str  # several with commas between
    gateway: Command
    controller: Command
    engines: Mapping[str, tuple[str, Command]]  # name -> (address, how to start it)
    limits: Limits
    wanted: frozenset[str] | None = None  # the engines to begin with; None: all
    steering: Sequence[Mapping[str, Any]] = ()  # of each model whose engines may change: how
    # Of each engine of the other models: what `/admin/v1/blueprint` shows of its model.
    state_files: Mapping[str, Path] = field(default_factory=dict)
    inner_url: str | None = None  # where the controller asks the gateway; None: at `url`
    drain_timeout_s: float = 30.0
    stop_timeout_s: float = 20.0  # for engines after SIGTERM; unloading a large model takes seconds


class Phase(enum.IntEnum):
    STARTING = 0
    SERVING = 1
    DRAINING = 2
    STOPPING = 3
    ENDED = 4


class Supervisor:
    """Owner of every process of one `serve`."""

    def __init__(self, plan: Plan, folder: Path, report: Report) -> None:
        self._plan = plan
        self._folder = folder
        self._report = report
        self._mark = f"{os.getpid()}-{os.urandom(8).hex()}"
        self._environment = {**os.environ, MARK_VARIABLE: self._mark}
        self._selector = selectors.DefaultSelector()
        self._replicas = Replicas(
            plan.engines, self._environment, self._selector, report, self._send_facts
        )
        if plan.wanted is not None:
            self._replicas.want(plan.engines, plan.wanted, plan.wanted, ())
        self._gateway = Restarted("gateway")
        self._controller = Restarted("controller")
        self._controller_heard_s = 0.0  # it says something with every look
        self._link: socket.socket | None = None
        self._phase = Phase.STARTING
        self._exit_code = 0
        self._deadline_s: float | None = None
        self._failure = ""

    def run(self) -> int:
        """Run the tree until it has ended; returns the exit code.

        Raises ServeError when the deployment could not start or had to be given up. Call it on the
        main thread, before any other thread exists.
        """
        self._watchdog = Watchdog(self._mark, self._folder)
        woken, waking = socket.socketpair()
        woken.setblocking(False)
        waking.setblocking(False)
        handled = [number for number in (*_STOP_SIGNALS, signal.SIGCHLD) if not _unwanted(number)]
        previous = {number: signal.signal(number, _ignore) for number in handled}
        previous_fd = signal.set_wakeup_fd(waking.fileno(), warn_on_full_buffer=False)
        self._selector.register(woken, selectors.EVENT_READ, lambda: self._signals(woken))
        try:
            for replica in self._replicas:
                if replica.wanted:  # a first start is no question, and what takes longest
                    self._replicas.order(replica, "start", "")
            while self._phase is not Phase.ENDED:
                self._timers()
                for key, _ in self._selector.select(self._pause_s()):
                    key.data()
                self._reap()
        finally:
            self._kill_all()
            for child in self._living():
                child.wait(self._plan.stop_timeout_s)
            signal.set_wakeup_fd(previous_fd)
            for number, handler in previous.items():
                signal.signal(number, handler)
            self._close_link()
            self._selector.close()
            woken.close()
            waking.close()
            self._watchdog.close()
        if self._failure:
            raise ServeError(self._failure)
        return self._exit_code

    # ------------------------------------------------------------ time

    def _pause_s(self) -> float | None:
        """Until the next timer; None when nothing is due."""
        due = [self._gateway.due_s, self._controller.due_s, self._deadline_s]
        due.append(self._controller_hung_at_s())
        pending = [at for at in due if at is not None]
        return max(0.0, min(pending) - time.monotonic()) if pending else None

    def _timers(self) -> None:
        now = time.monotonic()
        if self._gateway.due_s is not None and now >= self._gateway.due_s:
            self._gateway.due_s = None
            self._gateway.child = Child("gateway", self._plan.gateway, self._environment)
        if self._controller.due_s is not None and now >= self._controller.due_s:
            self._controller.due_s = None
            self._start_controller()
        hung_at_s = self._controller_hung_at_s()
        if hung_at_s is not None and now >= hung_at_s:
            self._report.event(f"killing the controller: silent for {self._silence_s():.0f} s")
            self._close_link()
            self._kill_controller()
        if self._deadline_s is not None and now >= self._deadline_s:
            self._deadline_s = None
            self._exit_code = 1
            if self._phase is Phase.DRAINING:
                self._report.event("the gateway did not end in time, killing it")
                if self._gateway.child is not None:
                    self._gateway.child.kill_group()
            else:
                self._report.event("an engine did not end in time, killing what is left")
                self._kill_all()

    def _silence_s(self) -> float:
        return time.monotonic() - self._controller_heard_s

    def _controller_hung_at_s(self) -> float | None:
        """When its silence will have lasted too long; None while there is nobody to hear."""
        if self._link is None or self._phase >= Phase.DRAINING:
            return None
        silence_s = max(self._plan.limits.hung_after_s, _LEAST_SILENCE_S)
        return self._controller_heard_s + silence_s

    # ------------------------------------------------------------ signals and endings

    def _signals(self, woken: socket.socket) -> None:
        for number in woken.recv(256):
            if number not in _STOP_SIGNALS:
                continue
            if self._phase >= Phase.DRAINING:
                self._report.event("second signal: stopping at once")
                self._exit_code = 128 + number
                self._kill_all()
                self._phase = Phase.ENDED
            else:
                self._drain(signal.Signals(number).name)

    def _reap(self) -> None:
        for restarted in (self._gateway, self._controller):
            if restarted.child is not None and (ending := restarted.child.poll()):
                self._restarted_ended(restarted, ending)
        ended = self._replicas.reap()
        for replica, ending in ended:
            if self._phase < Phase.DRAINING:
                what = "ended" if replica.wanted else "gave its place up"
                self._report.event(f"{replica.name} {what}: {ending}")
        if self._phase < Phase.STOPPING and self._watchdog.ended():
            self._watchdog = Watchdog(self._mark, self._folder)
        if ended:
            self._send_facts()
        if self._phase is Phase.DRAINING:
            self._replicas.let_go()
            if self._gateway.child is None:
                self._stop()
        if self._phase is Phase.STOPPING and not any(self._living()):
            self._phase = Phase.ENDED

    def _restarted_ended(self, restarted: Restarted, ending: Ending) -> None:
        if restarted is self._controller:
            self._close_link()
        recent = restarted.ended(self._plan.limits)
        if self._phase >= Phase.DRAINING:
            restarted.due_s = None
            return
        self._report.event(f"{restarted.name} ended: {ending}")
        if self._phase is Phase.STARTING and restarted is self._gateway and ending.exit_code:
            self._fail(f"the gateway could not start ({ending})")
        elif recent >= self._plan.limits.crash_limit:
            self._fail(f"the {restarted.name} ended {recent} times in a row ({ending})")

    # ------------------------------------------------------------ the controller's link

    def _start_controller(self) -> None:
        ours, theirs = socket.socketpair()
        command = Command((*self._plan.controller.arguments, "--fd", str(theirs.fileno())))
        self._controller.child = Child("controller", command, self._environment, (theirs.fileno(),))
        theirs.close()
        ours.setblocking(False)
        self._link, self._controller_heard_s = ours, time.monotonic()
        lines = Lines(ours.fileno())
        self._selector.register(ours, selectors.EVENT_READ, lambda: self._orders(lines))
        self._send(
            {
                "type": "plan",
                "url": self._plan.inner_url or self._plan.url,
                "limits": asdict(self._plan.limits),
                "serving": self._phase is Phase.SERVING,
                "addresses": {found.name: found.address for found in self._replicas},
                "steering": self._plan.steering,
            }
        )
        self._send_facts()

    def _close_link(self) -> None:
        if self._link is not None:
            self._selector.unregister(self._link)
            self._link.close()
            self._link = None

    def _send(self, message: dict[str, Any]) -> None:
        if self._link is None:
            return
        encoded = encode(message)
        try:
            whole = self._link.send(encoded) == len(encoded)
        except OSError:
            whole = False
        if not whole:  # it does not read: start another
            self._kill_controller()

    def _kill_controller(self) -> None:
        """Another one follows."""
        if self._controller.child is not None:
            self._controller.child.signal(signal.SIGKILL)

    def _send_facts(self) -> None:
        self._send({"type": "facts", "replicas": self._replicas.facts()})

    def _orders(self, lines: Lines) -> None:
        self._controller_heard_s = time.monotonic()
        for order in lines.read():
            kind = order.get("type")
            if self._phase >= Phase.DRAINING:
                continue
            if kind == "gateway_listening" and self._gateway.child is not None:
                taken_s = time.monotonic() - self._gateway.child.started_s
                self._report.phase("gateway: tokenizer, listen", taken_s, self._plan.url)
            elif kind == "serving" and self._phase is Phase.STARTING:
                self._phase, self._replicas.have_started = Phase.SERVING, True
                told = {"model": self._plan.model} | self._replicas.told()
                self._report.ready(self._plan.url, told)
            elif kind == "kill" and order.get("name") == "gateway":
                if self._gateway.child is not None:
                    self._report.event(f"killing the gateway: {order.get('reason')}")
                    self._gateway.child.signal(signal.SIGKILL)
            elif kind == "want":
                self._report.event(f"blueprint: {order.get('why')}")
                self._replicas.want(order["of"], order["wanted"], order["target"], order["held"])
                self._send_facts()
            elif replica := self._replicas.get(str(order.get("name"))):
                reason = str(order.get("reason", ""))
                if kind == "give_up":
                    self._give_up(replica, reason)
                self._replicas.order(replica, str(kind), reason)
        if lines.closed and self._link is not None:
            self._close_link()

    def _give_up(self, replica: Replica, reason: str) -> None:
        replica.given_up = reason
        self._report.event(f"{replica.name} given up: {reason}")
        if (state_file := self._plan.state_files.get(replica.name)) is not None:
            note_given_up(state_file, replica.name, reason)
        # Those of another shape may take over.
        left = any(not found.given_up for found in self._replicas)
        if self._phase is Phase.STARTING or not left:
            self._fail(f"{replica.name} {reason}")

    # ------------------------------------------------------------ the end

    def _drain(self, why: str) -> None:
        running = self._gateway.child
        serves = self._phase is Phase.SERVING or any(r.ready for r in self._replicas)
        self._phase = Phase.DRAINING
        self._gateway.due_s = self._controller.due_s = None
        what = f"draining for at most {self._plan.drain_timeout_s:g} s" if serves else "stopping"
        self._report.event(f"{why}: {what}")
        self._send({"type": "draining"})
        # A switch that has begun to hand over ends without the controller: requests wait for it.
        self._replicas.give_way()
        if running is not None:
            running.signal(signal.SIGTERM)
            self._deadline_s = time.monotonic() + self._plan.drain_timeout_s + _GATEWAY_GRACE_S

    def _stop(self) -> None:
        self._phase = Phase.STOPPING
        self._deadline_s = time.monotonic() + self._plan.stop_timeout_s
        for child in self._living():
            child.signal(signal.SIGTERM)

    def _fail(self, reason: str) -> None:
        self._failure = reason
        self._exit_code = 1
        self._kill_all()
        self._phase = Phase.ENDED

    def _living(self) -> list[Child]:
        restarted = [self._gateway.child, self._controller.child]
        return [child for child in restarted if child is not None] + self._replicas.living()

    def _kill_all(self) -> None:
        """SIGKILL to every child, its group, and whatever else carries the tree's mark."""
        for child in self._living():
            child.kill_group()
        kill_marked(self._mark)
        self._replicas.forget()


def _unwanted(number: int) -> bool:
    """Whether a hang-up is to be survived, as under nohup."""
    return number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN


def _ignore(number: int, frame: FrameType | None) -> None:
    """A handler that does nothing, so that the signal reaches the wakeup descriptor."""
