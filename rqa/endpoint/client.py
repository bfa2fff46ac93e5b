"""Client of any OpenAI-compatible server: many requests at once, each reply stored when it arrives."""

import asyncio
import json
import logging
import os
import re
import time
from collections.abc import Callable, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, NamedTuple

from rqa.data import Answer
from rqa.runtime import distributed
from rqa.runtime.cli import progress
from rqa.runtime.errors import UserError, one_line, without_credentials
from rqa.runtime.files import Store, cache_root, fingerprint
from rqa.runtime.flags import Arguments, flag
from rqa.runtime.text import clean_text, parse_json, without_thoughts

log = logging.getLogger(__name__)

PREFIX = "openai::"
URL = re.compile(r"https?://([^\s/?#]*@)?([\w.-]+|\[[\da-fA-F:.]+\])(:\d+)?(/[^\s?#@]*)?")
BYTES_PER_TOKEN = 3  # English prose has 4 to 5, code and most other scripts about 3; estimates are rather too high
CHARACTERS_PER_TOKEN = 32  # maximum average; text of a reply beyond it is dropped
LONGEST_REPLY = 2**24  # bytes, decompressed
TIMEOUT = 600.0  # seconds; a server on a CPU needs minutes for a long reply
PAUSE = 1.0  # seconds before an unreadable reply is asked for again; doubled each time
ADVICE = {404: "no such model or path: check the model's name, and that the URL ends in /v1"}
ADVICE |= dict.fromkeys((401, 403), "the key is refused: give its flag, or $OPENAI_API_KEY with $OPENAI_BASE_URL")
ADVICE |= dict.fromkeys((301, 302, 303, 307, 308), "redirects are not followed: name their target if you trust it")
ENDS = {401, 402, 429, 502, 503, 504}  # statuses that other requests would get, too: wrong key, no quota, server down
FIRST = 5  # requests: if all of the first are refused, the others are not sent
INSTEAD = {"temperature": "", "max_tokens": "max_completion_tokens"}  # other names of settings that newer models refuse
QUOTED = re.compile(r"""['"`](\w+)(?:['`]|"(?!\s*:))""")  # a quoted name, but not a JSON key, as in a quoted request
CUT = ("length", "max_tokens", "model_length", "content_filter")  # finish reasons of cut replies
UNREADABLE = (LookupError, TypeError, ValueError, AttributeError, RecursionError)


@dataclass(kw_only=True)
class RequestArguments(Arguments):
    """Requests to OpenAI-compatible servers."""

    endpoint_concurrency: int = flag(16, "Maximum number of concurrent requests.", rare=True)
    endpoint_retries: int = flag(6, "Maximum number of retries of a failed request.", rare=True)

    def check(self) -> None:
        self.check_bounds("endpoint_concurrency", at_least=1)
        self.check_bounds("endpoint_retries", at_least=0)


@dataclass(kw_only=True)
class EndpointArguments(RequestArguments):
    """The model behind an OpenAI-compatible server."""

    endpoint_model: str | None = flag(None, "Name of the model. Default: the only one the server lists.", rare=True)
    endpoint_api_key: str | None = flag(None, "API key. Default for OpenAI: $OPENAI_API_KEY.", rare=True, secret=True)


class Job(NamedTuple):
    path: str
    key: str  # key in the store
    body: dict[str, Any]
    find: Callable[[Any], Any]  # extracts from a reply what is stored
    read: Callable[[Any], Any] = lambda found: found  # makes the result from that


class Refused(UserError):
    """An error for a request that the server does not answer properly, even after retries."""


def is_endpoint(name: str) -> bool:
    """Whether a model's name means a server: `openai::http://host:port/v1`."""
    return name.startswith(PREFIX)


class Endpoint:
    """A model behind an OpenAI-compatible server, named `openai::http://host:port/v1`.

    Replies are stored in `$RQA_CACHE/endpoint.sqlite` by URL, model, text and settings, so that an interrupted run
    continues where it stopped, and no request is paid for twice.
    """

    def __init__(self, spec: str, flags: EndpointArguments = EndpointArguments(), template: Any = None) -> None:
        """`template` holds variables of the server's chat template."""
        self._url, self.flags = spec.removeprefix(PREFIX).rstrip("/"), flags
        if not (url := URL.fullmatch(self._url)):
            spec = re.sub(r"(?s)[?#].*", "?...", spec, count=1)  # a query may hold a key
            raise UserError(f"{spec}: not a server; write {PREFIX}http://host:port/v1")
        self.base_url = without_credentials(self._url)
        self._options = {"chat_template_kwargs": template} if template else {}
        self._store = Store(cache_root() / "endpoint.sqlite")
        self._reached = self._served = False
        self._names: dict[str, str] = {}  # settings that the server refuses -> their other names, "" to leave them out
        trusted = "https://api.openai.com", without_credentials(os.environ.get("OPENAI_BASE_URL", ""))
        is_trusted = self.base_url.split("/")[:3] in [each.split("/")[:3] for each in trusted]  # others get no key
        self._key = (flags.endpoint_api_key or (is_trusted and os.environ.get("OPENAI_API_KEY")) or "").strip()
        self._secrets = [self._key, (url[1] or "")[:-1].rpartition(":")[2]]
        if not (self._key.isascii() and self._key.isprintable()):
            raise UserError(f"{self.base_url}: its API key has characters that no key has; copy the key again")

    @cached_property
    def model(self) -> str:
        """The model's name, from the flag or the server's list."""
        if self.flags.endpoint_model:
            return self.flags.endpoint_model
        job = Job("/models", "", {}, lambda reply: [str.strip(model["id"]) for model in reply["data"]])
        names = self._run(lambda client: self._send(client.get, job))
        if len(names) != 1:
            found = one_line(", ".join(names[:10])) or "none"
            raise self._error(f"serves not one model but {found}; name it with --endpoint_model")
        return names[0]

    def ask(self, conversations: Sequence[list[dict[str, str]]], max_tokens: int, desc: str = "ask") -> list[Answer]:
        """Reply at temperature 0 to each conversation, a list of turns `{"role", "content"}`. [Q] -> [Q]

        Equal conversations are sent once, and only the first reply has a time; stored replies have none. A conversation
        that the server refuses gets an empty reply.
        """
        jobs, read = [], partial(read_reply, max_tokens)
        for turns in conversations:
            messages = [{name: clean_text(text) for name, text in turn.items()} for turn in turns]
            body = {"messages": messages, "max_tokens": max_tokens, "temperature": 0.0, **self._options}
            names = "chat", json.dumps(body, sort_keys=True)
            jobs.append(self._job("/chat/completions", names, body, chat_reply, read))
        return [replace(reply or Answer("", 0), seconds=seconds) for reply, seconds in self._ask_all(jobs, desc)]

    def answer_logprobs(self, prompts: Sequence[str], answers: Sequence[str]) -> list[float | None]:
        """Mean log-probability of each answer's tokens after its prompt; None if the request is refused. [Q] -> [Q]"""
        jobs = []
        for prompt, answer in zip(map(clean_text, prompts), map(clean_text, answers), strict=True):
            # One token is generated and not used, since many servers refuse max_tokens 0.
            body = {"prompt": prompt + answer, "max_tokens": 1, "echo": True, "logprobs": 1, "temperature": 0}
            names, find = ("echo", prompt, answer), partial(self._mean, prompt, answer)
            jobs.append(self._job("/completions", names, body, find, _log_probability))
        return [mean for mean, _ in self._ask_all(jobs, "score")]

    def _mean(self, prompt: str, answer: str, reply: Any) -> float:
        if not (values := answer_tokens(reply, prompt, answer)):
            hint = "scoring needs a completions API with echo and logprobs, such as vLLM's"
            raise self._error(f"gives no log-probabilities of the prompt; {hint}")
        return sum(values) / len(values)

    def _job(self, path: str, names: tuple[str, ...], body: dict[str, Any], *how: Callable[[Any], Any]) -> Job:
        key = fingerprint(self.base_url, self.model, fingerprint(*names))
        return Job(path, key, {"model": self.model} | body, *how)

    def _ask_all(self, jobs: Sequence[Job], desc: str) -> list[tuple[Any, float | None]]:
        """The result of each job (None if it was refused), and its seconds (None if refused or stored before)."""
        stored, known = self._store.get({job.key for job in jobs}), {}
        for job in jobs:
            with suppress(*UNREADABLE):
                known[job.key] = job.read(stored[job.key])
        if number := sum(job.key in known for job in jobs):
            log.info("%s: %d of %d replies were kept from an earlier run", self.base_url, number, len(jobs))
        missing = {job.key: job for job in jobs if job.key not in known}
        waiting, seconds, refused = iter(missing.values()), {}, dict[str, Refused]()
        self._served |= bool(known)

        async def ask(client: Any) -> None:
            for job in waiting:
                started = time.perf_counter()
                try:
                    found = await self._send(client.post, job)
                except Refused as error:
                    refused[job.key] = error
                    status, all_of = getattr(error.__cause__, "status_code", 0), min(FIRST, len(missing))
                    if status in ENDS or (not self._served and (status in ADVICE or len(refused) >= all_of)):
                        raise
                else:
                    self._served, known[job.key] = True, job.read(found)
                    seconds[job.key] = time.perf_counter() - started
                    self._store.put({job.key: found})
                bar.update()

        if missing:
            workers = min(self.flags.endpoint_concurrency, len(missing))
            with progress(total=len(missing), desc=desc, unit="q", disable=not distributed.is_main()) as bar:
                self._run(lambda client: asyncio.gather(*(ask(client) for _ in range(workers))))
        for key, error in list(refused.items())[:1]:
            turns = missing[key].body.get("messages") or [{"content": missing[key].body["prompt"]}]
            end = one_line(turns[-1]["content"][-99:])
            message = "%s: %d of %d requests were refused, and their answers are empty; the first, ...%s: %s"
            log.warning(message, desc, len(refused), len(jobs), end, error)
        return [(known.get(job.key), seconds.pop(job.key, None)) for job in jobs]

    def connect(self, http: type, retries: int) -> Any:
        """An openai client over such an HTTP client; it retries after 0.5, 1, 2 ... 8 s, or as the server asks."""
        from openai import AsyncOpenAI, Timeout

        given = {"timeout": Timeout(TIMEOUT, connect=5.0), "http_client": http(follow_redirects=False)}
        return AsyncOpenAI(base_url=self._url, api_key=self._key or "none", max_retries=retries, **given)

    def _run(self, work: Callable[[Any], Any]) -> Any:
        import openai  # takes a second, which runs without servers save

        class Client(openai.DefaultAsyncHttpxClient):
            async def send(self, request: Any, **options: Any) -> Any:
                """Read the whole reply within one deadline, up to a maximum size."""
                options["stream"], body = True, bytearray()
                try:
                    async with asyncio.timeout(2 * TIMEOUT), aclosing(await super().send(request, **options)) as reply:
                        async for part in reply.aiter_bytes():
                            body += part
                            if len(body) > LONGEST_REPLY:
                                break
                except TimeoutError:
                    raise openai.APITimeoutError(request) from None
                except Exception as error:
                    if type(error).__name__ != "DecodingError":
                        raise
                    body[:] = f"its compression is broken: {error}".encode()  # becomes an unreadable reply
                # The body is decompressed, and is always read as UTF-8, as JSON must be.
                left_out = ("content-encoding", "content-type")
                headers = [pair for pair in reply.headers.items() if pair[0] not in left_out]
                if reply.status_code == 429 and b"insufficient_quota" in body:
                    headers.append(("x-should-retry", "false"))
                return type(reply)(reply.status_code, headers=headers, content=bytes(body), request=request)

        async def run() -> Any:
            async with self.connect(Client, self.flags.endpoint_retries) as client:
                if not self._reached:  # an absent server is reported now, not after many retries
                    with suppress(openai.APIStatusError):
                        await client.with_options(max_retries=1).get("/models", cast_to=str)
                    self._reached = True
                return await work(client)

        try:
            return asyncio.run(run())
        except Exception as error:
            if isinstance(error, UnicodeError) or type(error).__name__ == "InvalidURL":
                raise self._error(f"not a server's URL ({one_line(error)})") from None
            raise self._failure(error) if isinstance(error, openai.APIError) else error from None

    async def _send(self, send: Callable[..., Any], job: Job) -> Any:
        """Send a request. -> the part of its reply to store

        This repeats requests with unreadable replies; the openai client repeats those that fail.
        """
        for attempt in range(self.flags.endpoint_retries + 1):
            reply = await self._send_adapted(send, job)
            try:
                job.read(found := job.find(parse_json(reply.content)))
                return found
            except UNREADABLE as error:
                problem = f"{one_line(error)}: {one_line(reply.text[:200]) or 'empty'}"
                if attempt < self.flags.endpoint_retries:
                    await asyncio.sleep(PAUSE * 2 ** min(attempt, 3))
        raise self._error(f"not the reply of an OpenAI-compatible server ({problem}), {_asked(attempt)}")

    async def _send_adapted(self, send: Callable[..., Any], job: Job) -> Any:
        """Send a request; a setting that the server refuses by name is renamed or left out, and all is sent again."""
        from openai import APIStatusError, HttpxBinaryResponseContent

        while True:
            body = {self._names.get(name, name): value for name, value in job.body.items()}
            body.pop("", None)
            try:
                return await send(job.path, cast_to=HttpxBinaryResponseContent, options={"extra_json": body or None})
            except APIStatusError as error:
                refusal = self._failure(error)
                names = [error.param] if error.param else QUOTED.findall(str(refusal) * (error.status_code == 400))
                named = next((name for name in INSTEAD if name in body and name in names), None)
                if named is None or "context length" in str(refusal):  # the prompt is too long
                    raise refusal from error
                if named not in self._names:
                    log.warning("%s: refuses '%s', which is sent no more", self.base_url, named)
                self._names[named] = INSTEAD[named]

    def _failure(self, error: Any) -> Refused:
        asked = _asked(int(error.request.headers.get("x-stainless-retry-count", 0)))
        cause = error.__cause__ or error  # of the HTTP library under openai: only its names are stable
        if status := getattr(error, "status_code", 0):
            body = error.body if isinstance(error.body, dict) else {"message": error.body}
            reason = next((body[name] for name in ("message", "detail") if isinstance(body.get(name), str)), "")
            reason = one_line(reason or error.response.headers.get("location") or error.response.text or "no reason")
            advice = asked if status in (408, 409, 429) or status >= 500 else "the server refuses the request"
            advice = advice if self._served and status not in ENDS else ADVICE.get(status, advice)
            problem = f"{status}, {reason}; {advice}"
        elif "Timeout" in type(cause).__name__ and type(cause).__name__ != "ConnectTimeout":
            problem = f"no answer within {TIMEOUT:g} seconds, {asked}; lower --endpoint_concurrency"
        elif type(error).__name__ == "APIError":  # raised in the middle of a stream
            problem = f"broke off its reply: {one_line(error) or 'no reason'}"
        else:
            reason = one_line(cause) or "connection lost"
            problem = f"cannot be reached ({reason}), {asked}; is a server running at this URL?"
        return self._error(problem)

    def _error(self, problem: str) -> Refused:
        for secret in filter(None, self._secrets):
            problem = problem.replace(secret, "***")
        return Refused(f"{self.base_url}: {problem}")


def _asked(retries: int) -> str:
    return f"asked {retries + 1} time{'s' if retries else ''}"


def chat_reply(reply: Any) -> list[Any]:
    """The parts of a chat completion that `read_reply` needs: content, number of tokens, finish reason."""
    choice, usage = reply["choices"][0], reply.get("usage")
    tokens = usage.get("completion_tokens") if isinstance(usage, dict) else None
    return [choice["message"].get("content"), tokens, choice.get("finish_reason")]


def read_reply(max_tokens: int, kept: Any) -> Answer:
    """The answer, without thoughts, from what `chat_reply` found now or in an earlier run; may raise `UNREADABLE`."""
    content, tokens, reason = [*kept, None][:3]  # older versions stored no reason
    if isinstance(content, list):
        content = "".join(part["text"] for part in content if part["type"] == "text")
    text = without_thoughts("" if content is None else content)  # null when all tokens went into reasoning
    longest = max_tokens * CHARACTERS_PER_TOKEN
    if type(tokens) is not int or not 0 <= tokens < 10**9:
        tokens = len(text.split())
    return Answer(text[:longest], tokens, cut=reason in CUT or len(text) > longest)


def answer_tokens(reply: Any, prompt: str, answer: str) -> list[float]:
    """Log-probabilities of the answer's tokens in a completion that echoes prompt + answer; [] if it does not."""
    choice, text = reply["choices"][0], prompt + answer
    logprobs = choice.get("logprobs") or {}
    tokens, values, offsets = (logprobs.get(name) or [] for name in ("tokens", "token_logprobs", "text_offset"))
    if len(tokens) < 2 or len(choice["text"]) < len(text):
        return []
    # A server may echo and count a token that it adds before every text.
    shown = ("" if prompt.startswith(tokens[0].strip()) else tokens[0][: offsets[1] - offsets[0]]) + text
    end, start = len(shown), len(shown) - len(answer)
    generated = (reply.get("usage") or {}).get("completion_tokens", 1)  # one token may follow the answer
    last = len(tokens) - (generated if generated and offsets[-generated] >= end else 0)
    rows = list(zip(tokens, values, offsets, [*offsets[1:], end], strict=True))[:last]
    # The tokens must tile the text; tokens that share a character may each be shown as U+FFFD.
    parts = [(token, shown[begin:stop]) for token, _, begin, stop in rows[1:]]
    tiled = all(token == part or ("\ufffd" in token and len(part) <= len(token)) for token, part in parts)
    edges = choice["text"].find(text), min(offsets), offsets[1]
    if not tiled or min(edges) < 0 or max(edges) > len(tokens[0]):
        raise ValueError("log-probabilities of another text")
    rows = rows[values[0] is None :]  # the first token has no probability, since nothing precedes it
    return [_log_probability(value) for _, value, begin, stop in rows if begin >= start or stop > start]


def _log_probability(value: Any) -> float:
    """The value if it can be a log-probability: servers write -9999 for minus infinity, and round above 0."""
    if type(value) not in (int, float) or not -1000 < value < 0.01:
        raise ValueError(f"{value} is not a log-probability")
    return value


def check_price(flag: str, price: Sequence[float]) -> None:
    if len(price) not in (0, 2) or min(price, default=0) < 0:
        raise UserError(f"--{flag}: takes two numbers, dollars per million tokens in and out")


def cost(asked: str, conversations: Sequence[list[dict[str, str]]], reply_tokens: int, price: Sequence[float]) -> str:
    """A line with the maximum cost in tokens and, at a price per million in and out, in dollars."""
    given = sum(len(EstimatedTokens().encode(turn["content"])) for turns in conversations for turn in turns)
    written = reply_tokens * len(conversations)
    dollars = f", at most ${(given * price[0] + written * price[1]) / 1e6:.2f}" if price else ""
    return f"{asked}, some {given:,} tokens in, at most {written:,} out{dollars}; stored replies cost nothing"


class EstimatedTokens:
    """A stand-in for a `Prompter`'s tokenizer that counts one token every three bytes of UTF-8."""

    chat_template = bos_token_id = None
    eos_token_id, eos_token = 0, ""
    all_special_ids: tuple[int, ...] = ()
    added_tokens_decoder: dict[int, str] = {}  # noqa: RUF012

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Meaningless ids, as many as the text probably has tokens."""
        return [0] * -(-len(text.encode("utf-8", "replace")) // BYTES_PER_TOKEN)
