"""The serving engine: one retriever and one reader, which process concurrent requests in batches."""

import asyncio
import copy
import re
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

from rqa.data import Document, Example
from rqa.endpoint.requests import Settings
from rqa.models.loading import not_finite
from rqa.models.reader import NOT_FINITE, LocalReader
from rqa.packing import token_budget_batches
from rqa.retrieval.citations import passage_id
from rqa.retrieval.retriever import PassageRetriever
from rqa.runtime.cli import release_threads

AT_ONCE = 256  # maximum size of a batch
BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, float("inf"))  # seconds
FAMILY = re.compile(r"(\w+?)(_(bucket|sum|count))?(\{.*)?")


class Metrics(Counter[str]):
    """Counters of a server by Prometheus's name, such as `name_total{label="value"}`, and histograms of seconds."""

    def observe(self, name: str, seconds: float) -> None:
        for bound in BOUNDS:
            self[f'{name}_bucket{{le="{f"{bound:g}".replace("inf", "+Inf")}"}}'] += int(seconds <= bound)
        self[f"{name}_count"] += 1
        self[f"{name}_sum"] += seconds  # type: ignore[assignment]

    def text(self, gauges: Mapping[str, float]) -> str:
        """All counters and histograms, and the current values of these gauges."""
        families: dict[str, list[str]] = {}
        for series, value in {**self, **gauges}.items():
            name, kind = FAMILY.fullmatch(series).expand(r"\1 \3").split(" ")  # type: ignore[union-attr]
            kind = "gauge" if series in gauges else "histogram" if kind else "counter"
            families.setdefault(f"# TYPE {name} {kind}", []).append(f"{series} {value}")
        return "\n".join(line for head, lines in families.items() for line in (head, *lines)) + "\n"


class Busy(Exception):
    """The error when too many requests run or wait."""


class Found(NamedTuple):
    """A passage found for a question."""

    rank: int  # from 1
    score: float
    id: str
    document: Document


@dataclass(frozen=True)
class Reply:
    """An answer so far."""

    text: str = ""
    prompt_tokens: int = 0
    tokens: int = 0
    ended: str | None = None  # finish reason: "stop", or "length" if it was cut


class Batched:
    """A thread that works in batches: when it is free, it takes the waiting items that have the first one's `key`."""

    def __init__(self, work: Callable[[list[Any]], Sequence[Any]], key: Callable[[Any], Any], wait: float = 0) -> None:
        self.work, self.key, self.wait = work, key, wait  # `wait`: seconds that the first item waits for others
        self.thread = ThreadPoolExecutor(1)
        self.waiting: list[tuple[Any, Future[Any], float]] = []  # item, result, time of arrival

    def __call__(self, item: Any) -> asyncio.Future[Any]:
        future = Future[Any]()
        self.waiting.append((item, future, time.monotonic()))
        asyncio.get_running_loop().call_soon(self.thread.submit, self._run)  # after other items of this moment
        return asyncio.wrap_future(future)

    def _run(self) -> None:
        if not self.waiting:  # an earlier batch took them
            return
        first, _, since = self.waiting[0]
        time.sleep(max(since + self.wait - time.monotonic(), 0))
        batch = [each for each in self.waiting if self.key(each[0]) == self.key(first)][:AT_ONCE]
        for each in batch:
            self.waiting.remove(each)
        if kept := [(item, future) for item, future, _ in batch if future.set_running_or_notify_cancel()]:
            self._do(kept)
            release_threads()  # the other batches' thread may be working

    def _do(self, batch: list[tuple[Any, Future[Any]]]) -> None:
        try:
            for (_, future), result in zip(batch, self.work([item for item, _ in batch]), strict=True):
                future.set_result(result)
        except Exception as error:
            if len(batch) == 1:
                return batch[0][1].set_exception(error)
            for pair in batch:  # one by one: only the items that cause the error fail
                self._do([pair])


@dataclass(eq=False)
class _Job:
    """An answer in progress, and the function that receives it."""

    prompt: Any
    settings: Settings
    show: Callable[[Reply], None]
    limit: int
    prompt_tokens: int
    shown: int = 0  # number of tokens shown, so that none is shown again if the batch is repeated
    left: bool = False  # whether the client has gone


class Engine:
    """Searches and answers many requests at once; each gets the same result as alone. `reader` may be None."""

    def __init__(self, retriever: PassageRetriever, reader: Any, max_queue: int = 64, wait: float = 0.02) -> None:
        """`wait`: seconds that the first question of a batch waits for others."""
        self.retriever, self.reader, self.max_queue, self.metrics = retriever, reader, max_queue, Metrics()
        self._searching = Batched(self._search, lambda item: item[1])
        self._generating = Batched(self._generate, lambda job: job.settings.sampling, wait)
        self.running = 0  # number of admitted requests
        release_threads()  # those of the thread that loaded the models

    @property
    def waiting(self) -> int:
        """Number of questions and prompts that wait for a batch."""
        return len(self._searching.waiting) + len(self._generating.waiting)

    @contextmanager
    def admitted(self) -> Iterator[None]:
        """Count a request as running inside the block; `Busy` if there are too many."""
        if self.running >= self.max_queue:
            raise Busy("Too many requests are waiting; try again in a moment")
        self.running += 1
        try:
            yield
        finally:
            self.running -= 1

    async def search(self, questions: Sequence[str], k: int) -> list[list[Found]]:
        """The k best passages for each question. [Q] -> [Q] lists"""
        return list(await asyncio.gather(*(self._searching((question, k)) for question in questions)))

    async def in_turn(self, work: Callable[..., Any], *arguments: Any) -> Any:
        """Run a function in the retriever's thread, where it may use the encoder and the tokenizer."""

        def released() -> Any:
            try:
                return work(*arguments)
            finally:
                release_threads()

        return await asyncio.get_running_loop().run_in_executor(self._searching.thread, released)

    def _search(self, items: list[tuple[str, int]]) -> list[list[Found]]:
        began, documents = time.perf_counter(), self.retriever.documents
        hits = self.retriever.retrieve([question for question, _ in items], items[0][1])
        self.metrics.observe("rqa_retrieval_seconds", time.perf_counter() - began)
        found = []
        for ids, scores in zip(hits.ids.tolist(), hits.scores.tolist(), strict=True):
            row = [(documents[place], place, score) for place, score in zip(ids, scores, strict=True) if place >= 0]
            found.append([Found(n, score, passage_id(i, d), d) for n, (d, i, score) in enumerate(row, start=1)])
        return found

    async def reply(
        self, example: Example, passages: Sequence[Document], settings: Settings = Settings()
    ) -> AsyncIterator[Reply]:
        """Yield the growing answer: empty when it is accepted, at last with its finish reason. May raise `DoesNotFit`.

        Close it (`aclosing`) when the client has gone. The last characters are held back, as they may begin a stop
        string.
        """
        answering = self._local if isinstance(self.reader, LocalReader) else self._remote
        began, first = time.perf_counter(), True
        reply, hold = Reply(), max(map(len, settings.stop), default=1) - 1
        async with aclosing(answering(example, passages, settings)) as replies:
            async for reply in replies:
                if first and reply.text:
                    self.metrics.observe("rqa_first_token_seconds", time.perf_counter() - began)
                    first = False
                if ends := [place for text in settings.stop if (place := reply.text.find(text)) >= 0]:
                    reply = replace(reply, text=reply.text[: min(ends)], ended="stop")
                elif not reply.ended:
                    reply = replace(reply, text=reply.text[: max(len(reply.text) - hold, 0)])
                if reply.ended:
                    break
                yield reply
        self.metrics.observe("rqa_generation_seconds", time.perf_counter() - began)
        self.metrics["rqa_generated_tokens_total"] += reply.tokens
        yield reply

    async def _remote(self, example: Example, passages: Sequence[Document], settings: Settings) -> AsyncIterator[Reply]:
        from rqa.endpoint.streaming import stream

        prompter = self.reader.prompter
        messages = await self.in_turn(prompter.messages, example, passages)
        limit = min(settings.max_tokens or prompter.arguments.max_new_tokens, prompter.arguments.max_new_tokens)
        options = {"temperature": settings.temperature or 0.0} | ({"top_p": settings.top_p} if settings.top_p else {})
        async with aclosing(stream(self.reader.endpoint, messages, limit, options)) as parts:
            async for text, prompt_tokens, tokens, ended in parts:
                yield Reply(text, prompt_tokens, tokens, ended)

    async def _local(self, example: Example, passages: Sequence[Document], settings: Settings) -> AsyncIterator[Reply]:
        prompt, loop = await self.in_turn(self.reader.encode, example, passages), asyncio.get_running_loop()
        replies: asyncio.Queue[Reply | None] = asyncio.Queue()
        limit = min(settings.max_tokens or self.reader.most, self.reader.most)
        taken = len(prompt) if isinstance(prompt, list) else self.reader.cost(prompt)
        job = _Job(prompt, settings, partial(loop.call_soon_threadsafe, replies.put_nowait), limit, taken)
        done = self._generating(job)
        done.add_done_callback(lambda _: replies.put_nowait(None))
        try:
            yield Reply()
            while reply := await replies.get():
                yield reply
            await done
        finally:
            job.left = True
            done.cancel()

    def _generate(self, jobs: list[_Job]) -> list[None]:
        reader = copy.copy(self.reader)
        reader.flags = replace(reader.flags, **jobs[0].settings.sampling or {})
        costs = [reader.cost(job.prompt) for job in jobs]
        for chosen in token_budget_batches(costs, reader.flags.generation_batch_tokens, padded=True):
            if batch := [jobs[place] for place in chosen if not jobs[place].left]:
                self._answer(reader, batch)
        return [None] * len(jobs)

    def _answer(self, reader: LocalReader, batch: list[_Job]) -> None:
        began = time.perf_counter()

        def watch(rows: list[list[int]]) -> list[bool]:
            for job, ids in zip(batch, rows, strict=True):
                if job.shown < len(ids) < job.limit and not job.left:
                    job.shown = len(ids)
                    text = reader.prompter.decode(ids)
                    if not text.endswith("\ufffd"):  # perhaps an incomplete character
                        job.show(Reply(text, job.prompt_tokens, len(ids)))
            return [job.left or len(ids) >= job.limit for job, ids in zip(batch, rows, strict=True)]

        made = reader.generate([job.prompt for job in batch], max(job.limit for job in batch), watch)
        self.metrics["rqa_generation_busy_seconds_total"] += time.perf_counter() - began
        self.metrics["rqa_generation_batches_total"] += 1
        for job, ids in zip(batch, made, strict=True):
            if NOT_FINITE in ids:
                raise not_finite(reader.model, "answer", "a question")
            kept, ended = ids[: job.limit], "length" if len(ids) >= job.limit else "stop"
            job.show(Reply(reader.prompter.decode(kept), job.prompt_tokens, len(kept), ended))
