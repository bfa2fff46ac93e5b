"""What is read of a server's stream while it comes, and what a broken one is told as."""

import asyncio
from collections.abc import Callable

import pytest
from openai_server import Json, OpenAIServer, error, event
from starlette.responses import StreamingResponse

from rqa.endpoint.client import PREFIX, Endpoint, EndpointArguments, Refused
from rqa.endpoint.streaming import stream

Parts = list[tuple[str, int, int, str | None]]


def ask(server: OpenAIServer, question: str = "What is it?", **options: object) -> Parts:
    async def collect() -> Parts:
        endpoint = Endpoint(PREFIX + server.url, EndpointArguments(endpoint_api_key="a-secret"))
        return [part async for part in stream(endpoint, [{"role": "user", "content": question}], 20, options)]

    return asyncio.run(collect())


def events(*values: Json) -> Callable[[], StreamingResponse]:
    return lambda: StreamingResponse(iter(map(event, values)), media_type="text/event-stream")


def delta(text: str | None, ended: str | None = None) -> Json:
    return {"choices": [{"delta": {"content": text}, "finish_reason": ended}]}


def test_the_text_grows_to_what_the_server_says(server: OpenAIServer) -> None:
    server.say = lambda messages: f"You said {messages[-1]['content']}"
    texts = ["", "You", "You said", "You said Hello", "You said Hello"]
    assert [(text, ended) for text, _, _, ended in ask(server, "Hello", temperature=0.5)] == [
        *((text, None) for text in texts[:-1]), (texts[-1], "stop")
    ]  # fmt: skip
    assert ask(server, "Hello")[-1][1:3] == (7, 3)
    (body, _) = server.of("chat/completions")
    assert (body["temperature"], body["max_tokens"], body["model"]) == (0.5, 20, "tiny")


@pytest.mark.parametrize(("reason", "ended"), [("stop", "stop"), ("length", "length"), ("content_filter", "length")])
def test_why_it_ended_and_tokens_of_a_server_that_counts_none(server: OpenAIServer, reason: str, ended: str) -> None:
    server.faults = [events(delta("a"), delta("b", reason))]
    assert ask(server)[-1] == ("ab", 0, 2, ended)


@pytest.mark.parametrize(
    ("parts", "seen"),
    [
        (["<th", "ink>", "Hm", "</thi", "nk>", "It is", " it."], {"", "It is", "It is it."}),
        (["a\ud83d", "\ude00", "\udfff b"], {"", "a😀", "a😀\ufffd b"}),
    ],
)
def test_neither_thoughts_nor_half_a_mark_or_a_character_are_shown(
    server: OpenAIServer, parts: list[str], seen: set[str]
) -> None:
    server.faults = [events(*map(delta, parts), delta(None, "stop"))]
    assert {text for text, *_ in ask(server)} == seen


def test_a_reply_without_end_is_cut(server: OpenAIServer) -> None:
    server.say = lambda messages: "word " * 10_000
    text, *_, ended = ask(server)[-1]
    assert ended == "length"
    assert len(text) < 20 * 32 + 10


def test_a_setting_that_a_server_refuses_takes_its_other_name(server: OpenAIServer) -> None:
    server.faults = [lambda: error(400, "Unsupported parameter", param="max_tokens")]
    assert ask(server)[-1][-1] == "stop"
    assert [body.get("max_completion_tokens") for body in server.of("chat/completions")] == [None, 20]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (events(delta("a"), {"error": {"message": "out of memory"}}), "out of memory"),
        (events(delta("a")), "it ends before the reply does"),
        (events({"choices": 3}), "not the stream of an OpenAI-compatible server"),
        (lambda: StreamingResponse(iter(["data: {\n\n"]), media_type="text/event-stream"), "not the stream"),
        (lambda: error(400, "no, a-secret"), "400, no, ***"),
    ],
)
def test_what_a_broken_stream_is_told_as(
    server: OpenAIServer, fault: Callable[[], StreamingResponse], message: str
) -> None:
    server.faults = [fault]
    with pytest.raises(Refused, match=server.url) as caught:
        ask(server)
    assert message in str(caught.value)
