"""A server is asked over real sockets: in order, at once, again when it fails, and never twice for what is known."""

import asyncio
import base64
import gzip
import json
import logging
import math
import os
import re
import signal
import socket
import threading
import time
import tracemalloc
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from email.utils import formatdate
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai_server import OpenAIServer, error, half_a_reply, serve
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response, StreamingResponse

from rqa.data import Answer
from rqa.endpoint.client import UNREADABLE, Endpoint, EndpointArguments, answer_tokens, chat_reply, read_reply
from rqa.evaluation.judge import parse_verdict
from rqa.runtime.errors import UserError
from rqa.runtime.text import parse_json

WORDS = [f"word {number}" for number in range(12)]


def connect(server: OpenAIServer, **settings: object) -> Endpoint:
    return Endpoint(f"openai::{server.url}", EndpointArguments(**{f"endpoint_{k}": v for k, v in settings.items()}))


def say(*texts: str) -> list[list[dict[str, str]]]:
    return [[{"role": "user", "content": text}] for text in texts]


def texts(replies: list[Answer]) -> list[str]:
    return [reply.text for reply in replies]


@pytest.mark.parametrize("concurrency", [1, 6])
def test_as_many_requests_as_allowed_are_in_flight_and_replies_keep_the_order(
    concurrency: int, server: OpenAIServer
) -> None:
    server.delay = 0.05
    replies = connect(server, concurrency=concurrency).ask(say(*WORDS), max_tokens=7)
    assert [(reply.text, reply.num_tokens) for reply in replies] == [(f"You said: {word}", 4) for word in WORDS]
    assert all(0.05 <= reply.seconds < 5 for reply in replies)
    body = server.of("chat/completions")[0]
    assert body == {"model": "tiny", "messages": body["messages"], "max_tokens": 7, "temperature": 0.0}
    assert server.most_at_once == concurrency


def test_a_question_is_sent_and_timed_once_by_one_run_and_by_the_next(
    server: OpenAIServer, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "rqa"):
        replies = connect(server).ask(say("a", "b", "a"), 7)
        assert "kept" not in caplog.text
        replies += connect(server).ask(say("b", "c", "b"), 7)
    assert [(reply.text, reply.num_tokens) for reply in replies] == [(f"You said: {word}", 3) for word in "ababcb"]
    assert [reply.seconds is not None for reply in replies] == [True, True, False, False, True, False]
    assert sorted(server.questions) == ["a", "b", "c"]
    assert "2 of 3 replies were kept from an earlier run" in caplog.text


def test_whatever_decides_a_reply_asks_anew(server: OpenAIServer) -> None:
    server.models = ["tiny", "other"]
    for model, role, tokens in (("tiny", "user", 7), ("other", "user", 7), ("tiny", "user", 8), ("tiny", "system", 7)):
        connect(server, model=model).ask([[{"role": role, "content": "a"}]], tokens)
    assert server.questions == ["a"] * 4


FAULTS: dict[str, tuple[Callable[[], Response], str]] = {
    "too many requests": (lambda: error(429, "slow down"), "429, slow down; asked 3 times"),
    "conflict": (lambda: error(409, "busy"), "409, busy; asked 3 times"),
    "internal error": (lambda: error(500, "out of memory"), "500, out of memory; asked 3 times"),
    "overloaded": (lambda: HTMLResponse("<h1>Bad gateway</h1>", 502), "502, .*Bad gateway.*; asked 3 times"),
    "dropped connection": (half_a_reply, r"cannot be reached \(.+\), asked 3 times"),
    "slow": (lambda: time.sleep(1) or Response(), "no answer within 0.5 seconds, asked 3 times; lower"),
    "no JSON": (lambda: Response("{", media_type="application/json"), r"not the reply .*: \{\), asked 3 times"),
    "no gzip": (
        lambda: Response("a" * 9, headers={"content-encoding": "gzip"}),
        "not the .*: its compression is broken",
    ),
    "a web page": (lambda: HTMLResponse("<h1>Welcome</h1>"), "not the reply .*Welcome.*, asked 3 times"),
    "not text": (lambda: JSONResponse({"choices": [{"message": {"content": {"a": 1}}}]}), "not the reply .*, asked 3"),
    "too deep": (lambda: Response("[" * 10**5, media_type="application/json"), "not the reply .*, asked 3"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_may_pass_is_asked_again_and_what_does_not_pass_is_one_line(
    name: str, server: OpenAIServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault, expected = FAULTS[name]
    if name == "slow":
        monkeypatch.setattr("rqa.endpoint.client.TIMEOUT", 0.5)
    server.faults = [None, fault, fault]
    assert texts(connect(server, concurrency=1, retries=2).ask(say("a", "b"), 7)) == ["You said: a", "You said: b"]
    assert server.questions == ["a", "b", "b", "b"]
    server.faults = [fault] * 3
    with pytest.raises(UserError, match=rf"^http://127\.0\.0\.1:\d+/v1: {expected}") as caught:
        connect(server, retries=2).ask(say("c"), 7)
    assert server.questions[4:] == ["c"] * 3
    assert "\n" not in str(caught.value)


def test_the_server_says_how_long_to_wait(server: OpenAIServer) -> None:
    server.faults = [lambda: error(429, "wait", retry_after=formatdate(time.time() + 2, usegmt=True))]
    connect(server).ask(say("a"), 7)
    first, second = (seen for seen in server.seen if seen.path == "chat/completions")
    assert second.at - first.at >= 0.5


def test_what_will_not_pass_is_asked_once(server: OpenAIServer) -> None:
    tomorrow = error(429, "wait for tomorrow", retry_after="86400")
    for fault, expected in (
        (tomorrow, "429, wait for tomorrow; asked 1 time"),
        (error(429, "no money left", code="insufficient_quota"), "429, no money left; asked 1 time"),
        (error(403, "not for you"), "403, not for you; the key is refused"),
        (error(400, "no echo"), "400, no echo; the server refuses the request"),
        (JSONResponse({"detail": "Not Found"}, 404), "404, Not Found; no such model or path"),
    ):
        server.seen.clear()
        server.faults = [lambda fault=fault: fault]
        with pytest.raises(UserError, match=expected):
            connect(server).ask(say("a"), 7)
        assert server.questions == ["a"]


def test_the_key_comes_from_the_flag_or_the_environment(server: OpenAIServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server.key = "secret"
    with pytest.raises(UserError, match=r"401, Incorrect API key provided; the key is refused: give its flag, or"):
        connect(server, api_key="wrong").ask(say("a"), 7)
    connect(server, api_key="secret").ask(say("a"), 7)
    monkeypatch.setenv("OPENAI_API_KEY", "secret\n")
    monkeypatch.setenv("OPENAI_BASE_URL", "https://127.0.0.1/v1")
    with pytest.raises(UserError, match="401"):  # no other host gets it
        connect(server).ask(say("b"), 7)
    assert server.seen[-1].key == "none"
    monkeypatch.setenv("OPENAI_BASE_URL", server.url)
    connect(server).ask(say("b"), 7)
    assert "secret" not in repr(EndpointArguments(endpoint_api_key="secret"))


def test_the_model_is_the_only_one_listed_or_must_be_named(server: OpenAIServer) -> None:
    assert connect(server).model == "tiny"
    server.models = ["tiny", "other"]
    with pytest.raises(UserError, match="tiny, other; name it with --endpoint_model"):
        connect(server).ask(say("a"), 7)
    with pytest.raises(UserError, match="404, The model `third` does not exist; no such model"):
        connect(server, model="third").ask(say("a"), 7)


def test_nobody_at_the_address_is_one_line_at_once(server: OpenAIServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # as long as the client waits by itself
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    for model in (None, "tiny"):
        started = time.monotonic()
        with pytest.raises(UserError, match=r"/v1: cannot be reached \(.+\), asked 2 times; is a server running"):
            Endpoint(f"openai::{url}", EndpointArguments(endpoint_model=model)).ask(say("a"), 7)
        assert time.monotonic() - started < 5


def test_settings_without_sense_are_named(server: OpenAIServer) -> None:
    for spec in ("localhost:8000", "", "ftp://host/v1", "http://host:x/v1", "http://[::1/v1"):
        with pytest.raises(UserError, match=re.escape(f"openai::{spec}: not a server; write openai::http://host:port")):
            Endpoint(f"openai::{spec}")
    with pytest.raises(UserError, match=r"^openai::http://host/v1\?\.\.\.: not a server"):
        Endpoint("openai::http://host/v1?key=secret#secret")
    for host in ("999.1.1.1", "a..b", "x" * 99 + ".de", "host:80000"):
        with pytest.raises(UserError, match=r"not a server's URL|cannot be reached"):
            Endpoint(f"openai::http://{host}/v1").ask(say("a"), 7)
    with pytest.raises(UserError, match=r"^http://host/v1: its API key has characters that no key has; copy"):
        Endpoint("openai::http://user:word@host/v1", EndpointArguments(endpoint_api_key="schlüssel"))
    with pytest.raises(UserError, match="--endpoint_concurrency 0: must be at least 1"):
        EndpointArguments(endpoint_concurrency=0)


def test_ctrl_c_loses_the_requests_in_flight_and_no_other(server: OpenAIServer) -> None:
    interrupted = threading.Event()

    def too_late() -> Response:
        interrupted.wait(10)
        return error(500, "too late")

    def interrupt() -> None:
        while len(server.questions) < 8:
            time.sleep(0.005)
        os.kill(os.getpid(), signal.SIGINT)

    server.faults = [None] * 6 + [too_late] * 2
    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        connect(server, concurrency=2).ask(say(*WORDS), 7)
    interrupted.set()
    thread.join()
    server.seen.clear()
    assert texts(connect(server).ask(say(*WORDS), 7)) == [f"You said: {word}" for word in WORDS]
    assert len(server.questions) == len(WORDS) - 6


def test_text_that_utf8_cannot_carry_is_sent_all_the_same(server: OpenAIServer) -> None:
    assert texts(connect(server).ask(say("half \ud83d a pair, 木 and 🙂"), 7)) == ["You said: half � a pair, 木 and 🙂"]


@pytest.mark.parametrize(
    ("content", "tokens", "reason", "expected"),
    [
        (None, 5, "length", ("", 5, True)),
        ("<think>\nHm.\n</think>\n\nIn Lund. ", "5", "stop", ("In Lund.", 2, False)),
        ("<think>\nHm, let me", -1, "length", ("", 0, True)),
        ([{"type": "thinking", "thinking": []}, {"type": "text", "text": "In "}, {"type": "text", "text": "Lund"}],
         10**30, None, ("In Lund", 2, False)),
        ("a" * 10**6, 7, "stop", ("a" * 7 * 32, 7, True)),
        ("half \ud83d", True, "stop", ("half \ufffd", 2, False)),
    ],
)  # fmt: skip
def test_replies_are_read_alike_from_the_server_and_from_what_was_kept(
    content: object, tokens: object, reason: str | None, expected: tuple, server: OpenAIServer
) -> None:
    choice = {"message": {"content": content}, "finish_reason": reason}
    body = json.dumps({"choices": [choice], "usage": {"completion_tokens": tokens}})
    server.faults = [lambda: Response(body, media_type="application/json")]
    for _ in range(2):
        (reply,) = connect(server).ask(say("a"), 7)
        assert (reply.text, reply.num_tokens, reply.cut) == expected
    assert len(server.questions) == 1


def test_what_is_kept_unreadably_is_asked_for_again_and_thoughts_of_old_replies_go(server: OpenAIServer) -> None:
    ours = connect(server, model="tiny")
    for kept, expected in ((["<think>Hm.</think>So."], "You said: a"), (["<think>Hm.</think>So.", 4], "So.")):
        ours.ask(say("a"), 7)
        with ours._store._database as database:
            database.execute("UPDATE kept SET value = ?", (json.dumps(kept),))
        assert texts(ours.ask(say("a"), 7)) == [expected]


def test_a_refused_question_costs_itself_alone_and_is_asked_for_again(
    server: OpenAIServer, caplog: pytest.LogCaptureFixture
) -> None:
    filtered = lambda: error(400, "filtered")  # noqa: E731
    replies = [error(status, "not this one") for status in (403, 404, 422, 451, 500)]
    replies += [JSONResponse({"choices": choices}) for choices in ([], [{"message": None}])]
    replies += [Response("no gzip", headers={"content-encoding": "gzip"})]
    lasting = [lambda reply=reply: reply for reply in replies]
    server.faults = [filtered, None, *lasting, None, None, filtered]
    ours = connect(server, concurrency=1, retries=0)
    given = [f"You said: {word}" if number in (1, 10, 11) else "" for number, word in enumerate(WORDS)]
    assert texts(ours.ask(say(*WORDS), 7)) == given
    assert "ask: 9 of 12 requests were refused, and their answers are empty; the first, ...word 0: " in caplog.text
    assert "400, filtered" in caplog.text
    again = texts(connect(server, concurrency=1).ask(say(*WORDS), 7))
    assert again == ["", *(f"You said: {word}" for word in WORDS[1:])]
    assert server.questions[12:] == [word for number, word in enumerate(WORDS) if number not in (1, 10, 11)]
    server.faults = [half_a_reply]
    with pytest.raises(UserError, match="cannot be reached"):
        ours.ask(say("lost"), 7)
    for first in (filtered, lasting[4], lasting[5]):
        server.seen.clear()
        server.faults = [first] * 20
        with pytest.raises(UserError, match=r"filtered|not this one|not the reply"):
            connect(server, concurrency=1, retries=0).ask(say(*map(str, range(20))), 7)
        assert len(server.questions) == 5


def test_what_a_model_refuses_by_name_is_sent_otherwise_and_template_variables_are_sent(server: OpenAIServer) -> None:
    def refuse() -> Response:
        body = server.seen[-1].body
        if "max_tokens" in body:
            return error(400, "Unsupported: `max_tokens`; use 'max_completion_tokens'")
        if "temperature" in body:
            return error(400, "Only the default is supported", param="temperature")
        return JSONResponse({"choices": [{"message": {"content": "So."}}]})

    server.faults = [refuse] * 9
    ours = Endpoint(f"openai::{server.url}", EndpointArguments(endpoint_concurrency=1), {"enable_thinking": False})
    assert texts(ours.ask(say("a", "b"), 7)) == ["So.", "So."]
    bodies = [sorted(body.keys() - {"messages", "model"}) for body in server.of("chat/completions")]
    assert bodies[2:] == [["chat_template_kwargs", "max_completion_tokens"]] * 2
    repeated = {"message": "Filtered: what is the temperature in Lund?", "request": {"temperature": 0}}
    for said in (repeated, repeated | {"param": "prompt", "message": "'temperature'"}, repeated | {"message": None}):
        server.faults = [lambda said=said: JSONResponse({"error": said}, 400)] * 2
        with pytest.raises(UserError, match="400, "):
            connect(server).ask(say("c"), 7)
        assert server.of("chat/completions")[-1]["temperature"] == 0


def slowly() -> Response:
    async def body() -> AsyncIterator[bytes]:
        while True:
            yield b" "
            await asyncio.sleep(0.1)

    return StreamingResponse(body(), media_type="application/json")


def test_no_reply_takes_too_much_time_or_memory(server: OpenAIServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rqa.endpoint.client.TIMEOUT", 0.3)
    server.faults = [slowly] * 2
    with pytest.raises(UserError, match=r"no answer within 0.3 seconds"):
        connect(server, retries=1).ask(say("a"), 7)
    monkeypatch.setattr("rqa.endpoint.client.LONGEST_REPLY", 2**20)
    bomb = gzip.compress(b" " * 2**26)
    server.faults = [lambda: Response(bomb, headers={"content-encoding": "gzip"})] * 2
    tracemalloc.start()
    with pytest.raises(UserError, match=r"not the reply of .*empty"):
        connect(server, retries=1).ask(say("a"), 7)
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()


def test_redirects_are_not_followed_and_passwords_of_urls_are_sent_and_not_said(
    server: OpenAIServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = server.url.replace("//", "//user:pass-word@")
    with serve() as other:
        server.faults = [lambda: RedirectResponse(other.url + "/chat/completions")]
        ours = Endpoint(f"openai::{url}", EndpointArguments(endpoint_concurrency=1, endpoint_retries=0))
        with pytest.raises(UserError, match=rf"/v1: 307, {other.url}/chat.*; redirects are not followed:") as caught:
            ours.ask(say("b"), 7)
        assert not other.seen
    monkeypatch.setenv("OPENAI_BASE_URL", url)
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    assert (ours._key, connect(server)._key) == ("", "secret")
    assert server.seen[-1].key == "Basic " + base64.b64encode(b"user:pass-word").decode()
    shown = (str(caught.value), ours.base_url, str(EndpointArguments(endpoint_model=f"openai::{url}").to_json()))
    assert not any("pass-word" in text for text in shown)
    server.faults = [lambda: error(401, "no such key: pass-word")]
    with pytest.raises(UserError, match=r"no such key: \*\*\*;"):
        ours.ask(say("c"), 7)


def characters(body: dict) -> dict:
    """A model whose tokens are characters; a character's log-probability is minus its place in the alphabet, / 10."""
    text = body["prompt"] if body["echo"] else ""
    new = "z" * body["max_tokens"]
    values = [-(ord(character) % 32) / 10 for character in text + new]
    return completion([*text, *new], [*range(len(values))], [None, *values[1:]], completion_tokens=len(new))


def completion(tokens: list[str], offsets: list[int], values: list[float | None], **usage: int) -> dict:
    logprobs = {"tokens": tokens, "token_logprobs": values, "text_offset": offsets}
    return {"choices": [{"text": "".join(tokens), "logprobs": logprobs}], "usage": usage}


def test_scores_are_the_mean_over_the_answers_tokens(server: OpenAIServer) -> None:
    server.complete = characters
    assert connect(server).answer_logprobs(["zzz: ", "zz "], ["abc", "b"]) == pytest.approx([-0.2, -0.2])
    assert connect(server).answer_logprobs(["zzz: a", "zzz: "], ["bc", "abc"]) == pytest.approx([-0.25, -0.2])
    assert len(server.of("completions")) == 3  # the same text with another border is another question


def test_a_server_that_scores_no_prompts_is_one_line(server: OpenAIServer) -> None:
    for complete in (
        lambda body: characters(body | {"echo": False}),
        lambda body: characters(body | {"echo": False, "max_tokens": 9}),
        lambda body: {"choices": [{"text": "hm", "logprobs": None}]},
    ):
        server.complete = complete
        with pytest.raises(UserError, match="gives no log-probabilities of the prompt"):
            connect(server).answer_logprobs(["a long prompt, longer than nine: "], ["abc"])


IMPOSSIBLE: dict[str, Callable[[dict, dict], Any]] = {
    **{f"value {value}": lambda _, logprobs, value=value: logprobs["token_logprobs"].__setitem__(6, value)
       for value in (-math.inf, 5.0, -9999.0, None, "-0.1")},
    "shifted": lambda _, logprobs: logprobs.update(text_offset=[offset + 2 for offset in logprobs["text_offset"]]),
    "short": lambda _, logprobs: logprobs["token_logprobs"].pop(),
    "another text": lambda choice, _: choice.update(text=choice["text"][::-1]),
    "other tokens": lambda _, logprobs: logprobs["tokens"].reverse(),
    **{f"token {place} is missing": lambda _, logprobs, place=place: [row.pop(place) for row in logprobs.values()]
       for place in (1, 3, 6, 7)},
}  # fmt: skip


@pytest.mark.parametrize("wrong", IMPOSSIBLE)
def test_impossible_log_probabilities_are_refused(wrong: str, server: OpenAIServer) -> None:
    def complete() -> Response:
        good = characters(server.seen[-1].body)
        IMPOSSIBLE[wrong](good["choices"][0], good["choices"][0]["logprobs"])
        return Response(json.dumps(good), media_type="application/json")

    server.faults = [complete] * 2
    with pytest.raises(UserError, match="not the reply of an OpenAI-compatible server"):
        connect(server, retries=1).answer_logprobs(["zzz: "], ["abc"])
    server.complete = characters
    assert connect(server).answer_logprobs(["zzz: "], ["abc"]) == pytest.approx([-0.2])


COUNTED = {"completion_tokens": 1}


@pytest.mark.parametrize(
    ("tokens", "offsets", "usage", "prompt", "answer", "expected"),
    [  # a token that begins in the prompt and ends in the answer counts
        (["Q", ": A", "nna"], [0, 1, 4], {"completion_tokens": 0}, "Q: ", "Anna", [-1.0, -2.0]),
        (["Q", ": A", "nna"], [0, 1, 4], {"completion_tokens": 0}, "Q: A", "nna", [-2.0]),
        # a token that the server puts in front shifts the text
        (["<s>", "Q: ", "Anna", "\n"], [0, 3, 6, 10], COUNTED, "Q: ", "Anna", [-2.0]),
        # parts of one character all count, and a generated token does not, counted or not
        (["Q: ", "木", "", "", "."], [0, 3, 4, 4, 4], COUNTED, "Q: ", "木", [-1.0, -2.0, -3.0]),
        (["Q: ", "木", "", "", "."], [0, 3, 4, 4, 4], {}, "Q: ", "木", [-1.0, -2.0, -3.0]),
        # an end token that is counted but not shown takes no token away
        (["Q: ", "An", "na"], [0, 3, 5], COUNTED, "Q: ", "Anna", [-1.0, -2.0]),
    ],
)
def test_the_answers_tokens_are_found_in_what_the_server_shows(
    tokens: list[str], offsets: list[int], usage: dict, prompt: str, answer: str, expected: list[float]
) -> None:
    values = [None, -1.0, -2.0, -3.0, -9.0][: len(tokens)]
    assert answer_tokens(completion(tokens, offsets, values, **usage), prompt, answer) == expected


VALUE = st.recursive(
    st.sampled_from([None, True, -1, 10**30, math.nan, -0.5, "a", "\ud800", "text"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["type", "text"]), inner),
    max_leaves=6,
)
LISTS = {name: st.lists(st.sampled_from([0, 3, 5, -0.5, None, "Q: ", "An", "na"]), max_size=4) | VALUE
         for name in ("tokens", "token_logprobs", "text_offset")}  # fmt: skip
CHOICE = {"message": st.fixed_dictionaries({"content": VALUE}) | VALUE, "finish_reason": VALUE,
          "logprobs": st.fixed_dictionaries(LISTS) | VALUE, "text": st.just("Q: Anna") | VALUE}  # fmt: skip
REPLY = {"choices": st.lists(st.fixed_dictionaries(CHOICE) | VALUE, max_size=2) | VALUE,
         "usage": st.fixed_dictionaries({"completion_tokens": VALUE}) | VALUE}  # fmt: skip


@given(st.fixed_dictionaries(REPLY) | VALUE)
def test_whatever_json_a_server_sends_is_a_reply_or_unreadable(value: Any) -> None:
    sent, reply, values = json.dumps(value), Answer("", 0), []
    with suppress(*UNREADABLE):
        reply = read_reply(1, json.loads(json.dumps(chat_reply(parse_json(sent)))))
    assert isinstance(reply.text.encode(), bytes)
    assert (type(reply.num_tokens), type(reply.cut), len(reply.text) <= 32) == (int, bool, True)
    with suppress(*UNREADABLE):
        values = answer_tokens(parse_json(sent), "Q: ", "Anna")
    assert all(-1000 < value < 0.01 for value in values)
    assert parse_verdict(sent) is None
