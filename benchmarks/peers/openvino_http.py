"""A minimal OpenAI-compatible front around OpenVINO GenAI's ContinuousBatchingPipeline.

    python openvino_http.py MODEL PORT [PROPERTIES_JSON]

Ours, not Intel's: their own front (OpenVINO Model Server) is no Python package. It runs in the
peer's environment and does as little as such a front can, so that what is measured is the pipeline:
one task steps it for as long as requests are open, and each step's new tokens go out as one chunk a
request. Prompts are texts or lists of token ids.
"""

import asyncio
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import openvino
from aiohttp import web
from openvino_genai import (
    ContinuousBatchingPipeline,
    GenerationConfig,
    GenerationFinishReason,
    SchedulerConfig,
)

_KV_CACHE_GIB = 2
_MAX_BODY_BYTES = 16 << 20
_HEADERS = {"Content-Type": "text/event-stream", "Cache-Control": "no-cache"}
_MODEL = "peer"
# A queue's last item: the answer is complete.
_END: list[int] = []


@dataclass(slots=True)
class _Stream:
    """One open request: the pipeline's handle, and its tokens step by step."""

    handle: Any
    steps: "asyncio.Queue[list[int]]" = field(default_factory=asyncio.Queue)


class Front:
    """The pipeline and the requests in it; everything but `step` runs on the event loop."""

    def __init__(self, model: str, properties: Mapping[str, Any]) -> None:
        scheduler = SchedulerConfig()
        scheduler.cache_size = _KV_CACHE_GIB
        self._pipeline = ContinuousBatchingPipeline(model, scheduler, "CPU", dict(properties), {})
        self._tokenizer = self._pipeline.get_tokenizer()
        self._streams: dict[int, _Stream] = {}
        self._last_id = 0
        self._work = asyncio.Event()

    async def step_forever(self) -> None:
        """Step while there are requests. New ones join between two steps."""
        loop = asyncio.get_running_loop()
        while True:
            await self._work.wait()
            await loop.run_in_executor(None, self._pipeline.step)
            for number, stream in list(self._streams.items()):
                ended = False
                while stream.handle.can_read():
                    (output,) = stream.handle.read().values()
                    stream.steps.put_nowait(list(output.generated_ids))
                    ended = output.finish_reason != GenerationFinishReason.NONE
                if ended:
                    stream.steps.put_nowait(_END)
                    del self._streams[number]
            if not self._streams:
                self._work.clear()

    def _submit(self, body: Mapping[str, Any]) -> tuple[_Stream, int]:
        prompt = body["prompt"]
        ids = (
            self._tokenizer.encode(prompt).input_ids
            if isinstance(prompt, str)
            else openvino.Tensor(np.array([prompt], dtype=np.int64))
        )
        config = GenerationConfig()
        config.max_new_tokens = int(body.get("max_tokens", 16))
        config.ignore_eos = bool(body.get("ignore_eos", False))
        config.do_sample = False
        self._last_id += 1
        stream = _Stream(self._pipeline.add_request(self._last_id, ids, config))
        self._streams[self._last_id] = stream
        self._work.set()
        return stream, ids.shape[1]

    async def completions(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        stream, prompt_tokens = self._submit(body)
        response = web.StreamResponse(headers=_HEADERS)
        ids: list[int] = []
        try:
            if body.get("stream"):
                await response.prepare(request)
            while (new := await stream.steps.get()) is not _END:
                ids += new
                if body.get("stream"):
                    await response.write(_event(self._tokenizer.decode(new), None))
        except (ConnectionResetError, asyncio.CancelledError):
            stream.handle.cancel()
            raise
        usage = {"prompt_tokens": prompt_tokens, "completion_tokens": len(ids)}
        if not body.get("stream"):
            return web.json_response(_completion(self._tokenizer.decode(ids), "length", usage))
        await response.write(_event("", "length", usage) + b"data: [DONE]\n\n")
        await response.write_eof()
        return response


def _completion(
    text: str, finish_reason: str | None, usage: Mapping[str, int] | None
) -> dict[str, Any]:
    choice = {"index": 0, "text": text, "finish_reason": finish_reason}
    return {"object": "text_completion", "model": _MODEL, "choices": [choice], "usage": usage}


def _event(text: str, finish_reason: str | None, usage: Mapping[str, int] | None = None) -> bytes:
    return f"data: {json.dumps(_completion(text, finish_reason, usage))}\n\n".encode()


async def _models(_: web.Request) -> web.Response:
    return web.json_response({"object": "list", "data": [{"id": _MODEL, "object": "model"}]})


def main() -> None:
    model, port, properties = sys.argv[1], int(sys.argv[2]), json.loads((sys.argv[3:] or ["{}"])[0])
    front = Front(model, properties)
    application = web.Application(client_max_size=_MAX_BODY_BYTES)
    application.router.add_get("/v1/models", _models)
    application.router.add_post("/v1/completions", front.completions)

    async def stepping(_: web.Application) -> "Any":
        task = asyncio.create_task(front.step_forever())
        yield
        task.cancel()

    application.cleanup_ctx.append(stepping)
    web.run_app(application, host="127.0.0.1", port=port, access_log=None, print=None)


if __name__ == "__main__":
    main()
