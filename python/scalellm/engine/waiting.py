"""Queues of requests by a key of order, from which any request can leave at any time.

Leaving is lazy: the entry stays in the heap and is skipped when it comes up. Stale entries never
outnumber the live ones by more than `_SLACK`, so memory follows what is really queued.
"""

import heapq
from collections.abc import Iterator

from scalellm.engine.request import Request

_SLACK = 64


class WaitingQueue:
    """Requests to be admitted, by `Request.order`."""

    def __init__(self) -> None:
        self._heap: list[tuple[int, bool, int, int]] = []
        self._requests: dict[int, Request] = {}
        self.num_tokens = 0  # of the queued requests, to be computed: not cached when they came

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._requests.values())

    def push(self, request: Request) -> None:
        self._requests[request.key] = request
        self.num_tokens += request.uncached_tokens
        heapq.heappush(self._heap, request.order)

    def peek(self) -> Request | None:
        while self._heap:
            request = self._requests.get(self._heap[0][-1])
            if request is not None:
                return request
            heapq.heappop(self._heap)
        return None

    def discard(self, request: Request) -> None:
        """Take a request out wherever it stands; nothing happens if it is not queued."""
        if self._requests.pop(request.key, None) is None:
            return
        self.num_tokens -= request.uncached_tokens
        if self._heap[0][-1] == request.key:
            heapq.heappop(self._heap)
        elif len(self._heap) > 2 * len(self._requests) + _SLACK:
            self._heap = [queued.order for queued in self._requests.values()]
            heapq.heapify(self._heap)


class Deadlines:
    """Requests that end by themselves at a time."""

    def __init__(self) -> None:
        self._heap: list[tuple[int, int]] = []
        self._requests: dict[int, Request] = {}

    def add(self, request: Request) -> None:
        if request.deadline_us is not None:
            self._requests[request.key] = request
            heapq.heappush(self._heap, (request.deadline_us, request.key))

    def discard(self, request: Request) -> None:
        if self._requests.pop(request.key, None) is None:
            return
        if len(self._heap) > 2 * len(self._requests) + _SLACK:
            self._heap = [(at, key) for at, key in self._heap if key in self._requests]
            heapq.heapify(self._heap)

    def take_passed(self, now_us: int) -> list[Request]:
        """Remove and return those whose time has come, earliest first."""
        passed: list[Request] = []
        while self._heap and self._heap[0][0] <= now_us:
            _, key = heapq.heappop(self._heap)
            request = self._requests.pop(key, None)
            if request is not None:
                passed.append(request)
        return passed
