"""Clients of every kind, many of whom leave, on one deployment: in the end nothing of them is left.

SCALELLM_MIXED_LOAD_S is how long they come (15 s); half an hour makes a thorough run. What was seen
is told with `--log-cli-level=info`.
"""

import http.client
import json
import logging
import os
import random
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from ..e2e.wire import connect, is_at_rest, load, raw_socket
from ..integration.served import START_S, Serve
from ..integration.supervised import children, command_line, until

logger = logging.getLogger(__name__)

MIXED_LOAD_S = float(os.environ.get("SCALELLM_MIXED_LOAD_S", "15"))
CLIENTS = 24
WORDS = ("Once", "upon", "a", "time", "there", "was", "little", "dog", "and", "the", "sun", "shone")
LATE_TASKS = 4
# What an allocator keeps for itself from one third of the run to the next, and, in the first
# minute, the gateway's cache of texts, which fills up to its bound.
SLACK_BYTES = (24 << 20) + (64 << 20 if MIXED_LOAD_S < 60 else 0)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serve]:
    folder = tmp_path_factory.mktemp("serve")
    database = f"sqlite:{folder / 'accounts.db'}"
    made = Serve(folder, "--kv-cache-memory", "64MiB", "--database-url", database)
    yield made
    made.close()


@dataclass
class Client:
    """Does one thing after the other, each on a connection of its own, until told to stop."""

    url: str
    random: random.Random
    stop: threading.Event
    done: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def kinds(self) -> list[Callable[[], None]]:
        left = [self.leave_a_stream, self.leave_before_the_answer]
        broken = [self.half_a_body, self.half_a_head]
        whole = [self.stream, self.whole, self.several, self.wrong_field, self.long_text]
        return [*whole, *left, *broken]

    def run(self) -> None:
        while not self.stop.is_set():
            kind = self.random.choice(self.kinds())
            try:
                kind()
                self.done[kind.__name__] += 1
            except Exception as error:
                self.wrong.append(f"{kind.__name__}: {type(error).__name__}: {error}")

    def text(self, words: int) -> str:
        return " ".join(self.random.choices(WORDS, k=words))

    def body(self, **fields: object) -> str:
        usual = {"model": "demo", "prompt": self.text(self.random.randint(1, 40)), "max_tokens": 12}
        return json.dumps(usual | fields)

    def post(self, body: str, path: str = "/v1/completions") -> http.client.HTTPConnection:
        connection = connect(self.url)
        connection.request("POST", path, body, {"Content-Type": "application/json"})
        return connection

    def answer(self, body: str, path: str = "/v1/completions", status: int = 200) -> bytes:
        connection = self.post(body, path)
        response = connection.getresponse()
        found = response.read()
        connection.close()
        assert response.status == status, (response.status, found[:300])
        return found

    def stream(self) -> None:
        found = self.answer(self.body(stream=True, logprobs=self.random.choice([None, 2])))
        assert found.endswith(b"data: [DONE]\n\n"), found[-300:]

    def leave_a_stream(self) -> None:
        connection = self.post(self.body(stream=True, max_tokens=400, ignore_eos=True))
        response = connection.getresponse()
        for _ in range(self.random.randint(1, 9)):
            response.readline()
        connection.close()

    def whole(self) -> None:
        choices = json.loads(self.answer(self.body(n=self.random.randint(1, 3))))["choices"]
        assert all(choice["finish_reason"] for choice in choices)

    def leave_before_the_answer(self) -> None:
        connection = self.post(self.body(max_tokens=400, ignore_eos=True))
        time.sleep(self.random.uniform(0, 0.3))
        connection.close()

    def several(self) -> None:
        connection = connect(self.url)
        for _ in range(3):
            body = self.body(temperature=0.5, stop=["dog", "."])
            connection.request("POST", "/v1/completions", body)
            response = connection.getresponse()
            assert (response.status, bool(response.read())) == (200, True)
        connection.close()

    def wrong_field(self) -> None:
        self.answer(self.body(temperature=9), status=400)

    def long_text(self) -> None:
        text = self.text(self.random.randint(5000, 15_000))
        found: dict[str, Any] = json.loads(
            self.answer(json.dumps({"model": "demo", "prompt": text}), "/tokenize")
        )
        assert found["count"] == len(found["tokens"]) > 5000

    def half_a_body(self) -> None:
        with raw_socket(self.url) as client:
            head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 999\r\n\r\n"
            client.sendall(head + b"{")

    def half_a_head(self) -> None:
        with raw_socket(self.url) as client:
            client.sendall(b"POST /v1/completions HTTP/1.1\r\nHos")


def process(serve: Serve, command: bytes) -> int:
    (found,) = [p for p in children(serve.process.pid) if command in command_line(p).split(b"\0")]
    return found


def resident_bytes(pid: int) -> int:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def files(pid: int) -> list[str]:
    """What a process has open, but for the database's files: its pool's connections come and go."""
    found = []
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):
            found.append(str(link.readlink()))
    return [name for name in found if "accounts.db" not in name]


def is_quiet(url: str) -> bool:
    """Whether no request is left, nor a connection but the one that asks, nor unwritten usage."""
    found = load(url)
    return is_at_rest(url) and found["connections_open"] == 1 and found["usage_waiting"] == 0


@pytest.mark.timeout(120 + 2 * MIXED_LOAD_S)
def test_clients_that_come_and_leave_leave_nothing_behind(server: Serve) -> None:
    url = server.url
    pids = {name: process(server, name.encode()) for name in ("gateway", "engine")}
    # One of each first: what lives as long as the gateway, as the database's connections, is there.
    first = Client(url, random.Random(-1), threading.Event())
    for kind in first.kinds():
        kind()
    until(lambda: load(url)["usage_written_total"] > 0 and is_quiet(url))
    tasks_before, files_before = load(url)["tasks"], files(pids["gateway"])
    assert_flat(memory_under_load(server, pids))

    until(lambda: is_quiet(url))
    # A few long-lived ones begin seconds after the start; a leak of one kind of client is hundreds.
    until(lambda: load(url)["tasks"] <= tasks_before + LATE_TASKS)
    until(lambda: len(files(pids["gateway"])) <= len(files_before))
    found = load(url)
    assert (found["queued_requests"], found["text_queue"], found["body_memory_bytes"]) == (0, 0, 0)


def assert_flat(memory: dict[str, list[int]]) -> None:
    for name, readings in memory.items():
        third = len(readings) // 3
        middle = statistics.median(readings[third:-third])
        last = statistics.median(readings[-third:])
        logger.info("%s: %.1f MB, then %.1f MB", name, middle / 1e6, last / 1e6)
        assert last <= middle * 1.05 + SLACK_BYTES, (name, middle, last)


def memory_under_load(server: Serve, pids: dict[str, int]) -> dict[str, list[int]]:
    """Resident bytes of the processes, at 60 moments of the load."""
    stop = threading.Event()
    clients = [Client(server.url, random.Random(seed), stop) for seed in range(CLIENTS)]
    threads = [threading.Thread(target=client.run, daemon=True) for client in clients]
    for thread in threads:
        thread.start()
    memory: dict[str, list[int]] = {name: [] for name in pids}
    ends_s = time.monotonic() + MIXED_LOAD_S
    while time.monotonic() < ends_s:
        time.sleep(MIXED_LOAD_S / 60)
        for name, pid in pids.items():
            memory[name].append(resident_bytes(pid))
    stop.set()
    for thread in threads:
        thread.join(START_S)
        assert not thread.is_alive(), "a client still waits for its answer"
    done = sum((client.done for client in clients), Counter[str]())
    logger.info("%s", dict(done))
    wrong = [problem for client in clients for problem in client.wrong]
    assert not wrong, (len(wrong), wrong[0])
    assert len(done) == len(clients[0].kinds()), done
    return memory
