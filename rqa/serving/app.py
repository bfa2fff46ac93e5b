"""The HTTP API: OpenAI's chat completions and embeddings, Search-R1's retrieval, passages, ratings and metrics."""

import base64
import hashlib
import hmac
import json
import logging
import re
import socket
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import uvicorn
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route, Router
from starlette.types import Message, Receive, Scope, Send

from rqa.data import Document, Example, Turn
from rqa.endpoint.client import Refused
from rqa.models.encoder import Encoder
from rqa.prompts import DoesNotFit, retrieval_query
from rqa.runtime.errors import UserError, one_line
from rqa.runtime.text import parse_json
from rqa.serving.comparison import Comparison
from rqa.serving.engine import Busy, Engine, Found, Reply, Settings
from rqa.serving.feedback import BadRequest, Feedback, need
from rqa.serving.metrics import Metrics
from rqa.serving.sources import cite, passage_of

log = logging.getLogger(__name__)

LONGEST_BODY = 2**24  # bytes
MOST = {"queries": 4096, "query": 1, "input": 2048, "stop": 4}  # texts in a field
# What would change an answer and is not offered, and the values with which nobody asks for it.
UNSUPPORTED = {
    "n": [1], "tools": [[]], "functions": [[]], "logprobs": [False], "top_logprobs": [0], "logit_bias": [{}],
    "presence_penalty": [0], "frequency_penalty": [0], "response_format": [{"type": "text"}], "modalities": [["text"]],
    "audio": [],
}  # fmt: skip
PASSAGE = "<!doctype html><meta charset=utf-8><meta name=viewport content='width=device-width'><title>{title}</title>"
PASSAGE += "<style>:root{{color-scheme:light dark}}body{{max-width:42em;margin:2em auto;padding:0 1em;font:1em/1.5 "
PASSAGE += "serif;white-space:pre-wrap;overflow-wrap:anywhere}}</style><h1>{title}</h1><p>{source}</p>{text}"
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'; "
POLICY += "frame-ancestors 'none'; connect-src 'self'; script-src "


class Refusal(HTTPException):
    """A request that is not answered: its status, and the fields of OpenAI's error."""

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None, **headers: str
    ) -> None:
        super().__init__(status, message, {name.replace("_", "-"): value for name, value in headers.items()})
        self.param, self.code = param, code


def refusal(error: Exception) -> JSONResponse:
    """What a client is told of an error, as OpenAI's clients read it; a mistake of ours is logged, and not told."""
    match error:
        case BadRequest():
            error = Refusal(400, str(error), error.param)
        case DoesNotFit():
            error = Refusal(400, str(error), "messages", "context_length_exceeded")
        case Busy():
            error = Refusal(429, "Too many requests are waiting; try again", None, "queue_full", Retry_After="1")
        case Refused():
            error = Refusal(502, str(error), None, "upstream_error")
        case ClientDisconnect():
            error = Refusal(400, "The client has left")
        case HTTPException():
            pass
        case _:
            log.error("a request failed: %s", one_line(error), exc_info=error)
            error = Refusal(500, "internal error")
    status = error.status_code
    kind = "server_error" if status >= 500 else "rate_limit_error" if status == 429 else "invalid_request_error"
    told = {"message": error.detail, "type": kind}
    told |= {name: getattr(error, name, None) for name in ("param", "code")}
    return JSONResponse({"error": told}, status, error.headers)


class Guard:
    """The application: around every request the API key, one form of errors, and counts."""

    def __init__(self, routes: Sequence[Route], metrics: Metrics, key: str | None = None) -> None:
        self.router, self.metrics, self.key = Router(routes, redirect_slashes=False), metrics, key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        status, scope = 0, scope | {"app": self}  # with an app, the router raises what it does not find

        async def noting(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            if scope["type"] == "http" and scope["path"] != "/health":
                self.admit(Request(scope))
            await self.router(scope, receive, noting)
        except Exception as error:
            response = refusal(error)
            if not status:
                await response(scope, receive, noting)
        handler = getattr(scope.get("endpoint"), "__name__", "none")
        self.metrics.counts[f'rqa_requests_total{{handler="{handler}",status="{status}"}}'] += 1

    def admit(self, request: Request) -> None:
        """Refuse a request without the key, be it a Bearer's or the password of Basic, which browsers ask for."""
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        if kind.lower() == "basic":
            given = base64.b64decode(given + "==").decode("utf-8", "replace").partition(":")[2]
        if self.key and not hmac.compare_digest(given.strip().encode(), self.key.encode()):
            kind = 'Basic realm="rqa"' if "text/html" in request.headers.get("accept", "") else "Bearer"
            message = "The API key is missing or wrong; send it as Authorization: Bearer KEY"
            raise Refusal(401, message, None, "invalid_api_key", WWW_Authenticate=kind)


async def body_of(request: Request) -> dict[str, Any]:
    """The JSON object that is sent, which another site's form cannot send."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise Refusal(415, "Content-Type must be application/json")
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > LONGEST_BODY:
            raise Refusal(413, f"The body is longer than {LONGEST_BODY >> 20} MiB")
    try:
        return parse_json(bytes(body))
    except ValueError as error:
        raise Refusal(400, f"The body is no JSON object: {one_line(error)}") from None


def number(body: dict[str, Any], name: str, kinds: tuple[type, ...], low: float, high: float) -> Any:
    """A number within bounds; None where it is absent."""
    value = body.get(name)
    fits = value is None or (type(value) in kinds and low <= value <= high)
    need(fits, name, f"{'a number' if float in kinds else 'an integer'} from {low:g} to {high:g}")
    return value


def texts(body: dict[str, Any], name: str) -> list[str]:
    """The text or texts in a field."""
    found = [body[name]] if isinstance(body.get(name), str) else body.get(name)
    fits = isinstance(found, list) and 0 < len(found) <= MOST[name] and all(t and isinstance(t, str) for t in found)
    need(fits, name, f"a text, or a list of 1 to {MOST[name]} texts, none of them empty")
    return found or []


def conversation(body: dict[str, Any]) -> tuple[Example, Example]:
    """The question as it is searched with, and as it is read: instructions stand before the first turn of the user."""
    messages, turns, instructions = body.get("messages"), list[Turn](), list[str]()
    need(isinstance(messages, list), "messages", "a list")
    for place, message in enumerate(messages or ()):
        role = message.get("role") if isinstance(message, dict) else None
        known = role in ("system", "developer", "user", "assistant")
        need(known, f"messages[{place}]", "an object whose role is system, developer, user or assistant")
        content = message.get("content") or ""
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        fits = isinstance(parts, list) and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in parts)
        need(fits, f"messages[{place}].content", "a text, or a list of parts that are texts")
        text = "\n".join(part["text"] for part in parts)
        if role in ("system", "developer"):
            instructions.append(text)
        elif turns and turns[-1].speaker == role:  # chat templates want turns to alternate
            turns[-1] = Turn(role, f"{turns[-1].message}\n\n{text}")
        else:
            turns.append(Turn(role, text))
    asks = bool(turns) and turns[-1].speaker == "user" and bool(turns[-1].message.strip())
    need(asks, "messages", "a conversation that ends with a question of the user")
    searched = Example(turns[-1].message, chat_history=tuple(turns[:-1]))
    first = next(place for place, turn in enumerate(turns) if turn.speaker == "user")
    turns[first] = Turn("user", "\n\n".join([*instructions, turns[first].message]))
    return searched, Example(turns[-1].message, chat_history=tuple(turns[:-1]))


def settings_of(body: dict[str, Any]) -> Settings:
    """How an answer is generated; what is asked for and not offered is refused."""
    for name, harmless in UNSUPPORTED.items():
        need(body.get(name) is None or body[name] in harmless, name, "left out: this server does not support it")
    limits = [number(body, name, (int,), 1, 2**31) for name in ("max_completion_tokens", "max_tokens")]
    temperature, top_p = number(body, "temperature", (int, float), 0, 2), number(body, "top_p", (int, float), 0, 1)
    # Rounded, no temperature makes logits infinite, and requests that are alike share a batch.
    temperature = None if temperature is None else round(temperature, 2)
    top_p = None if top_p is None else max(round(top_p, 2), 0.01)
    return Settings(limits[0] or limits[1], temperature, top_p, tuple(texts(body, "stop")) if body.get("stop") else ())


STARTED = int(time.time())


@dataclass
class Api:
    """Handlers of requests. A name that is None: there is no such model."""

    engine: Engine
    feedback: Feedback
    k: int = 3  # passages of an answer
    reader_name: str | None = None
    encoder_name: str | None = None
    encoder: Encoder | None = None
    sources_in_text: bool = False
    public_url: str | None = None  # of links; by default what the request says

    def routes(self) -> list[Route]:
        posts = {"/v1/chat/completions": self.chat, "/v1/embeddings": self.embeddings, "/retrieve": self.retrieve}
        gets = {"/v1/models": self.models, "/passages/{name}": self.passage, "/metrics": self.metrics}
        routes = [Route(path, handler, methods=["POST"]) for path, handler in (posts | {"/feedback": self.rate}).items()]
        return [*routes, *(Route(path, handler) for path, handler in gets.items()), *common_routes("chat")]

    def check_model(self, body: dict[str, Any], name: str | None) -> None:
        if name is None or body.get("model") not in (None, name):
            asked = one_line(body.get("model"))
            raise Refusal(404, f"The model '{asked}' does not exist here", "model", "model_not_found")

    async def chat(self, request: Request) -> Response:
        body = await body_of(request)
        self.check_model(body, self.reader_name)
        (searched, read), settings = conversation(body), settings_of(body)
        own, options = body.get("rqa") or {}, body.get("stream_options") or {}
        need(isinstance(own, dict), "rqa", "an object")
        need(isinstance(options, dict), "stream_options", "an object")
        need(body.get("stream") in (None, True, False), "stream", "true or false")
        k = number(own, "k", (int,), 1, 100) or self.k
        base = (self.public_url or str(request.base_url)).rstrip("/")
        answering = self._answer(searched, read, settings, k, base)
        about = {"id": f"chatcmpl-{uuid.uuid4().hex}", "object": "chat.completion", "created": int(time.time())}
        about |= {"model": self.reader_name}
        if body.get("stream"):
            first = await anext(answering)  # what is wrong now has a status of its own
            lines = _lines(about | {"object": "chat.completion.chunk"}, first, answering, options.get("include_usage"))
            headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # for nginx
            return StreamingResponse(lines, media_type="text/event-stream", headers=headers)
        async with aclosing(answering):
            async for answer in answering:
                if await request.is_disconnected():
                    raise ClientDisconnect
        message = {"role": "assistant", "content": answer.content, "annotations": answer.annotations}
        choice = {"index": 0, "message": message, "finish_reason": answer.reply.ended, "logprobs": None}
        return JSONResponse(about | {"choices": [choice], "usage": answer.usage} | answer.more)

    async def _answer(
        self, searched: Example, read: Example, settings: Settings, k: int, base: str
    ) -> AsyncIterator["_Answer"]:
        with self.engine.admitted():
            began = time.perf_counter()
            (found,) = await self.engine.search([retrieval_query(searched)], k)
            seconds = {"retrieval": time.perf_counter() - began}
            passages = [described(each, base) for each in found]
            documents = [each.document for each in found]
            async with aclosing(self.engine.reply(read, documents, settings)) as replies:
                async for reply in replies:
                    seconds["generation"] = time.perf_counter() - began - seconds["retrieval"]
                    yield _Answer(reply, passages, documents, seconds, self.sources_in_text)

    async def embeddings(self, request: Request) -> Response:
        body = await body_of(request)
        self.check_model(body, self.encoder_name)
        asked, kind, form = texts(body, "input"), body.get("input_type"), body.get("encoding_format")
        need(kind in (None, "query", "passage"), "input_type", "query or passage")
        need(form in (None, "float", "base64"), "encoding_format", "float or base64")
        need(body.get("dimensions") in (None, self.encoder.dimension), "dimensions", f"{self.encoder.dimension}")
        with self.engine.admitted():
            vectors, tokens = await self.engine.in_turn(embed, self.encoder, asked, kind == "passage")
        shown = [base64.b64encode(v.astype("<f4").tobytes()).decode() if form == "base64" else v.tolist() for v in vectors]
        data = [{"object": "embedding", "index": index, "embedding": value} for index, value in enumerate(shown)]
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return JSONResponse({"object": "list", "data": data, "model": self.encoder_name, "usage": usage})

    async def retrieve(self, request: Request) -> Response:
        """What Search-R1's retrieval server answers, whose documents are `"TITLE"\\nTEXT`."""
        body = await body_of(request)
        queries, k = texts(body, "query" if "query" in body else "queries"), number(body, "topk", (int,), 1, 1000)
        with self.engine.admitted():
            rows = await self.engine.search(queries, k or 3)
        result = []
        for row in rows:
            documents = [described(found, "") for found in row]
            documents = [
                {"id": d["id"], "contents": f'"{one_line(d["title"])}"\n{d["text"]}', "title": d["title"], "text": d["text"]}
                for d in documents
            ]
            scored = [{"document": d, "score": f.score} for d, f in zip(documents, row, strict=True)]
            result.append(scored if body.get("return_scores") else documents)
        return JSONResponse({"result": result})

    async def passage(self, request: Request) -> Response:
        name = request.path_params["name"]
        if (document := passage_of(self.engine.retriever.documents, name)) is None:
            raise Refusal(404, "There is no such passage; the database may have changed", "id", "not_found")
        shown = described(Found(0, 0.0, name, document), "")
        if request.query_params.get("format") == "json" or "application/json" in request.headers.get("accept", ""):
            kept = {name: shown[name] for name in ("id", "title", "source", "text")}
            return JSONResponse(kept | {"metadata": document.metadata})
        page = PASSAGE.format(**{name: escape(str(value)) for name, value in shown.items()})
        return HTMLResponse(page, headers={"Content-Security-Policy": POLICY + "'none'"})

    async def models(self, request: Request) -> Response:
        names = dict.fromkeys(filter(None, (self.reader_name, self.encoder_name)))
        rows = [{"id": name, "object": "model", "created": STARTED, "owned_by": "rqa"} for name in names]
        return JSONResponse({"object": "list", "data": rows})

    async def rate(self, request: Request) -> Response:
        self.feedback.save(await body_of(request))
        return JSONResponse({"status": "saved"})

    async def metrics(self, request: Request) -> Response:
        gauges = {"rqa_requests_running": self.engine.running}
        return PlainTextResponse(self.engine.metrics.text(gauges), media_type="text/plain; version=0.0.4")


class _Answer:
    """An answer as far as it has come, with its sources in the three forms that clients read."""

    def __init__(
        self, reply: Reply, passages: list[dict[str, Any]], documents: list[Document], seconds: dict[str, float],
        listed: bool,
    ) -> None:  # fmt: skip
        self.reply, self.passages = reply, passages
        cited = cite(reply.text, documents) if reply.ended else []
        self.annotations = []
        for start, end, number in cited:
            link = {name: passages[number - 1][name] for name in ("url", "title")}
            self.annotations.append({"type": "url_citation", "url_citation": link | {"start_index": start, "end_index": end}})
        lines = [f"[{each['rank']}] {each['title']}: {each['url']}" for each in passages]
        self.content = reply.text + ("\n\nSources:\n" + "\n".join(lines) if reply.ended and listed and lines else "")
        self.more = {"citations": [each["url"] for each in passages], "rqa": {"passages": passages}}
        if reply.ended:
            self.more["rqa"] |= {"cited": [each._asdict() for each in cited], "seconds": seconds}
        self.usage = {"prompt_tokens": reply.prompt_tokens, "completion_tokens": reply.tokens}
        self.usage["total_tokens"] = reply.prompt_tokens + reply.tokens


async def _lines(
    about: dict[str, Any], answer: _Answer, answering: AsyncIterator[_Answer], usage: Any
) -> AsyncIterator[str]:
    """An answer's events, from its first state on."""

    def event(delta: dict[str, Any] | None, ended: str | None = None, **more: Any) -> str:
        choices = [] if delta is None else [{"index": 0, "delta": delta, "finish_reason": ended}]
        return f"data: {json.dumps(about | {'choices': choices} | more)}\n\n"

    sent = ""
    try:
        yield event({"role": "assistant", "content": ""}, **answer.more)
        async with aclosing(answering):
            while True:
                if answer.content != sent:
                    new = answer.content[len(sent):] if answer.content.startswith(sent) else answer.content
                    sent = answer.content
                    yield event({"content": new})
                if answer.reply.ended:
                    break
                answer = await anext(answering)
        yield event({"annotations": answer.annotations}, **answer.more)
        yield event({}, answer.reply.ended)
        if usage:
            yield event(None, usage=answer.usage)
        yield "data: [DONE]\n\n"
    except Exception as error:
        yield f"data: {refusal(error).body.decode()}\n\n"


def described(found: Found, base: str) -> dict[str, Any]:
    """A passage that was found, as JSON has it."""
    about, text = found.document.metadata, found.document.page_content
    title, source = (str(about.get(name) or "") for name in ("title", "source"))
    shown = {"id": found.id, "title": title or source or found.id, "source": source, "text": text}
    return shown | {"score": found.score, "rank": found.rank, "url": f"{base}/passages/{found.id}"}


def embed(encoder: Encoder, asked: list[str], passages: bool) -> tuple[np.ndarray, int]:
    """Embeddings of questions or passages, and how many tokens these have. [N] -> [N, D]"""
    encoder = encoder.passage_side if passages else encoder
    ids = encoder.tokenize_passages(asked) if passages else encoder.tokenize_queries(asked)
    return encoder.embed(ids), sum(map(len, ids))


def common_routes(mode: str) -> list[Route]:
    """The page, in the mode that it shall have, and whether the server lives."""

    async def page(request: Request) -> Response:
        text = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
        text = text.replace('<body data-mode="chat">', f'<body data-mode="{mode}">', 1)
        scripts = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
        hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
        policy = POLICY + " ".join(f"'sha256-{each}'" for each in hashes)
        return HTMLResponse(text, headers={"Content-Security-Policy": policy})

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    return [Route("/", page), Route("/health", health)]


def comparison_routes(comparison: Comparison) -> list[Route]:
    """The page that compares two systems, and what it asks for."""

    async def upcoming(request: Request) -> Response:
        return JSONResponse(comparison.next(request.query_params.get("rater")))

    async def rate(request: Request) -> Response:
        return JSONResponse(comparison.rate(await body_of(request)))

    routes = [Route("/compare/next", upcoming), Route("/compare/rate", rate, methods=["POST"])]
    return [*routes, *common_routes("compare")]


def bound(host: str, port: int) -> socket.socket:
    """A socket that nobody can connect to yet: a port in use is refused before models are loaded."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        raise UserError(f"--port {port}: cannot listen on {host} ({one_line(error)}); choose another one") from None
    return listener


class _Server(uvicorn.Server):
    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for host, port, *_ in (listener.getsockname() for listener in sockets or ()):
            log.info("listening on http://%s:%d", f"[{host}]" if ":" in host else host, port)


def serve(app: Guard, listener: socket.socket) -> None:
    """Answer until SIGTERM or Ctrl-C; then what runs is finished."""
    config = uvicorn.Config(app, log_config=None, access_log=False, lifespan="off", ws="none", server_header=False)
    _Server(config).run([listener])
