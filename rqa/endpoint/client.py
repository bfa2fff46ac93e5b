"""Questions to any OpenAI-compatible server: many at once, each reply kept when it comes."""

import asyncio
import json
import logging
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from tqdm import tqdm

from rqa.runtime import distributed
from rqa.runtime.errors import UserError, one_line
from rqa.runtime.files import Store, cache_root, fingerprint
from rqa.runtime.flags import Arguments, flag

log = logging.getLogger(__name__)

PREFIX = "openai::"
TIMEOUT = 600.0  # seconds for one reply: a CPU may serve a long one
CONNECT_TIMEOUT = 5.0
RETRIES = 6  # after half a second, a second, ... up to 8, or when the server says, if that is within two minutes
PAUSE = 1.0  # seconds before a reply that cannot be read is asked for again; twice as long the next time
WHAT_TO_DO = {
    401: "the key is refused: set $OPENAI_API_KEY or the flag of the key",
    403: "the key is refused: set $OPENAI_API_KEY or the flag of the key",
    404: "no such model or path: check the model's name, and that the URL ends in /v1",
}


@dataclass(kw_only=True)
class RequestArguments(Arguments):
    """Requests to OpenAI-compatible servers."""

    endpoint_concurrency: int = flag(16, "Number of requests that are in flight at once.", rare=True)

    def check(self) -> None:
        self.check_bounds("endpoint_concurrency", at_least=1)


@dataclass(kw_only=True)
class EndpointArguments(RequestArguments):
    """The model behind an OpenAI-compatible server."""

    endpoint_model: str | None = flag(
        None, "Name of the model. Default: the only one that the server lists.", rare=True
    )
    endpoint_api_key: str | None = flag(
        None, "API key, which is written nowhere. Default: $OPENAI_API_KEY.", rare=True, secret=True
    )


class Reply(NamedTuple):
    """What a server said, the tokens it generated for that, and the seconds it took; None if it was not asked now."""

    text: str
    num_tokens: int
    seconds: float | None


class Job(NamedTuple):
    """What is sent, and what is made of the reply."""

    body: dict[str, Any]
    parse: Callable[[Any], Any]


def is_endpoint(name: str) -> bool:
    """Whether a model's name means a server: `openai::http://host:port/v1`."""
    return name.startswith(PREFIX)


class Endpoint:
    """A model behind an OpenAI-compatible server.

    What the server replied is kept in `$RQA_CACHE/endpoint.sqlite` under its URL, the model, the text and the settings:
    an interrupted run goes on where it stopped, and the same question is never paid twice.

    Args:
        spec: `openai::http://host:port/v1`.
    """

    def __init__(self, spec: str, flags: EndpointArguments = EndpointArguments()) -> None:
        self.base_url = spec.removeprefix(PREFIX).rstrip("/")
        self.flags = flags
        self._store = Store(cache_root() / "endpoint.sqlite")
        self._reached = False
        url = urlsplit(self.base_url)
        if url.scheme not in ("http", "https") or not url.netloc:
            raise UserError(f"{spec}: not a server; write {PREFIX}http://host:port/v1")
        # OpenAI's newer models know only the new name, most other servers only the old one.
        self._limit = "max_completion_tokens" if url.hostname == "api.openai.com" else "max_tokens"

    @cached_property
    def model(self) -> str:
        """The model's name, from the flag or from the server's list."""
        if self.flags.endpoint_model:
            return self.flags.endpoint_model

        async def list_models(client: Any) -> list[str]:
            send = client.models.with_raw_response.list
            return (await self._send(send, Job({}, lambda reply: [model["id"] for model in reply["data"]])))[0]

        names = self._run(list_models)
        if len(names) != 1:
            found = ", ".join(names[:10]) or "none"
            raise UserError(f"{self.base_url}: serves not one model but {found}; name it with --endpoint_model")
        return names[0]

    def ask(self, conversations: Sequence[list[dict[str, str]]], max_tokens: int, desc: str = "ask") -> list[Reply]:
        """The likeliest reply to each conversation; conversations that are alike are sent once. [Q] -> [Q]

        Of equal conversations only the first reply has a time, and none that an earlier run kept.

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
        keys = [self._key("chat", json.dumps(body, sort_keys=True)) for body in bodies]
        jobs = {key: Job(body, chat_reply) for key, body in zip(keys, bodies, strict=True)}
        kept, new = self._ask_all("chat/completions", jobs, desc)
        if kept:
            number = sum(key in kept for key in keys)
            log.info("%s: %d of %d replies were kept from an earlier run", self.base_url, number, len(keys))
        known = {key: Reply(*value)._replace(seconds=None) for key, value in (kept | new).items()}
        return [new.pop(key, known[key]) for key in keys]

    def answer_logprobs(self, prompts: Sequence[str], answers: Sequence[str]) -> list[float]:
        """The mean log-probability of each answer's tokens behind its prompt, by the completions API. [Q] -> [Q]

        The server must return the log-probabilities of the prompt (`echo` with `logprobs`), as vLLM does.
        """
        texts = [(_valid(prompt), _valid(answer)) for prompt, answer in zip(prompts, answers, strict=True)]
        keys = [self._key("echo", *pair) for pair in texts]
        jobs = {key: self._echo(*pair) for key, pair in zip(keys, texts, strict=True)}
        kept, new = self._ask_all("completions", jobs, "score")
        return [(kept | new)[key] for key in keys]

    def _key(self, *parts: str) -> str:
        return fingerprint(self.base_url, self.model, fingerprint(*parts))

    def _echo(self, prompt: str, answer: str) -> Job:
        def parse(reply: Any) -> float:
            values = answer_tokens(reply, prompt, answer)
            if not values:
                raise UserError(
                    f"{self.base_url}: gives no log-probabilities of the prompt; scoring needs a completions API with "
                    "echo and logprobs, such as vLLM's"
                )
            return sum(values) / len(values)

        # No token is wanted, but many servers refuse to generate none.
        return Job({"prompt": prompt + answer, "max_tokens": 1, "echo": True, "logprobs": 1, "temperature": 0}, parse)

    def _ask_all(self, api: str, jobs: dict[str, Job], desc: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """What is made of the server's replies by the jobs' keys: in an earlier run, and now."""
        kept, new, repeated = self._store.get(jobs), {}, 0
        missing = iter([key for key in jobs if key not in kept])

        async def ask(client: Any) -> None:
            nonlocal repeated
            apis = {"chat/completions": client.chat.completions, "completions": client.completions}
            for key in missing:
                started = time.perf_counter()
                job = jobs[key]._replace(body={"model": self.model, **jobs[key].body})
                value, times = await self._send(apis[api].with_raw_response.create, job)
                if isinstance(value, Reply):
                    value = value._replace(seconds=time.perf_counter() - started)
                self._store.put({key: value})
                new[key] = value
                repeated += times
                bar.update()

        async def ask_all(client: Any) -> None:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(self.flags.endpoint_concurrency, len(jobs) - len(kept))):
                    group.create_task(ask(client))

        if len(kept) < len(jobs):
            total = len(jobs) - len(kept)
            with tqdm(total=total, desc=desc, unit="q", leave=False, disable=not distributed.is_main()) as bar:
                self._run(ask_all)
            if repeated:
                log.info("%s: %d requests were sent again", self.base_url, repeated)
        return kept, new

    def _run(self, work: Callable[[Any], Any]) -> Any:
        """`work` with an open client."""
        import openai  # two seconds that a run without servers does not need

        async def refuse_poverty(response: Any) -> None:
            if response.status_code == 429 and b"insufficient_quota" in await response.aread():
                response.headers["x-should-retry"] = "false"

        async def run() -> Any:
            async with openai.AsyncOpenAI(
                base_url=self.base_url,
                api_key=self.flags.endpoint_api_key or os.environ.get("OPENAI_API_KEY") or "none",
                timeout=openai.Timeout(TIMEOUT, connect=CONNECT_TIMEOUT),
                max_retries=RETRIES,
                http_client=openai.DefaultAsyncHttpxClient(event_hooks={"response": [refuse_poverty]}),
            ) as client:
                if not self._reached:  # nobody at this address: said now, not after many retries
                    with suppress(openai.APIStatusError):
                        await client.with_options(max_retries=1).models.with_raw_response.list()
                    self._reached = True
                return await work(client)

        try:
            return asyncio.run(run())
        except openai.APIError as error:
            raise self._failure(error) from None
        except ExceptionGroup as group:
            error = group.exceptions[0]
            raise self._failure(error) if isinstance(error, openai.APIError) else error from None

    async def _send(self, send: Callable[..., Any], job: Job) -> tuple[Any, int]:
        """What is made of the reply, and how often it was asked for again.

        The openai client repeats a request that fails, and this one that brings what the protocol does not know.
        """
        repeated = 0
        for attempt in range(RETRIES + 1):
            reply = await send(**job.body)
            repeated += reply.retries_taken
            try:
                return job.parse(reply.http_response.json()), repeated + attempt
            except (LookupError, TypeError, ValueError, AttributeError, RecursionError):
                said = one_line(reply.http_response.text[:200]) or "empty"
            if attempt < RETRIES:
                await asyncio.sleep(PAUSE * 2 ** min(attempt, 3))
        raise UserError(
            f"{self.base_url}: not the reply of an OpenAI-compatible server ({said}), asked {RETRIES + 1} times"
        )

    def _failure(self, error: Any) -> UserError:
        """An error of the openai client in one line."""
        import openai

        times = 1 + int(error.request.headers.get("x-stainless-retry-count", 0))
        asked = f"asked {times} time{'s' if times > 1 else ''}"
        if isinstance(error, openai.APIStatusError):
            status, said = error.status_code, error.body
            if isinstance(said, dict):
                said = next((said[name] for name in ("message", "detail") if said.get(name)), said)
            said = one_line(said or error.response.text or error.response.reason_phrase)
            may_pass = status in (408, 409, 429) or status >= 500
            what_to_do = WHAT_TO_DO.get(status) or (asked if may_pass else "the server refuses the request")
            return UserError(f"{self.base_url}: {status}, {said}; {what_to_do}")
        cause = error.__cause__ or error
        if isinstance(error, openai.APITimeoutError) and type(cause).__name__ != "ConnectTimeout":
            return UserError(
                f"{self.base_url}: no answer within {TIMEOUT:g} seconds, {asked}; lower --endpoint_concurrency"
            )
        reason = one_line(cause) or "connection lost"
        return UserError(f"{self.base_url}: cannot be reached ({reason}), {asked}; is a server running at this URL?")


def chat_reply(reply: Any) -> Reply:
    """The text and size of a chat completion."""
    text = reply["choices"][0]["message"]["content"] or ""  # null when all tokens went into reasoning
    if not isinstance(text, str):
        raise TypeError(text)
    tokens = (reply.get("usage") or {}).get("completion_tokens")
    return Reply(text.strip(), len(text.split()) if tokens is None else tokens, None)


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


def _valid(text: str) -> str:
    """Text that UTF-8 can carry: half a surrogate pair, which JSON files may hold, becomes a question mark."""
    return text.encode("utf-8", "replace").decode("utf-8")
