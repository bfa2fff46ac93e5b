"""What an engine answers to many at once against its reader and retriever asked alone."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import Any

import pytest

from rqa.data import Document, Example
from rqa.endpoint.requests import Settings
from rqa.models.reader import GenerationArguments
from rqa.recipe.system import ReaderArguments, load_reader
from rqa.retrieval.citations import cite, passage_id, passage_of
from rqa.retrieval.hybrid import LexicalRetriever
from rqa.serving.engine import Engine, Reply


@pytest.fixture(params=["decoder", "fid"])
def engine(request: pytest.FixtureRequest, lm_path: str, t5_path: str, documents: list[Document]) -> Engine:
    path = lm_path if request.param == "decoder" else t5_path
    flags = ReaderArguments(max_seq_length=256, max_new_tokens=12, max_decoder_seq_length=12, dtype="float32")
    return Engine(LexicalRetriever(documents), load_reader(path, flags))


async def replies(stream: AsyncIterator[Reply]) -> list[Reply]:
    return [reply async for reply in stream]


def test_what_arrives_together_is_answered_as_alone(engine: Engine, examples: list[Example]) -> None:
    async def ask(example: Example, limit: int) -> tuple[list[Reply], list[str]]:
        (found,) = await engine.search([example.question], 3)
        answering = engine.reply(example, [each.document for each in found], Settings(max_tokens=limit))
        return await replies(answering), [each.id for each in found]

    async def together() -> list[tuple[list[Reply], list[str]]]:
        return await asyncio.gather(*(ask(example, 4 + i % 9) for i, example in enumerate(examples)))

    reader, retriever = engine.reader, engine.retriever
    for i, (example, (got, ids)) in enumerate(zip(examples, asyncio.run(together()), strict=True)):
        hits = retriever.retrieve([example.question], 3)
        (passages,) = retriever.documents_of(hits)
        assert ids == [passage_id(n, retriever.documents[n]) for n in hits.ids[0].tolist() if n >= 0]
        (alone,) = reader.generate([reader.encode(example, passages)])
        assert got[-1].text == reader.prompter.decode(alone[: 4 + i % 9])
        assert got[-1].ended == ("length" if len(alone) >= 4 + i % 9 else "stop")
        assert all(got[-1].text.startswith(reply.text) for reply in got)
    assert engine.metrics["rqa_generation_batches_total"] < len(examples)
    assert engine.metrics["rqa_retrieval_seconds_count"] == 1


def test_who_leaves_stops_the_generation(engine: Engine, examples: list[Example]) -> None:
    steps: list[int] = []
    generate = type(engine.reader).generate

    def counted(self: Any, prompts: Any, most: Any, watch: Callable[..., list[bool]]) -> Any:
        return generate(self, prompts, most, lambda rows: steps.append(1) or watch(rows))

    async def leave() -> None:
        async with aclosing(engine.reply(examples[0], [])) as answering:
            async for _ in answering:
                break
        await asyncio.get_running_loop().run_in_executor(engine._generating.thread, int)  # behind it

    engine.reader.most = engine.reader.loop = 200  # of 256 positions
    engine.reader.prompter.stop_ids, engine.reader.prompter.end_token = [10**6], 1  # which no reader here says
    engine.reader.__class__ = type("Counted", (type(engine.reader),), {"generate": counted})
    asyncio.run(replies(engine.reply(examples[0], [])))
    assert (whole := len(steps)) > 190
    asyncio.run(leave())
    assert len(steps) - whole < 100


def test_one_bad_question_costs_the_others_nothing(engine: Engine, examples: list[Example]) -> None:
    def search(questions: list[str], k: int) -> Any:
        if "bad" in questions:
            raise ValueError("bad")
        return retrieve(questions, k)

    async def ask() -> list[Any]:
        texts = [examples[0].question, "bad", examples[1].question]
        return await asyncio.gather(*(engine.search([text], 2) for text in texts), return_exceptions=True)

    retrieve = engine.retriever.retrieve
    engine.retriever.retrieve = search
    first, bad, second = asyncio.run(ask())
    assert [len(first[0]), len(second[0])] == [2, 2]
    assert isinstance(bad, ValueError)


def test_a_batch_that_is_done_again_shows_nothing_twice(engine: Engine, examples: list[Example]) -> None:
    generate = type(engine.reader).generate

    def fails_together(self: Any, prompts: Any, most: Any, watch: Callable[..., list[bool]]) -> Any:
        made = generate(self, prompts, most, watch)
        return made if len(prompts) == 1 else 1 / 0

    async def ask() -> list[list[Reply]]:
        return await asyncio.gather(*(replies(engine.reply(example, [])) for example in examples[:2]))

    engine.reader.__class__ = type("Failing", (type(engine.reader),), {"generate": fails_together})
    for got in asyncio.run(ask()):
        texts = [reply.text for reply in got]
        assert texts == sorted(texts, key=len)
        assert got[-1].ended


def test_a_stop_string_is_never_shown(engine: Engine, examples: list[Example]) -> None:
    whole = asyncio.run(replies(engine.reply(examples[0], [])))[-1].text
    stop = whole[len(whole) // 2 :][:3]
    got = asyncio.run(replies(engine.reply(examples[0], [], Settings(stop=(stop,)))))
    assert got[-1] == Reply(whole.partition(stop)[0], got[-1].prompt_tokens, got[-1].tokens, "stop")
    assert all(stop[:1] not in reply.text[len(got[-1].text) :] for reply in got)


def test_requests_sample_as_they_ask_and_only_those_that_are_alike_share_a_batch(
    engine: Engine, examples: list[Example]
) -> None:
    seen: list[tuple[GenerationArguments, int]] = []
    answer = engine._answer

    def watched(reader: Any, batch: Any) -> None:
        seen.append((reader.flags, len(batch)))
        answer(reader, batch)

    async def ask() -> None:
        settings = [Settings(), Settings(temperature=0.5), Settings(), Settings(temperature=0.5, top_p=0.9)]
        await asyncio.gather(*(replies(engine.reply(examples[0], [], each)) for each in settings))

    engine._answer = watched
    asyncio.run(ask())
    asked = [(flags.do_sample, flags.temperature, flags.top_p, size) for flags, size in seen]
    assert asked == [(False, 1.0, 1.0, 2), (True, 0.5, 1.0, 1), (True, 0.5, 0.9, 1)]


def test_sentences_cite_the_passage_that_says_the_same() -> None:
    passages = [Document("Cats sleep most of the day."), Document("The harbour of Trieste trades in coffee, 1.5 tons.")]
    text = "The harbour trades in coffee. Nobody knows why! Cats sleep.\nAs told [1][2]. Yes [7]."
    cited = [(text[c.start : c.end], c.number) for c in cite(text, passages)]
    told = "As told [1][2]."
    assert cited == [("The harbour trades in coffee.", 2), ("Cats sleep.", 1), (told, 1), (told, 2)]
    assert cite("Coffee.", []) == []


def test_a_passage_is_found_by_its_name_while_it_is_the_same(documents: list[Document]) -> None:
    name = passage_id(3, documents[3])
    assert passage_of(documents, name) == documents[3]
    assert passage_of([documents[0], *documents], name) is None
    for bad in ("", "3", "-1", "3-", "99999999999999999999-aa", "²-1", "../etc", f"{len(documents)}-abcd"):
        assert passage_of(documents, bad) is None
