"""A small OpenAI-compatible server over real sockets, whose misbehaviour is chosen request by request."""

import asyncio
import json
import re
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

Json = dict[str, Any]


class Seen(NamedTuple):
    """A request that arrived."""

    path: str
    body: Json
    key: str
    at: float


class OpenAIServer:
    """Repeats what it is asked, unless told otherwise."""

    def __init__(self) -> None:
        self.url = ""  # of the API
        self.seen: list[Seen] = []  # in order of arrival
        self.faults: list[Callable[[], Response] | None] = []  # of the next requests for a completion; None: nothing
        self.models = ["tiny"]
        self.key: str | None = None
        self.delay = 0.0  # seconds that every completion takes
        self.pause = 0.0  # seconds behind each part of a stream
        self.streamed = 0  # parts of streams that were sent
        self.at_once = self.most_at_once = 0  # requests for completions that are in work
        self.say: Callable[[list[Json]], str] = lambda messages: f"You said: {messages[-1]['content']}"
        self.complete: Callable[[Json], Json] = lambda body: {}

    async def answer(self, request: Request) -> Response:
        body = await request.json() if request.method == "POST" else {}
        path = request.url.path.removeprefix("/v1/")
        key = request.headers.get("authorization", "").removeprefix("Bearer ")
        self.seen.append(Seen(path, body, key, time.monotonic()))
        if self.key and key != self.key:
            return error(401, "Incorrect API key provided")
        if path == "models":
            return JSONResponse({"object": "list", "data": [{"id": name} for name in self.models]})
        if body["model"] not in self.models:
            return error(404, f"The model `{body['model']}` does not exist")
        self.at_once += 1
        self.most_at_once = max(self.at_once, self.most_at_once)
        fault = self.faults.pop(0) if self.faults else None
        await asyncio.sleep(self.delay)
        try:
            if fault:
                return await asyncio.to_thread(fault)
            if path == "completions":
                return JSONResponse(await asyncio.to_thread(self.complete, body))
            text = self.say(body["messages"])
            if body.get("stream"):
                return StreamingResponse(self.stream(text), media_type="text/event-stream")
            choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
            return JSONResponse({"choices": [choice], "usage": {"completion_tokens": len(text.split())}})
        finally:
            self.at_once -= 1

    async def stream(self, text: str) -> AsyncIterator[str]:
        """The events of a reply, word by word."""
        words = re.findall(r"\s*\S+", text)
        for number in range(len(words) + 1):
            delta, ended = ({"content": words[number]}, None) if number < len(words) else ({}, "stop")
            yield event({"choices": [{"index": 0, "delta": delta, "finish_reason": ended}]})
            self.streamed += 1
            await asyncio.sleep(self.pause)
        yield event({"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": len(words)}})
        yield "data: [DONE]\n\n"

    def of(self, path: str) -> list[Json]:
        """The bodies of the requests to a path."""
        return [seen.body for seen in self.seen if seen.path == path]

    @property
    def questions(self) -> list[str]:
        """The last message of each conversation so far."""
        return [body["messages"][-1]["content"] for body in self.of("chat/completions")]


def event(value: Json) -> str:
    return f"data: {json.dumps(value)}\n\n"


def error(status: int, message: str, **extra: str) -> JSONResponse:
    headers = {"retry-after": extra.pop("retry_after")} if "retry_after" in extra else None
    return JSONResponse({"error": {"message": message, **extra}}, status, headers)


def half_a_reply() -> Response:
    """The connection is closed in the middle of the body."""

    async def body() -> AsyncIterator[bytes]:
        yield b'{"choices": ['

    return StreamingResponse(body(), headers={"content-length": "1000", "content-type": "application/json"})


@contextmanager
def serving(app: Any) -> Iterator[str]:
    """Serve an application on a free port of loopback, from a thread; its URL."""
    server = uvicorn.Server(uvicorn.Config(app, "127.0.0.1", 0, log_level="critical", lifespan="off"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = server.force_exit = True
        thread.join(10)


@contextmanager
def serve() -> Iterator[OpenAIServer]:
    """Serve one of these."""
    ours = OpenAIServer()
    with serving(Starlette(routes=[Route("/v1/{path:path}", ours.answer, methods=["GET", "POST"])])) as url:
        ours.url = f"{url}/v1"
        yield ours
