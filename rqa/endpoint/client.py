"""Questions to any OpenAI-compatible server: many at once, each reply kept when it comes."""

import asyncio
import itertools
import json
import logging
import os
import random
import time
from collections.abc import Awaitable, Callable, Collection, Coroutine, Sequence
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from functools import cached_property
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

from openai import APIConnectionError, APIStatusError, APITimeoutError, AsyncOpenAI, OpenAIError
from tqdm import tqdm

from rqa.runtime import distributed
from rqa.runtime.errors import UserError, check_bounds, one_line
from rqa.runtime.files import Store, cache_root, fingerprint


class Reply(NamedTuple):
    """What a server said, the tokens it generated for that, and the seconds it took; None if it was not asked now."""

    text: str
    num_tokens: int
    seconds: float | None


def answer_tokens(reply: Any, prompt: str, answer: str) -> list[float]:
    """The log-probabilities of the answer's tokens, from a completion of prompt + answer that echoes it.

    Args:
        reply: The completion; its `text_offset` says where each token begins. One token may be generated behind it.
    """
    choice = reply["choices"][0]
    logprobs = choice.get("logprobs") or {}
    tokens, values, offsets = (logprobs.get(name) or [] for name in ("tokens", "token_logprobs", "text_offset"))
    if len(tokens) < 2 or len(choice["text"]) < len(prompt + answer):
        return []  # not echoed
    # A server may show, and count, a token that it puts before every text.
    start = len(prompt) + (0 if prompt.startswith(tokens[0].strip()) else offsets[1] - offsets[0])
    end = start + len(answer)
    generated = (reply.get("usage") or {}).get("completion_tokens", 1)
    last = len(tokens) - (generated if generated and offsets[-generated] >= end else 0)
    ends = [*offsets[1:last], end]
    rows = zip(values[:last], offsets[:last], ends, strict=True)
    return [value for value, begin, stop in rows if value is not None and (begin >= start or stop > start)]


def chat_reply(reply: Any) -> Reply:
    """The text and size of a chat completion."""
    text = reply["choices"][0]["message"]["content"] or ""  # null when all tokens went into reasoning
    if not isinstance(text, str):
        raise TypeError(text)
    tokens = (reply.get("usage") or {}).get("completion_tokens")
    return Reply(text.strip(), len(text.split()) if tokens is None else tokens, None)


log = logging.getLogger(__name__)

T = TypeVar("T")

FIRST_DELAY, LONGEST_DELAY = 0.5, 60.0  # seconds of the exponential backoff
LONGEST_WAIT = 300.0  # seconds that a server may ask us to wait; beyond, the user should know
PASSING_STATUS = {408, 409, 425, 429}  # and every 5xx


class Malformed(Exception):
    """A reply that is not what the protocol says."""


class Server:
    """A server's client within one event loop; use it as `async with`.

    Args:
        base_url: Up to and with `/v1`.
        key: Sent as a bearer token.
        timeout: Seconds for one reply.
        retries: How often a request is repeated.

    Attributes:
        repeated: Requests sent again so far.
    """

    def __init__(self, base_url: str, key: str | None, timeout: float, retries: int) -> None:
        self.base_url = base_url
        self.timeout = timeout
        self.retries = retries
        self.repeated = 0
        self._answered = False
        self._client = AsyncOpenAI(base_url=base_url, api_key=key or "none", timeout=timeout, max_retries=0)

    async def __aenter__(self) -> "Server":
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._client.close()

    async def models(self) -> list[str]:
        """The names of the models that the server lists."""
        return await self._request(
            self._client.models.with_raw_response.list, lambda reply: [model["id"] for model in reply["data"]]
        )

    async def ask(self, api: str, body: dict[str, Any], parse: Callable[[Any], T]) -> T:
        """POST /chat/completions or /completions. `parse` makes of the JSON reply what the caller wants."""
        kinds = {"chat/completions": self._client.chat.completions, "completions": self._client.completions}
        return await self._request(kinds[api].with_raw_response.create, parse, body)

    async def _request(
        self, send: Callable[..., Awaitable[Any]], parse: Callable[[Any], T], body: dict[str, Any] | None = None
    ) -> T:
        for attempt in itertools.count():
            try:
                reply = await send(**body or {})
                self._answered = True
                return _parsed(reply.http_response, parse)
            except (OpenAIError, Malformed) as error:
                delay = _delay(error, attempt)
                if attempt == self.retries or delay > LONGEST_WAIT or not self._may_pass(error):
                    raise self._failure(error, attempt + 1) from None
            self.repeated += 1
            await asyncio.sleep(delay)
        raise AssertionError

    def _may_pass(self, error: Exception) -> bool:
        if isinstance(error, APIStatusError):
            self._answered = True
            spent = getattr(error, "code", None) == "insufficient_quota"
            return (error.status_code in PASSING_STATUS or error.status_code >= 500) and not spent
        return self._answered or not _never_connected(error)

    def _failure(self, error: Exception, times: int) -> UserError:
        where, asked = self.base_url, f"asked {times} time{'s' if times > 1 else ''}"
        if isinstance(error, APIStatusError):
            return self._status_failure(error, asked)
        if isinstance(error, APITimeoutError):
            return UserError(
                f"{where}: no answer within {self.timeout:g} seconds, {asked}; raise --endpoint_timeout or lower "
                "--endpoint_concurrency"
            )
        if isinstance(error, APIConnectionError):
            reason = one_line(error.__cause__ or error) or "connection lost"
            return UserError(f"{where}: cannot be reached ({reason}), {asked}; is a server running at this URL?")
        return UserError(f"{where}: not the reply of an OpenAI-compatible server ({one_line(error)}), {asked}")

    def _status_failure(self, error: APIStatusError, asked: str) -> UserError:
        status = error.status_code
        said = f"{self.base_url}: {status}, {_message(error)}"
        if status in (401, 403):
            return UserError(f"{said}; the key is refused: set $OPENAI_API_KEY or the flag of the key")
        if status == 404:
            return UserError(f"{said}; no such model or path: check the model's name, and that the URL ends in /v1")
        if status in PASSING_STATUS or status >= 500:
            return UserError(f"{said}; {asked}")
        return UserError(f"{said}; the server refuses the request")


def _parsed(response: Any, parse: Callable[[Any], T]) -> T:
    try:
        return parse(response.json())
    except (LookupError, TypeError, ValueError, AttributeError):
        raise Malformed(response.text[:200] or "empty") from None


def _delay(error: Exception, attempt: int) -> float:
    """Seconds to wait: what the server asks for, else exponential with jitter, so that clients do not come together."""
    asked = error.response.headers.get("retry-after") if isinstance(error, APIStatusError) else None
    if asked:
        try:
            return max(float(asked), 0.0)
        except ValueError:
            pass
        try:
            return max(parsedate_to_datetime(asked).timestamp() - time.time(), 0.0)
        except ValueError:
            log.debug("Retry-After: %s", asked)
    return min(FIRST_DELAY * 2**attempt, LONGEST_DELAY) * random.uniform(0.5, 1.0)


def _never_connected(error: Exception) -> bool:
    """Whether there is nobody at this address: the HTTP library under openai has changed, its error's name has not."""
    return type(error.__cause__).__name__ == "ConnectError"


def _message(error: APIStatusError) -> str:
    """What the server says, in one line."""
    body = error.body
    said = (
        next((body[name] for name in ("message", "detail") if body.get(name)), body) if isinstance(body, dict) else ""
    )
    return one_line(said or error.response.text or error.response.reason_phrase)


PREFIX = "openai::"


@dataclass(kw_only=True)
class RequestArguments:
    """How OpenAI-compatible servers are asked."""

    endpoint_concurrency: int = field(default=16, metadata={"help": "Requests in flight at once."})
    endpoint_timeout: float = field(default=120.0, metadata={"help": "Seconds to wait for one reply."})
    endpoint_retries: int = field(default=6, metadata={"help": "How often a request that fails is sent again."})

    def __post_init__(self) -> None:
        check_bounds(self, "endpoint_concurrency", at_least=1)
        check_bounds(self, "endpoint_timeout", above=0)
        check_bounds(self, "endpoint_retries", at_least=0)


@dataclass(kw_only=True)
class EndpointArguments(RequestArguments):
    """Which model of an OpenAI-compatible server is asked, and how."""

    endpoint_model: str | None = field(
        default=None, metadata={"help": "The model's name; by default the only one that the server lists."}
    )
    endpoint_api_key: str | None = field(
        default=None, repr=False, metadata={"help": "The key; by default $OPENAI_API_KEY. It is written nowhere."}
    )


class Job(NamedTuple):
    """One request: under which key its result is kept, what is sent, and what is made of the reply."""

    key: str
    body: dict[str, Any]
    parse: Callable[[Any], Any]


def is_endpoint(name: str) -> bool:
    """Whether a model's name means a server: `openai::http://host:port/v1`."""
    return name.startswith(PREFIX)


class Endpoint:
    """A model behind an OpenAI-compatible server.

    What a server replied is kept in `$RQA_CACHE/endpoint.sqlite` under its URL, the model, the text and the settings:
    an interrupted run goes on where it stopped, and the same question is never paid twice.

    Args:
        spec: `openai::http://host:port/v1`.

    Raises:
        UserError: the specification is no URL; from the other methods: the server cannot be reached, refuses the key,
            the model or the request, or keeps failing.
    """

    def __init__(self, spec: str, arguments: EndpointArguments) -> None:
        self.base_url = spec.removeprefix(PREFIX).rstrip("/")
        self.arguments = arguments
        self._store = Store(cache_root() / "endpoint.sqlite")
        url = urlsplit(self.base_url)
        if url.scheme not in ("http", "https") or not url.netloc:
            raise UserError(f"{spec}: not a server; write {PREFIX}http://host:port/v1")
        # OpenAI's newer models know only the new name, most other servers only the old one.
        self._limit = "max_completion_tokens" if url.hostname == "api.openai.com" else "max_tokens"

    @cached_property
    def model(self) -> str:
        """The model's name, from the flag or from the server's list."""
        if self.arguments.endpoint_model:
            return self.arguments.endpoint_model
        names = self._run(lambda server: server.models())
        if len(names) != 1:
            found = ", ".join(names[:10]) or "none"
            raise UserError(f"{self.base_url}: serves not one model but {found}; name it with --endpoint_model")
        return names[0]

    def ask(self, conversations: Sequence[list[dict[str, str]]], max_tokens: int, desc: str = "ask") -> list[Reply]:
        """The likeliest reply to each conversation; conversations that are alike are sent once. [Q] -> [Q]

        A reply that was kept from an earlier run, or stands for another question too, is timed nowhere or once.

        Args:
            conversations: `{"role", "content"}` a turn.
            max_tokens: Tokens of a reply, at most.
            desc: What the progress bar says.
        """
        settings = {self._limit: max_tokens, "temperature": 0.0}
        bodies = [
            {"messages": [{name: _valid(text) for name, text in turn.items()} for turn in turns], **settings}
            for turns in conversations
        ]
        jobs = [Job(self._key("chat", json.dumps(body, sort_keys=True)), body, chat_reply) for body in bodies]
        kept, new = self._ask_all("chat/completions", jobs, desc)
        if kept:
            number = sum(job.key in kept for job in jobs)
            log.info("%s: %d of %d replies were kept from an earlier run", self.base_url, number, len(jobs))
        known = {key: Reply(*value)._replace(seconds=None) for key, value in (kept | new).items()}
        return [new.pop(job.key, known[job.key]) for job in jobs]

    def answer_logprobs(self, prompts: Sequence[str], answers: Sequence[str]) -> list[float]:
        """The mean log-probability of each answer's tokens behind its prompt, by the completions API. [Q] -> [Q]

        The server must return the log-probabilities of the prompt (`echo` with `logprobs`), as vLLM does.
        """
        jobs = [self._echo(_valid(prompt), _valid(answer)) for prompt, answer in zip(prompts, answers, strict=True)]
        kept, new = self._ask_all("completions", jobs, "score")
        return [(kept | new)[job.key] for job in jobs]

    def _key(self, *parts: str) -> str:
        return fingerprint(self.base_url, self.model, fingerprint(*parts))

    def _echo(self, prompt: str, answer: str) -> Job:
        # No token is wanted, but many servers refuse to generate none.
        body = {"prompt": prompt + answer, "max_tokens": 1, "echo": True, "logprobs": 1, "temperature": 0}

        def parse(reply: Any) -> float:
            values = answer_tokens(reply, prompt, answer)
            if not values:
                raise UserError(
                    f"{self.base_url}: gives no log-probabilities of the prompt; scoring needs a completions API with "
                    "echo and logprobs, such as vLLM's"
                )
            return sum(values) / len(values)

        return Job(self._key("echo", prompt, answer), body, parse)

    def _ask_all(self, api: str, jobs: Sequence[Job], desc: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """What `parse` made of the server's replies by the jobs' keys: in an earlier run, and now."""
        kept, new = self._store.get(dict.fromkeys(job.key for job in jobs)), {}
        missing = {job.key: job for job in jobs if job.key not in kept}

        async def ask(server: "Server", job: Job) -> None:
            started = time.perf_counter()
            value = await server.ask(api, {"model": self.model, **job.body}, job.parse)
            if isinstance(value, Reply):
                value = value._replace(seconds=time.perf_counter() - started)
            self._store.put({job.key: value})
            new[job.key] = value
            bar.update()

        async def ask_all(server: "Server") -> None:
            await at_once(lambda job: ask(server, job), missing.values(), self.arguments.endpoint_concurrency)
            if server.repeated:
                log.info("%s: %d requests were sent again", self.base_url, server.repeated)

        if missing:
            with tqdm(total=len(missing), desc=desc, unit="q", leave=False, disable=not distributed.is_main()) as bar:
                self._run(ask_all)
        return kept, new

    def _run(self, work: Callable[["Server"], Coroutine[Any, Any, Any]]) -> Any:

        async def run() -> Any:
            key = self.arguments.endpoint_api_key or os.environ.get("OPENAI_API_KEY")
            async with Server(
                self.base_url, key, self.arguments.endpoint_timeout, self.arguments.endpoint_retries
            ) as server:
                return await work(server)

        return asyncio.run(run())


async def at_once(work: Callable[[Any], Awaitable[None]], items: Collection[Any], number: int) -> None:
    """`work` on every item, so many at a time; the first exception ends them all."""
    queue = iter(items)

    async def worker() -> None:
        for item in queue:
            await work(item)

    workers = [asyncio.ensure_future(worker()) for _ in range(min(number, len(items)))]
    try:
        await asyncio.gather(*workers)
    finally:
        for each in workers:
            each.cancel()


def _valid(text: str) -> str:
    """Text that UTF-8 can carry: half a surrogate pair, which JSON files may hold, becomes a question mark."""
    return text.encode("utf-8", "replace").decode("utf-8")
