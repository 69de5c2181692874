"""Many clients that know what each answer has to be."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from ..integration.served import START_S
from .workload import Answer, ask, requests

_AFTER_A_FAULT_S = 0.2  # a client that failed does not fail again at once


@dataclass
class Crowd:
    """Clients that ask one request after the other until told to leave."""

    url: str
    expected: list[Answer]
    streams: int = 64
    forgives: Callable[[Exception], bool] = lambda _: False  # what a fault may do to a client
    model: str = "demo"
    leave: threading.Event = field(default_factory=threading.Event)
    finished: int = 0
    replays: int = 0
    forgiven: int = 0
    wrong: list[str] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _threads: list[threading.Thread] = field(default_factory=list)

    def __enter__(self) -> "Crowd":
        for number in range(self.streams):
            thread = threading.Thread(target=self._client, args=(number,), daemon=True)
            thread.start()
            self._threads.append(thread)
        return self

    def __exit__(self, *_: object) -> None:
        self.leave.set()
        for thread in self._threads:
            thread.join(START_S)
            assert not thread.is_alive(), "a client still waits for its answer"

    def _client(self, number: int) -> None:
        workload = requests(self.model)
        while not self.leave.is_set():
            which = number % len(workload)
            number += 1
            problem, replays, is_forgiven = "", 0, False
            try:
                answer, replays = ask(self.url, workload[which])
                if answer != self.expected[which]:
                    problem = f"{workload[which]}: {_difference(answer, self.expected[which])}"
            except Exception as error:
                is_forgiven = self.forgives(error)
                if is_forgiven:
                    self.leave.wait(_AFTER_A_FAULT_S)
                else:
                    problem = f"{workload[which]}: {type(error).__name__}: {error}"
            with self._lock:
                self.finished += 1
                self.replays += replays
                self.forgiven += is_forgiven
                if problem:
                    self.wrong.append(problem)


def _difference(got: Answer, expected: Answer) -> str:
    for index, choice in expected.choices.items():
        other = got.choices.get(index)
        if other != choice:
            return f"choice {index} is {other}, not {choice}"
    return f"{got} is not {expected}"
