"""An OpenAI-compatible front as such endpoints are usually written: FastAPI, pydantic, one process.

    python fastapi_front.py --port P --link http|request|pool --engine ADDRESS --tokenizer FILE

Runs in an environment of its own. The link to the engine:

http      HTTP/1.1 to the engine's own endpoint: httpx, connections kept alive, chunks as SSE
request   gRPC, a connection and a session for each request
pool      gRPC, one session that all requests share
"""

import argparse
import json
import time
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import uvicorn
from engine_links import LINKS, EngineLink
from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from pydantic import BaseModel
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

MODEL = "demo"


class StreamOptions(BaseModel):
    include_usage: bool = False


class CompletionRequest(BaseModel):
    model: str
    prompt: str
    max_tokens: int = 16
    temperature: float = 1.0
    stream: bool = False
    stream_options: StreamOptions | None = None
    ignore_eos: bool = False


class TokenizeRequest(BaseModel):
    model: str | None = None
    prompt: str


def application(link: EngineLink, tokenizer: Tokenizer) -> FastAPI:
    app = FastAPI()

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": MODEL, "object": "model", "owned_by": "parts"}]}

    @app.post("/tokenize")
    async def tokenize(request: TokenizeRequest) -> dict[str, Any]:
        return {"tokens": tokenizer.encode(request.prompt).ids}

    @app.post("/v1/completions")
    async def completions(request: CompletionRequest) -> StreamingResponse:
        return StreamingResponse(events(request), media_type="text/event-stream")

    async def events(request: CompletionRequest) -> AsyncIterator[str]:
        ids = tokenizer.encode(request.prompt).ids
        answer = f"cmpl-{uuid.uuid4().hex}"
        decode = DecodeStream(skip_special_tokens=True)
        given = 0
        async for token_ids in link.generate(ids, request.max_tokens):
            text = "".join(decode.step(tokenizer, token) or "" for token in token_ids)
            given += len(token_ids)
            last = given >= request.max_tokens
            choice = {"index": 0, "text": text, "finish_reason": "length" if last else None}
            yield chunk(answer, [choice], None)
        if request.stream_options is not None and request.stream_options.include_usage:
            usage = {"prompt_tokens": len(ids), "completion_tokens": given}
            yield chunk(answer, [], usage | {"total_tokens": len(ids) + given})
        yield "data: [DONE]\n\n"

    def chunk(answer: str, choices: list[dict[str, Any]], usage: dict[str, int] | None) -> str:
        body = {
            "id": answer,
            "object": "text_completion",
            "created": int(time.time()),
            "model": MODEL,
            "choices": choices,
            "usage": usage,
        }
        return f"data: {json.dumps(body)}\n\n"

    return app


def main() -> None:
    parser = argparse.ArgumentParser(description="A front of FastAPI.")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--link", choices=sorted(LINKS), required=True)
    parser.add_argument("--engine", required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    options = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(options.tokenizer))
    app = application(LINKS[options.link](options.engine), tokenizer)
    uvicorn.run(app, host="127.0.0.1", port=options.port, log_level="warning", access_log=False)


if __name__ == "__main__":
    main()
