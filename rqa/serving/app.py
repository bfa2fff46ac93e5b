"""The HTTP API: OpenAI's chat completions and embeddings, Search-R1's retrieval, passages, ratings and metrics."""

import base64
import hashlib
import hmac
import json
import logging
import re
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

from rqa.data import Example, Turn
from rqa.endpoint.client import Refused
from rqa.prompts import DoesNotFit, retrieval_query
from rqa.runtime.errors import UserError, one_line
from rqa.runtime.text import parse_json
from rqa.serving.comparison import Comparison
from rqa.serving.engine import Busy, Engine, Found, Settings
from rqa.serving.feedback import BadRequest, Feedback
from rqa.serving.metrics import Metrics
from rqa.serving.sources import cite, passage_of

log = logging.getLogger(__name__)

STARTED = int(time.time())
ROLES = ("system", "developer", "user", "assistant")
LONGEST_BODY, MOST_TEXTS = 2**24, 4096  # bytes, and texts in a field
# What would change an answer and is not offered, and the values with which nobody asks for it.
UNSUPPORTED = {"n": [1], "tools": [[]], "functions": [[]], "logprobs": [False], "top_logprobs": [0], "audio": [],
               "logit_bias": [{}], "presence_penalty": [0], "frequency_penalty": [0], "modalities": [["text"]],
               "response_format": [{"type": "text"}]}  # fmt: skip
POLICY = "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; img-src data:; "
POLICY += "style-src 'unsafe-inline'; connect-src 'self'; script-src "
PASSAGE = "<!doctype html><meta charset=utf-8><meta name=viewport content='width=device-width'><title>{title}</title>"
PASSAGE += "<style>:root{{color-scheme:light dark}}body{{max-width:42em;margin:2em auto;padding:0 1em;font:1em/1.5 "
PASSAGE += "serif;white-space:pre-wrap;overflow-wrap:anywhere}}</style><h1>{title}</h1><p>{source}</p><p>{text}</p>"


class UnknownModel(UserError):
    """A name that is no model's here."""

    param = "model"


ERRORS: dict[type[Exception], tuple[int, str | None]] = {
    BadRequest: (400, None), ClientDisconnect: (400, None), DoesNotFit: (400, "context_length_exceeded"),
    UnknownModel: (404, "model_not_found"), Busy: (429, "queue_full"), Refused: (502, "upstream_error"),
}  # fmt: skip


def refusal(error: Exception) -> JSONResponse:
    """An error as OpenAI's clients read it; a mistake of ours is logged, and a client told no more than that."""
    status, code = ERRORS.get(type(error), (getattr(error, "status_code", 500), None))
    if status == 500:
        log.error("a request failed", exc_info=error)
    said = "internal error" if status == 500 else getattr(error, "detail", None) or str(error)
    kind = "server_error" if status >= 500 else "rate_limit_error" if status == 429 else "invalid_request_error"
    told = {"message": said, "type": kind, "param": getattr(error, "param", None), "code": code}
    headers = {"Retry-After": "1"} if status == 429 else getattr(error, "headers", None)
    return JSONResponse({"error": told}, status, headers)


class App:
    """Around every request: the API key, one form of errors, and counts."""

    def __init__(self, routes: Sequence[Route], metrics: Metrics, key: str | None = None) -> None:
        self.router, self.metrics, self.key = Router(routes, redirect_slashes=False), metrics, key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        status, scope = 0, {**scope, "app": self}  # with an app, the router raises what it does not find

        async def noting(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            if scope["path"] != "/health":
                self.admit(Request(scope))
            await self.router(scope, receive, noting)
        except Exception as error:
            response = refusal(error)
            if not status:
                await response(scope, receive, noting)
        handler = getattr(scope.get("endpoint"), "__name__", "none")
        self.metrics.counts[f'rqa_requests_total{{handler="{handler}",status="{status}"}}'] += 1

    def admit(self, request: Request) -> None:
        """Refuse a request without the key: a Bearer's, or the password of Basic, for which browsers ask their user."""
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        if kind.lower() == "basic":
            with suppress(ValueError):
                given = base64.b64decode(given).decode().partition(":")[2]
        if self.key and not hmac.compare_digest(given.strip().encode(), self.key.encode()):
            wanted = 'Basic realm="rqa"' if "text/html" in request.headers.get("accept", "") else "Bearer"
            told = "the API key is missing or wrong; send 'Authorization: Bearer KEY'"
            raise HTTPException(401, told, {"WWW-Authenticate": wanted})


async def body_of(request: Request) -> dict[str, Any]:
    """The JSON object that is sent, of a type that a form of another site cannot send."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise HTTPException(415, "Content-Type must be application/json")
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > LONGEST_BODY:
            raise HTTPException(413, f"the body is longer than {LONGEST_BODY >> 20} MiB")
    try:
        return parse_json(bytes(body))
    except ValueError as error:
        raise HTTPException(400, f"the body must be a JSON object: {one_line(error)}") from None


def need(right: bool, param: str, expected: str) -> None:
    if not right:
        raise BadRequest(f"'{param}' must be {expected}", param)


def number(body: dict[str, Any], name: str, kind: type, low: float, high: float) -> Any:
    """A number within bounds; None where it is absent."""
    fits = body.get(name) is None or (type(body[name]) in (int, kind) and low <= body[name] <= high)
    need(fits, name, f"{'an integer' if kind is int else 'a number'} from {low} to {high}")
    return body.get(name)


def texts(body: dict[str, Any], name: str) -> list[str]:
    """The text or texts in a field."""
    found = [body[name]] if isinstance(body.get(name), str) else body.get(name)
    fits = isinstance(found, list) and 0 < len(found) <= MOST_TEXTS and all(t and isinstance(t, str) for t in found)
    need(fits, name, f"a text, or a list of 1 to {MOST_TEXTS} texts; none may be empty")
    return found or []


def conversation(messages: Any) -> tuple[Example, Example]:
    """The question as it is searched with, and as it is read: instructions stand before the first turn of the user."""
    turns, instructions = list[Turn](), list[str]()
    need(isinstance(messages, list) and all(isinstance(m, dict) for m in messages), "messages", "a list of objects")
    for place, message in enumerate(messages):
        role, parts = message.get("role"), message.get("content") or ""
        need(role in ROLES, f"messages[{place}].role", ", ".join(ROLES[:-1]) + f" or {ROLES[-1]}")
        parts = [{"text": parts}] if isinstance(parts, str) else parts
        fits = isinstance(parts, list) and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in parts)
        need(fits, f"messages[{place}].content", "a text, or a list of texts")
        text = "\n".join(part["text"] for part in parts)
        if role in ROLES[:2]:
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
        need(body.get(name) in [None, *harmless], name, "left out: this server does not offer it")
    limits = [number(body, name, int, 1, 2**31) for name in ("max_completion_tokens", "max_tokens")]
    temperature, top_p = number(body, "temperature", float, 0, 2), number(body, "top_p", float, 0.01, 1)
    if temperature is not None:
        temperature = round(temperature, 2)  # so low that logits are infinite, it would be no number to divide by
    return Settings(limits[0] or limits[1], temperature, top_p, tuple(texts(body, "stop")) if body.get("stop") else ())


@dataclass
class Api:
    """Handlers of requests; without a reader's or an encoder's name there is none."""

    engine: Engine
    feedback: Feedback
    k: int = 3  # passages of an answer
    reader_name: str | None = None
    encoder_name: str | None = None
    encoder: Any = None
    sources_in_text: bool = False
    public_url: str | None = None  # of links; by default what the request says

    def routes(self) -> list[Route]:
        gets = {"/v1/models": self.models, "/passages/{name}": self.passage, "/metrics": self.metrics}
        posts = {"/v1/chat/completions": self.chat, "/v1/embeddings": self.embeddings}
        posts |= {"/retrieve": self.retrieve, "/feedback": self.rate}
        routes = [Route(path, handler, methods=["POST"]) for path, handler in posts.items()]
        return [*page_routes("chat"), *(Route(path, handler) for path, handler in gets.items()), *routes]

    async def chat(self, request: Request) -> Response:
        body = await body_of(request)
        known_model(body, self.reader_name)
        own, options = ({} if body.get(name) is None else body[name] for name in ("rqa", "stream_options"))
        need(isinstance(own, dict), "rqa", "an object")
        need(isinstance(options, dict), "stream_options", "an object")
        need(body.get("stream") in (None, True, False), "stream", "true or false")
        base = (self.public_url or str(request.base_url)).rstrip("/")
        parts = self.answer(*conversation(body.get("messages")), settings_of(body), number(own, "k", int, 1, 100), base)
        whole: dict[str, Any] = {"id": f"chatcmpl-{uuid.uuid4().hex}", "object": "chat.completion"}
        whole |= {"created": int(time.time()), "model": self.reader_name}
        if body.get("stream"):
            first = await anext(parts)  # what is wrong until now has a status of its own
            lines = as_events(whole | {"object": "chat.completion.chunk"}, first, parts, options.get("include_usage"))
            headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # nginx would wait for the end
            return StreamingResponse(lines, media_type="text/event-stream", headers=headers)
        message, ended = {"content": ""}, None
        async with aclosing(parts):
            async for delta, reason, more in parts:
                if await request.is_disconnected():
                    raise ClientDisconnect
                message, ended = message | delta | {"content": message["content"] + delta.get("content", "")}, reason
                whole |= more
        return JSONResponse(whole | {"choices": [{"index": 0, "message": message, "finish_reason": ended}]})

    async def answer(
        self, searched: Example, read: Example, settings: Settings, k: int | None, base: str
    ) -> AsyncIterator[tuple[dict[str, Any], str | None, dict[str, Any]]]:
        """What an answer grows by: a delta of its message, why it ended, and fields beside that."""
        with self.engine.admitted():
            began = time.perf_counter()
            (found,) = await self.engine.search([retrieval_query(searched)], k or self.k)
            retrieved, passages = time.perf_counter(), [described(each, base) for each in found]
            documents, links = [each.document for each in found], [each["url"] for each in passages]
            said, sources = "", {"citations": links, "rqa": {"passages": passages}}
            async with aclosing(self.engine.reply(read, documents, settings)) as replies:
                reply = await anext(replies)
                yield {"role": "assistant", "content": ""}, None, sources
                async for reply in replies:
                    yield {"content": reply.text[len(said) :]}, None, {}
                    said = reply.text
        if self.sources_in_text and passages:
            lines = [f"[{each['rank']}] {each['title']}: {each['url']}" for each in passages]
            yield {"content": "\n".join(["\n\nSources:", *lines])}, None, {}
        cited, annotations = cite(reply.text, documents), []
        for start, end, place in cited:
            link = {name: passages[place - 1][name] for name in ("url", "title")}
            link |= {"start_index": start, "end_index": end}
            annotations.append({"type": "url_citation", "url_citation": link})
        seconds = {"retrieval": retrieved - began, "generation": time.perf_counter() - retrieved}
        own = sources["rqa"] | {"cited": [each._asdict() for each in cited], "seconds": seconds}
        yield {"annotations": annotations}, None, sources | {"rqa": own}
        usage = {"prompt_tokens": reply.prompt_tokens, "completion_tokens": reply.tokens}
        usage["total_tokens"] = sum(usage.values())
        yield {}, reply.ended, {"usage": usage}

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
        """What Search-R1's retrieval server answers: the first line of a document's `contents` is its title."""
        body = await body_of(request)
        queries, k = texts(body, "query" if "query" in body else "queries"), number(body, "topk", int, 1, 1000)
        with self.engine.admitted():
            rows, result = await self.engine.search(queries, k or self.k), []
        for row in rows:
            shown = [{name: described(each, "")[name] for name in ("id", "title", "text")} for each in row]
            shown = [each | {"contents": f'"{one_line(each["title"])}"\n{each["text"]}'} for each in shown]
            scored = [{"document": each, "score": found.score} for each, found in zip(shown, row, strict=True)]
            result.append(scored if body.get("return_scores") else shown)
        return JSONResponse({"result": result})

    async def passage(self, request: Request) -> Response:
        name = request.path_params["name"]
        if (document := passage_of(self.engine.retriever.documents, name)) is None:
            raise HTTPException(404, "there is no such passage, or the database has changed")
        shown = described(Found(0, 0, name, document), "")
        if request.query_params.get("format") == "json" or "application/json" in request.headers.get("accept", ""):
            kept = {name: shown[name] for name in ("id", "title", "source", "text")}
            return JSONResponse(kept | {"metadata": document.metadata})
        page = PASSAGE.format(**{name: escape(str(value)) for name, value in shown.items()})
        return HTMLResponse(page, headers={"Content-Security-Policy": f"{POLICY}'none'"})

    async def models(self, request: Request) -> Response:
        names = dict.fromkeys(filter(None, (self.reader_name, self.encoder_name)))
        data = [{"id": name, "object": "model", "created": STARTED, "owned_by": "rqa"} for name in names]
        return JSONResponse({"object": "list", "data": data})

    async def rate(self, request: Request) -> Response:
        self.feedback.save(await body_of(request))
        return JSONResponse({"status": "saved"})

    async def metrics(self, request: Request) -> Response:
        text = self.engine.metrics.text({"rqa_requests_running": self.engine.running})
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")


async def as_events(about: dict[str, Any], first: Any, parts: AsyncIterator[Any], usage: Any) -> AsyncIterator[str]:
    """What `Api.answer` yields, as server-sent events."""

    def event(choices: list[dict[str, Any]], more: dict[str, Any]) -> str:
        return f"data: {json.dumps(about | {'choices': choices} | more)}\n\n"

    try:
        async with aclosing(parts):
            delta, ended, more = first
            while not ended:
                yield event([{"index": 0, "delta": delta, "finish_reason": None}], more)
                delta, ended, more = await anext(parts)
        yield event([{"index": 0, "delta": delta, "finish_reason": ended}], {})
        if usage:
            yield event([], more)
        yield "data: [DONE]\n\n"
    except Exception as error:
        yield f"data: {bytes(refusal(error).body).decode()}\n\n"


def known_model(body: dict[str, Any], name: str | None) -> None:
    if name is None or body.get("model") not in (None, name):
        raise UnknownModel(f"there is no model '{one_line(body.get('model'))}' here; /v1/models lists those that are")


def described(found: Found, base: str) -> dict[str, Any]:
    """A passage that was found, as JSON has it."""
    about, text = found.document.metadata, found.document.page_content
    title, source = (str(about.get(name) or "") for name in ("title", "source"))
    shown = {"id": found.id, "title": title or source or found.id, "source": source, "text": text}
    return shown | {"score": found.score, "rank": found.rank, "url": f"{base}/passages/{found.id}"}


def page_routes(mode: str) -> list[Route]:
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
    return [*routes, *page_routes("compare")]
