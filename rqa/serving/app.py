"""The HTTP API: OpenAI's chat completions and embeddings, Search-R1's retrieval, passages, ratings and metrics."""

import asyncio
import base64
import hashlib
import hmac
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route, Router
from starlette.types import Message, Receive, Scope, Send

from rqa.data import Document
from rqa.endpoint.client import Refused
from rqa.endpoint.requests import BadRequest, Question, UnknownModel, known_model, need, number, question, texts
from rqa.evaluation.ratings import Comparison
from rqa.preparation.feedback import Feedback
from rqa.prompts import DoesNotFit, retrieval_query
from rqa.retrieval.citations import cite, passage_of
from rqa.runtime.errors import one_line
from rqa.runtime.text import added, parse_json
from rqa.serving.engine import Busy, Engine, Metrics

log = logging.getLogger(__name__)

STARTED = int(time.time())
LONGEST_BODY, SLOWEST_BODY, MOST_PASSAGES = 2**23, 30, 2**16  # bytes and seconds of a request; of a reply
POLICY = "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; img-src data:; "
POLICY += "style-src 'unsafe-inline'; connect-src 'self'; script-src "
PASSAGE = "<!doctype html><meta charset=utf-8><meta name=viewport content='width=device-width'><title>{title}</title>"
PASSAGE += "<style>:root{{color-scheme:light dark}}body{{max-width:42em;margin:2em auto;padding:0 1em;font:1em/1.5 "
PASSAGE += "serif;white-space:pre-wrap;overflow-wrap:anywhere}}</style><h1>{title}</h1><p>{source}</p><p>{text}</p>"
ERRORS: dict[type[Exception], tuple[int, str | None]] = {
    BadRequest: (400, None), ClientDisconnect: (400, None), DoesNotFit: (400, "context_length_exceeded"),
    UnknownModel: (404, "model_not_found"), Busy: (429, "queue_full"), Refused: (502, "upstream_error"),
}  # fmt: skip


def refusal(error: Exception) -> JSONResponse:
    """An error in OpenAI's format; an internal one is logged, and the client learns nothing about it."""
    status, code = ERRORS.get(type(error), (getattr(error, "status_code", 500), None))
    if status == 500:
        log.error("a request failed", exc_info=error)
    message = "internal error" if status == 500 else getattr(error, "detail", None) or str(error)
    kind = "server_error" if status >= 500 else "rate_limit_error" if status == 429 else "invalid_request_error"
    body = {"message": message, "type": kind, "param": getattr(error, "param", None), "code": code}
    headers = {"Retry-After": "1"} if status == 429 else getattr(error, "headers", None)
    return JSONResponse({"error": body}, status, headers)


class App:
    """The ASGI application: it checks the API key of every request, formats errors, and counts requests."""

    def __init__(self, routes: list[Route], metrics: Metrics, key: str = "", hosts: Sequence[str] = ()) -> None:
        """`hosts` are the accepted names of the server; empty: all."""
        self.router, self.metrics, self.key, self.hosts = Router(routes, redirect_slashes=False), metrics, key, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        status, scope = 0, {**scope, "app": self}  # with an "app", the router raises an exception for unknown paths

        async def send_and_note(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            if scope["path"] != "/health":
                self.admit(Request(scope))
            await self.router(scope, receive, send_and_note)
        except Exception as error:
            response = refusal(error)
            if not status:
                await response(scope, receive, send_and_note)
        handler = getattr(scope.get("endpoint"), "__name__", "none")
        self.metrics[f'rqa_requests_total{{handler="{handler}",status="{status}"}}'] += 1

    def admit(self, request: Request) -> None:
        """Refuse a request without the key, as a Bearer token or as the password of Basic, which browsers ask for."""
        if self.hosts and request.url.hostname not in self.hosts:  # DNS rebinding: another site's name for this machine
            raise HTTPException(421, "Host: not a name of this server; start it with --public_url or --api_key")
        kind, _, given = request.headers.get("authorization", "").encode("latin-1").partition(b" ")
        if kind.lower() == b"basic":
            with suppress(ValueError):
                given = base64.b64decode(given).partition(b":")[2]
        if self.key and not hmac.compare_digest(given.strip(), self.key.encode()):
            scheme = 'Basic realm="rqa"' if "text/html" in request.headers.get("accept", "") else "Bearer"
            problem = "the API key is missing or wrong; send 'Authorization: Bearer KEY'"
            raise HTTPException(401, problem, {"WWW-Authenticate": scheme})


async def body_of(request: Request) -> dict[str, Any]:
    """The JSON object in a request, with a content type that another site's form cannot send."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise HTTPException(415, "Content-Type must be application/json")
    body = bytearray()
    try:
        async with asyncio.timeout(SLOWEST_BODY):  # an endless body would keep a server from stopping
            async for part in request.stream():
                body += part
                if len(body) > LONGEST_BODY:
                    raise HTTPException(413, f"the body is longer than {LONGEST_BODY >> 20} MiB")
        return parse_json(bytes(body))
    except TimeoutError:
        raise HTTPException(408, f"the body did not come within {SLOWEST_BODY} seconds") from None
    except ValueError as error:
        raise HTTPException(400, f"the body must be a JSON object: {one_line(error)}") from None


@dataclass
class Api:
    """The handlers of requests. A name that is None means that there is no reader, or no encoder."""

    engine: Engine
    feedback: Feedback
    k: int = 3  # number of passages for an answer
    reader_name: str | None = None
    encoder_name: str | None = None
    encoder: Any = None
    sources_in_text: bool = False
    public_url: str | None = None  # base of links; None: the request's own

    def routes(self) -> list[Route]:
        gets = {"/v1/models": self.models, "/passages/{name}": self.passage, "/metrics": self.metrics}
        posts = {"/v1/chat/completions": self.chat, "/v1/embeddings": self.embeddings}
        posts |= {"/retrieve": self.retrieve, "/feedback": self.rate}
        routes = [Route(path, handler, methods=["POST"]) for path, handler in posts.items()]
        return [*page_routes("chat"), *(Route(path, handler) for path, handler in gets.items()), *routes]

    async def chat(self, request: Request) -> Response:
        body = await body_of(request)
        known_model(body, self.reader_name)
        asked, base = question(body), str(self.public_url or request.base_url).rstrip("/")
        chunks = self.answer(asked, base)
        about = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": self.reader_name}
        if asked.streams:
            first = await anext(chunks)  # errors up to here get an HTTP status of their own
            events = self.events(about | {"object": "chat.completion.chunk"}, first, chunks, asked.wants_usage)
            headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # nginx would buffer the stream
            return StreamingResponse(events, media_type="text/event-stream", headers=headers)
        whole, message, ended = about | {"object": "chat.completion"}, {"content": ""}, None
        async with aclosing(chunks):
            async for chunk in chunks:
                if await request.is_disconnected():
                    raise ClientDisconnect
                for choice in chunk.pop("choices"):
                    content, ended = message["content"] + choice["delta"].get("content", ""), choice["finish_reason"]
                    message |= choice["delta"] | {"content": content}
                whole |= chunk
        return JSONResponse(whole | {"choices": [{"index": 0, "message": message, "finish_reason": ended}]})

    async def answer(self, asked: Question, base: str) -> AsyncIterator[dict[str, Any]]:
        """Yield the chunks of an answer, without their common fields; the last one has the usage and no choice."""

        def chunk(delta: dict[str, Any], ended: str | None = None, **more: Any) -> dict[str, Any]:
            return {"choices": [{"index": 0, "delta": delta, "finish_reason": ended}]} | more

        with self.engine.admitted():
            began = time.perf_counter()
            (found,) = await self.engine.search([retrieval_query(asked.searched)], asked.k or self.k)
            retrieved, documents, text, shown = time.perf_counter(), [each.document for each in found], "", ""
            links = [{"score": each.score, "rank": each.rank, "url": f"{base}/passages/{each.id}"} for each in found]
            passages = [described(each.id, each.document) | link for each, link in zip(found, links, strict=True)]
            sources = {"citations": [link["url"] for link in links], "rqa": {"passages": passages}}
            async with aclosing(self.engine.reply(asked.read, documents, asked.settings)) as replies:
                reply = await anext(replies)
                yield chunk({"role": "assistant", "content": ""}, **sources)
                async for reply in replies:
                    delta = added(reply.text, text) if asked.streams else ""
                    text, shown = reply.text, shown + delta
                    yield chunk({"content": delta})
        if not asked.streams:  # the final text lacks thoughts whose begin was not marked; deltas might have them
            yield chunk({"content": (shown := reply.text)})
        if self.sources_in_text and passages:
            lines = [f"[{each['rank']}] {one_line(each['title'])}: {each['url']}" for each in passages]
            yield chunk({"content": "\n".join(["\n\nSources:", *lines])})
        cited, length = cite(shown, documents), len(shown)
        uncited = sorted({each.rank for each in found} - {each.number for each in cited})
        links = [
            {"url": passages[n - 1]["url"], "title": passages[n - 1]["title"], "start_index": start, "end_index": end}
            for start, end, n in [*cited, *((length, length, rank) for rank in uncited)]
        ]
        annotations = [{"type": "url_citation", "url_citation": link} for link in links]
        seconds = {"retrieval": retrieved - began, "generation": time.perf_counter() - retrieved}
        sources["rqa"] |= {"cited": [each._asdict() for each in cited], "seconds": seconds}
        yield chunk({"annotations": annotations}, **sources)
        yield chunk({}, reply.ended)
        usage = {"prompt_tokens": reply.prompt_tokens, "completion_tokens": reply.tokens}
        yield {"choices": [], "usage": usage | {"total_tokens": sum(usage.values())}}

    async def events(
        self, about: dict[str, Any], first: dict[str, Any], chunks: AsyncIterator[dict[str, Any]], usage: bool
    ) -> AsyncIterator[str]:
        """Yield chunks as server-sent events; an exception becomes the last event."""
        try:
            async with aclosing(chunks):
                yield f"data: {json.dumps(about | first)}\n\n"
                async for chunk in chunks:
                    if chunk["choices"] or usage:
                        yield f"data: {json.dumps(about | chunk)}\n\n"
            yield "data: [DONE]\n\n"
        except Exception as error:
            self.engine.metrics["rqa_broken_streams_total"] += 1
            yield f"data: {bytes(refusal(error).body).decode()}\n\n"

    async def embeddings(self, request: Request) -> Response:
        body = await body_of(request)
        known_model(body, self.encoder_name)
        asked, kind, form = texts(body, "input"), body.get("input_type"), body.get("encoding_format")
        need(kind in (None, "query", "passage"), "input_type", "query or passage")
        need(form in (None, "float", "base64"), "encoding_format", "float or base64")
        need(body.get("dimensions") in (None, self.encoder.dimension), "dimensions", str(self.encoder.dimension))
        side = self.encoder.passage_side if kind == "passage" else self.encoder
        tokenize = side.tokenize_passages if kind == "passage" else side.tokenize_queries
        with self.engine.admitted():
            ids = await self.engine.in_turn(tokenize, asked)
            rows = await self.engine.in_turn(side.embed, ids)
        shown = [base64.b64encode(r.astype("<f4")).decode() if form == "base64" else r.tolist() for r in rows]
        data = [{"object": "embedding", "index": index, "embedding": value} for index, value in enumerate(shown)]
        usage = dict.fromkeys(("prompt_tokens", "total_tokens"), sum(map(len, ids)))
        return JSONResponse({"object": "list", "data": data, "model": self.encoder_name, "usage": usage})

    async def retrieve(self, request: Request) -> Response:
        """Answer like Search-R1's retrieval server: the first line of a document's `contents` is its title."""
        body = await body_of(request)
        queries = texts(body, "query" if "query" in body else "queries")
        k = number(body, "topk", int, 1, MOST_PASSAGES // len(queries)) or self.k
        with self.engine.admitted():
            rows, result = await self.engine.search(queries, k), []
        for row in rows:
            shown = [described(each.id, each.document) for each in row]
            shown = [each | {"contents": f'"{one_line(each["title"])}"\n{each["text"]}'} for each in shown]
            scored = [{"document": each, "score": found.score} for each, found in zip(shown, row, strict=True)]
            result.append(scored if body.get("return_scores") else shown)
        return JSONResponse({"result": result})

    async def passage(self, request: Request) -> Response:
        name = request.path_params["name"]
        if (document := passage_of(self.engine.retriever.documents, name)) is None:
            raise HTTPException(404, "there is no such passage, or the database has changed")
        shown = described(name, document)
        if request.query_params.get("format") == "json" or "application/json" in request.headers.get("accept", ""):
            return JSONResponse(shown | {"metadata": document.metadata})
        page = PASSAGE.format(**{field: escape(text) for field, text in shown.items()})
        return HTMLResponse(page, headers={"Content-Security-Policy": f"{POLICY}'none'"})

    async def models(self, request: Request) -> Response:
        names = dict.fromkeys(filter(None, (self.reader_name, self.encoder_name)))
        data = [{"id": name, "object": "model", "created": STARTED, "owned_by": "rqa"} for name in names]
        return JSONResponse({"object": "list", "data": data})

    async def rate(self, request: Request) -> Response:
        await asyncio.to_thread(self.feedback.save, await body_of(request))  # the disk may be slow, the file locked
        return JSONResponse({"status": "saved"})

    async def metrics(self, request: Request) -> Response:
        now = {"rqa_requests_running": self.engine.running, "rqa_requests_waiting": self.engine.waiting}
        text = self.engine.metrics.text(now)
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")


def described(name: str, document: Document) -> dict[str, Any]:
    title, source = (str(document.metadata.get(field) or "") for field in ("title", "source"))
    return {"id": name, "title": title or source or name, "source": source, "text": document.page_content}


def page_routes(mode: str) -> list[Route]:
    """Routes of the page, in its mode ("chat" or "compare"), and of the health check."""
    text = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    text = text.replace('<body data-mode="chat">', f'<body data-mode="{mode}">', 1)
    script = text.partition("<script>")[2].partition("</script>")[0]
    own = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()

    async def page(request: Request) -> Response:
        return HTMLResponse(text, headers={"Content-Security-Policy": f"{POLICY}'sha256-{own}'"})

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    return [Route("/", page), Route("/health", health)]


def comparison_routes(comparison: Comparison) -> list[Route]:
    """Routes of the page that compares two systems, and of its requests."""

    async def upcoming(request: Request) -> Response:
        return JSONResponse(comparison.next(request.query_params.get("rater")))

    async def rate(request: Request) -> Response:
        return JSONResponse(await asyncio.to_thread(comparison.rate, await body_of(request)))

    routes = [Route("/compare/next", upcoming), Route("/compare/rate", rate, methods=["POST"])]
    return [*routes, *page_routes("compare")]
