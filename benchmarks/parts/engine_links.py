"""Three ways from a Python front to an engine; each gives a request's ids as they come."""

import asyncio
import itertools
import json
import uuid
from collections.abc import AsyncIterator
from typing import Any, Protocol

import grpc
import httpx
from scalellm.engine.v1 import engine_pb2 as pb
from scalellm.engine.v1 import engine_pb2_grpc as rpc

MODEL = "demo"
# A session acknowledges often enough that its engine need not keep much.
_ACK_EVERY = 32
# A socket's path is no authority that HTTP/2 allows.
_OPTIONS = [("grpc.default_authority", "engine")]


class EngineLink(Protocol):
    def generate(self, ids: list[int], max_tokens: int) -> AsyncIterator[list[int]]: ...


class HttpLink:
    """`engine`: the URL of an endpoint that takes and gives token ids."""

    def __init__(self, engine: str) -> None:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=1024)
        self._client = httpx.AsyncClient(base_url=engine, limits=limits, timeout=None)

    async def generate(self, ids: list[int], max_tokens: int) -> AsyncIterator[list[int]]:
        body = {
            "model": MODEL,
            "prompt": ids,
            "max_tokens": max_tokens,
            "temperature": 0,
            "stream": True,
            "ignore_eos": True,
            "return_token_ids": True,
        }
        async with self._client.stream("POST", "/v1/completions", json=body) as response:
            response.raise_for_status()
            async for line in response.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                for choice in json.loads(line[6:])["choices"]:
                    if choice.get("token_ids"):
                        yield choice["token_ids"]


def _submit(number: int, ids: list[int], max_tokens: int) -> pb.ToEngine:
    return pb.ToEngine(
        submit=pb.Submit(
            request=pb.RequestRef(id=number),
            prompt_tokens=len(ids),
            prompt_ids=ids,
            max_tokens=max_tokens,
            ignore_eos=True,
            sampling=pb.Sampling(temperature=0.0),
        )
    )


def _hello() -> pb.ToEngine:
    return pb.ToEngine(hello=pb.Hello(session_id=uuid.uuid4().hex))


class ConnectionPerRequest:
    """A channel, a session and its goodbye for every request."""

    def __init__(self, engine: str) -> None:
        self._engine = engine

    async def generate(self, ids: list[int], max_tokens: int) -> AsyncIterator[list[int]]:
        # Channels of one process share connections unless told otherwise.
        options = [*_OPTIONS, ("grpc.use_local_subchannel_pool", 1)]
        async with grpc.aio.insecure_channel(self._engine, options=options) as channel:
            session = rpc.EngineStub(channel).Session()
            await session.write(_hello())
            await session.write(_submit(1, ids, max_tokens))
            async for frame in session:
                for output in frame.outputs:
                    yield list(output.token_ids)
                    if output.finish_reason:
                        await session.done_writing()
                        return


class SharedSession:
    """One session; a task reads its frames and hands each output to its request's queue."""

    def __init__(self, engine: str) -> None:
        self._engine = engine
        self._numbers = itertools.count(1)
        self._queues: dict[int, asyncio.Queue[Any]] = {}
        self._session: Any = None
        self._reader: asyncio.Task[None] | None = None
        self._opening = asyncio.Lock()
        self._writing = asyncio.Lock()  # a stream takes one write at a time

    async def generate(self, ids: list[int], max_tokens: int) -> AsyncIterator[list[int]]:
        await self._open()
        number = next(self._numbers)
        queue: asyncio.Queue[Any] = asyncio.Queue(max_tokens)
        self._queues[number] = queue
        try:
            await self._write(_submit(number, ids, max_tokens))
            while True:
                output = await queue.get()
                yield list(output.token_ids)
                if output.finish_reason:
                    return
        finally:
            del self._queues[number]

    async def _open(self) -> None:
        async with self._opening:
            if self._session is None:
                channel = grpc.aio.insecure_channel(self._engine, options=_OPTIONS)
                self._session = rpc.EngineStub(channel).Session()
                await self._session.write(_hello())
                self._reader = asyncio.create_task(self._read())

    async def _read(self) -> None:
        async for frame in self._session:
            for output in frame.outputs:
                queue = self._queues.get(output.request.id)
                if queue is not None:
                    queue.put_nowait(output)
            if frame.sequence and frame.sequence % _ACK_EVERY == 0:
                await self._write(pb.ToEngine(ack=pb.Ack(sequence=frame.sequence)))

    async def _write(self, message: pb.ToEngine) -> None:
        async with self._writing:
            await self._session.write(message)


LINKS = {"http": HttpLink, "request": ConnectionPerRequest, "pool": SharedSession}
