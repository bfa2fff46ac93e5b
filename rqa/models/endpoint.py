"""Questions to any OpenAI-compatible server: many at once, each reply kept when it comes."""

import asyncio
import json
import logging
import os
import time
from collections.abc import Awaitable, Callable, Collection, Coroutine, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

from tqdm import tqdm

from rqa.models.replies import Reply, answer_tokens, chat_reply
from rqa.runtime import distributed
from rqa.runtime.errors import UserError, check_bounds
from rqa.runtime.files import cache_root, fingerprint
from rqa.runtime.store import Store

if TYPE_CHECKING:
    from rqa.models.server import Server

log = logging.getLogger(__name__)

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
        from rqa.models.server import Server  # with the openai package, which few runs need and all would wait for

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
