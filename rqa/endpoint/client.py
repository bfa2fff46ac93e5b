"""Questions to any OpenAI-compatible server: many at once, each reply kept when it comes."""

import asyncio
import json
import logging
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from rqa.runtime import distributed
from rqa.runtime.cli import progress
from rqa.runtime.errors import UserError, one_line
from rqa.runtime.files import Store, cache_root, fingerprint
from rqa.runtime.flags import Arguments, flag

log = logging.getLogger(__name__)

PREFIX = "openai::"
BYTES_PER_TOKEN = 3  # English prose has four to five, code and most other scripts about three: too early, not too late
TIMEOUT = 600.0  # seconds; a server on a CPU needs minutes for a long reply
PAUSE = 1.0  # seconds before a reply that cannot be read is asked for again; twice as many each time
ADVICE = {404: "no such model or path: check the model's name, and that the URL ends in /v1"}
ADVICE |= dict.fromkeys((401, 403), "the key is refused: set $OPENAI_API_KEY or the flag of the key")


@dataclass(kw_only=True)
class RequestArguments(Arguments):
    """Requests to OpenAI-compatible servers."""

    endpoint_concurrency: int = flag(16, "Number of requests that are in flight at once.", rare=True)
    endpoint_retries: int = flag(6, "Number of times that a failed request is sent again.", rare=True)

    def check(self) -> None:
        self.check_bounds("endpoint_concurrency", at_least=1)
        self.check_bounds("endpoint_retries", at_least=0)


@dataclass(kw_only=True)
class EndpointArguments(RequestArguments):
    """The model behind an OpenAI-compatible server."""

    endpoint_model: str | None = flag(None, "Name of the model. Default: the only one the server lists.", rare=True)
    endpoint_api_key: str | None = flag(None, "Server's API key. Default: $OPENAI_API_KEY.", rare=True, secret=True)


class Reply(NamedTuple):
    """What a server said, the tokens it generated for that, and the seconds it took; None if it was not asked now."""

    text: str
    num_tokens: int
    seconds: float | None


class Job(NamedTuple):
    key: str  # under which its result is kept
    body: dict[str, Any]
    parse: Callable[[Any], Any]  # what is made of the reply


def is_endpoint(name: str) -> bool:
    """Whether a model's name means a server: `openai::http://host:port/v1`."""
    return name.startswith(PREFIX)


class Endpoint:
    """A model behind an OpenAI-compatible server, named as `is_endpoint` says.

    What the server replied is kept in `$RQA_CACHE/endpoint.sqlite` under its URL, the model, the text and the settings:
    an interrupted run goes on where it stopped, and the same question is never paid twice.
    """

    def __init__(self, spec: str, flags: EndpointArguments = EndpointArguments()) -> None:
        self.base_url, self.flags = spec.removeprefix(PREFIX).rstrip("/"), flags
        self._store = Store(cache_root() / "endpoint.sqlite")
        self._reached, self._repeated = False, 0
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
        job = Job("", {}, lambda reply: [model["id"] for model in reply["data"]])
        names = self._run(lambda client: self._send(client.models.with_raw_response.list, job))
        if len(names) != 1:
            found = ", ".join(names[:10]) or "none"
            raise UserError(f"{self.base_url}: serves not one model but {found}; name it with --endpoint_model")
        return names[0]

    def ask(self, conversations: Sequence[list[dict[str, str]]], max_tokens: int, desc: str = "ask") -> list[Reply]:
        """The likeliest reply to each conversation, whose turns are `{"role", "content"}`. [Q] -> [Q]

        Equal conversations are sent once: the first reply alone has a time, and none that an earlier run kept.
        """
        jobs = []
        for turns in conversations:
            messages = [{name: _valid(text) for name, text in turn.items()} for turn in turns]
            body = {"messages": messages, self._limit: max_tokens, "temperature": 0.0}
            jobs.append(Job(self._key("chat", json.dumps(body, sort_keys=True)), body, chat_reply))
        replies = self._ask_all(lambda client: client.chat.completions, jobs, desc)
        return [Reply(*kept[:2], seconds) for kept, seconds in replies]

    def answer_logprobs(self, prompts: Sequence[str], answers: Sequence[str]) -> list[float]:
        """The mean log-probability of each answer's tokens behind its prompt, by the completions API. [Q] -> [Q]"""
        jobs = []
        for prompt, answer in zip(map(_valid, prompts), map(_valid, answers), strict=True):
            # No token is wanted, but many servers refuse to generate none.
            body = {"prompt": prompt + answer, "max_tokens": 1, "echo": True, "logprobs": 1, "temperature": 0}
            jobs.append(Job(self._key("echo", prompt, answer), body, partial(self._mean, prompt, answer)))
        return [mean for mean, _ in self._ask_all(lambda client: client.completions, jobs, "score")]

    def _mean(self, prompt: str, answer: str, reply: Any) -> float:
        values = answer_tokens(reply, prompt, answer)
        if not values:
            needs = "scoring needs a completions API with echo and logprobs, such as vLLM's"
            raise UserError(f"{self.base_url}: gives no log-probabilities of the prompt; {needs}")
        return sum(values) / len(values)

    def _key(self, *parts: str) -> str:
        return fingerprint(self.base_url, self.model, fingerprint(*parts))

    def _ask_all(self, api: Callable[[Any], Any], jobs: Sequence[Job], desc: str) -> list[tuple[Any, float | None]]:
        """What is made of the reply to each job, and its seconds; None for a reply of an earlier run or job."""
        known = self._store.get({job.key for job in jobs})
        if number := sum(job.key in known for job in jobs):
            log.info("%s: %d of %d replies were kept from an earlier run", self.base_url, number, len(jobs))
        missing = {job.key: job for job in jobs if job.key not in known}
        waiting, seconds = iter(missing.values()), {}

        async def ask(send: Callable[..., Any]) -> None:
            for job in waiting:
                started = time.perf_counter()
                known[job.key] = await self._send(partial(send, model=self.model), job)
                seconds[job.key] = time.perf_counter() - started
                self._store.put({job.key: known[job.key]})
                bar.update()

        async def ask_all(client: Any) -> None:
            create = api(client).with_raw_response.create
            async with asyncio.TaskGroup() as group:
                for _ in range(min(self.flags.endpoint_concurrency, len(missing))):
                    group.create_task(ask(create))

        if missing:
            self._repeated = 0
            with progress(total=len(missing), desc=desc, unit="q", disable=not distributed.is_main()) as bar:
                self._run(ask_all)
            if self._repeated:
                log.info("%s: %d requests were sent again", self.base_url, self._repeated)
        return [(known[job.key], seconds.pop(job.key, None)) for job in jobs]

    def _run(self, work: Callable[[Any], Any]) -> Any:
        import openai  # a second that a run without servers does not need

        async def give_up_without_quota(response: Any) -> None:
            if response.status_code == 429 and b"insufficient_quota" in await response.aread():
                response.headers["x-should-retry"] = "false"

        async def run() -> Any:
            async with openai.AsyncOpenAI(
                base_url=self.base_url,
                api_key=self.flags.endpoint_api_key or os.environ.get("OPENAI_API_KEY") or "none",
                timeout=openai.Timeout(TIMEOUT, connect=5.0),
                max_retries=self.flags.endpoint_retries,  # after 0.5, 1, 2 ... 8 s, or when the server says
                http_client=openai.DefaultAsyncHttpxClient(event_hooks={"response": [give_up_without_quota]}),
            ) as client:
                if not self._reached:  # if nobody is there, say it now and not after many retries
                    with suppress(openai.APIStatusError):
                        await client.with_options(max_retries=1).models.with_raw_response.list()
                    self._reached = True
                return await work(client)

        try:
            return asyncio.run(run())
        except (openai.APIError, ExceptionGroup) as error:
            first = error.exceptions[0] if isinstance(error, ExceptionGroup) else error
            raise self._failure(first) if isinstance(first, openai.APIError) else first from None

    async def _send(self, send: Callable[..., Any], job: Job) -> Any:
        """What is made of the reply. The openai client repeats what fails; this, what brings an unreadable reply."""
        for attempt in range(self.flags.endpoint_retries + 1):
            reply = await send(**job.body)
            self._repeated += reply.retries_taken + (attempt > 0)
            try:
                return job.parse(reply.http_response.json())
            except (LookupError, TypeError, ValueError, AttributeError, RecursionError):
                if attempt < self.flags.endpoint_retries:
                    await asyncio.sleep(PAUSE * 2 ** min(attempt, 3))
        said = one_line(reply.http_response.text[:200]) or "empty"
        raise UserError(f"{self.base_url}: not the reply of an OpenAI-compatible server ({said}), {_asked(attempt)}")

    def _failure(self, error: Any) -> UserError:
        asked = _asked(int(error.request.headers.get("x-stainless-retry-count", 0)))
        cause = error.__cause__ or error  # of the HTTP library under openai, which has changed; its names have not
        if status := getattr(error, "status_code", 0):
            said = error.body
            if isinstance(said, dict):
                said = next((said[name] for name in ("message", "detail") if said.get(name)), said)
            said = one_line(said or error.response.text or error.response.reason_phrase)
            advice = asked if status in (408, 409, 429) or status >= 500 else "the server refuses the request"
            what = f"{status}, {said}; {ADVICE.get(status, advice)}"
        elif "Timeout" in type(cause).__name__ and type(cause).__name__ != "ConnectTimeout":
            what = f"no answer within {TIMEOUT:g} seconds, {asked}; lower --endpoint_concurrency"
        else:
            reason = one_line(cause) or "connection lost"
            what = f"cannot be reached ({reason}), {asked}; is a server running at this URL?"
        return UserError(f"{self.base_url}: {what}")


def _asked(retries: int) -> str:
    return f"asked {retries + 1} time{'s' if retries else ''}"


def chat_reply(reply: Any) -> tuple[str, int]:
    """The text of a chat completion, and how many tokens it has."""
    text = reply["choices"][0]["message"]["content"] or ""  # null when all tokens went into reasoning
    tokens = (reply.get("usage") or {}).get("completion_tokens")
    return text.strip(), len(text.split()) if tokens is None else tokens


def answer_tokens(reply: Any, prompt: str, answer: str) -> list[float]:
    """The log-probabilities of the answer's tokens in a completion that echoes prompt + answer; none if it does not."""
    choice = reply["choices"][0]
    logprobs = choice.get("logprobs") or {}
    tokens, values, offsets = (logprobs.get(name) or [] for name in ("tokens", "token_logprobs", "text_offset"))
    if len(tokens) < 2 or len(choice["text"]) < len(prompt + answer):
        return []
    # A server may show, and count, a token that it puts before every text.
    start = len(prompt) + (0 if prompt.startswith(tokens[0].strip()) else offsets[1] - offsets[0])
    end = start + len(answer)
    generated = (reply.get("usage") or {}).get("completion_tokens", 1)  # one token may stand behind the answer
    last = len(tokens) - (generated if generated and offsets[-generated] >= end else 0)
    ends = [*offsets[1:last], end]
    rows = zip(values[:last], offsets[:last], ends, strict=True)
    return [value for value, begin, stop in rows if value is not None and (begin >= start or stop > start)]


def _valid(text: str) -> str:
    """Text that UTF-8 can carry: half a surrogate pair, which JSON files may hold, becomes a question mark."""
    return text.encode("utf-8", "replace").decode("utf-8")


def estimated_tokens(text: str) -> int:
    """About how many tokens a text has, where the tokenizer stays with its server."""
    return -(-len(text.encode("utf-8", "replace")) // BYTES_PER_TOKEN)


def check_price(flag: str, price: Sequence[float]) -> None:
    if len(price) not in (0, 2) or min(price, default=0) < 0:
        raise UserError(f"--{flag}: takes two numbers, dollars for a million tokens in and out")


def cost(asked: str, conversations: Sequence[list[dict[str, str]]], reply_tokens: int, price: Sequence[float]) -> str:
    """What asking will take at most, in tokens and, at a price for a million in and out, in dollars."""
    given = sum(estimated_tokens(turn["content"]) for turns in conversations for turn in turns)
    written = reply_tokens * len(conversations)
    dollars = f", at most ${(given * price[0] + written * price[1]) / 1e6:.2f}" if price else ""
    return f"{asked}, some {given:,} tokens in, at most {written:,} out{dollars}; replies that are kept cost nothing"
