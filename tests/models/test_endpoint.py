"""A server is asked over real sockets: in order, at once, again when it fails, and never twice for what is known."""

import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from email.utils import formatdate
from pathlib import Path

import pytest
from openai_server import OpenAIServer, Refusal, error, half_a_reply, serve, slow
from starlette.responses import HTMLResponse, JSONResponse, Response

from rqa.data import Document, Example, Turn
from rqa.endpoint.client import Endpoint, EndpointArguments, Reply, answer_tokens
from rqa.endpoint.roles import EndpointReader
from rqa.models import server as server_module
from rqa.prompts import PromptArguments, Prompter
from rqa.runtime.errors import UserError


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[OpenAIServer]:
    monkeypatch.setenv("RQA_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr(server_module, "FIRST_DELAY", 0.01)
    with serve() as ours:
        yield ours


def connect(server: OpenAIServer, **settings: object) -> Endpoint:
    return Endpoint(f"openai::{server.url}", EndpointArguments(**{f"endpoint_{k}": v for k, v in settings.items()}))


def say(*texts: str) -> list[list[dict[str, str]]]:
    return [[{"role": "user", "content": text}] for text in texts]


def texts(replies: list[Reply]) -> list[str]:
    return [reply.text for reply in replies]


WORDS = [f"word {number}" for number in range(12)]


def test_replies_come_in_the_order_of_the_questions_with_their_tokens(server: OpenAIServer) -> None:
    server.delay = 0.02
    replies = connect(server, concurrency=5).ask(say(*WORDS), max_tokens=7)
    assert [reply.text for reply in replies] == [f"You said: {word}" for word in WORDS]
    assert {reply.num_tokens for reply in replies} == {4}
    assert all(0.02 <= reply.seconds < 5 for reply in replies)
    (body, *_) = server.of("chat/completions")
    assert body == {"model": "tiny", "messages": body["messages"], "max_tokens": 7, "temperature": 0.0}


@pytest.mark.parametrize("concurrency", [1, 6])
def test_as_many_requests_as_allowed_are_in_flight_at_once(concurrency: int, server: OpenAIServer) -> None:
    server.delay = 0.05
    connect(server, concurrency=concurrency).ask(say(*WORDS), 7)
    assert server.most_at_once == concurrency


def test_a_question_is_sent_once_by_one_run_and_by_the_next(server: OpenAIServer) -> None:
    first = texts(connect(server).ask(say("a", "b", "a"), 7))
    assert first == ["You said: a", "You said: b", "You said: a"]
    assert len(server.of("chat/completions")) == 2
    assert texts(connect(server).ask(say("b", "c", "a"), 7)) == ["You said: b", "You said: c", "You said: a"]
    assert len(server.of("chat/completions")) == 3


def test_a_reply_is_timed_once_and_what_was_kept_is_counted_and_not_timed(
    server: OpenAIServer, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("rqa"), "propagate", True)  # an executable turns it off
    with caplog.at_level(logging.INFO, "rqa"):
        first = connect(server).ask(say("a", "b", "a"), 7)
        assert "kept" not in caplog.text
        second = connect(server).ask(say("b", "c", "b"), 7)
    assert [reply.seconds is not None for reply in first] == [True, True, False]
    assert [reply.seconds is not None for reply in second] == [False, True, False]
    assert [reply.num_tokens for reply in first + second] == [3] * 6
    assert "2 of 3 replies were kept from an earlier run" in caplog.text


def test_whatever_decides_a_reply_asks_anew(server: OpenAIServer) -> None:
    server.models = ["tiny", "other"]
    connect(server, model="tiny").ask(say("a"), 7)
    connect(server, model="other").ask(say("a"), 7)
    connect(server, model="tiny").ask(say("a"), 8)
    connect(server, model="tiny").ask([[{"role": "system", "content": "a"}]], 7)
    assert len(server.of("chat/completions")) == 4


FAULTS: dict[str, Callable[[], Response]] = {
    "too many requests": lambda: error(429, "slow down"),
    "conflict": lambda: error(409, "busy"),
    "internal error": lambda: error(500, "out of memory"),
    "overloaded": lambda: HTMLResponse("<h1>Bad gateway</h1>", 502),
    "dropped connection": half_a_reply,
    "no JSON": lambda: Response("{", media_type="application/json"),
    "a web page": lambda: HTMLResponse("<h1>Welcome</h1>"),
    "no choices": lambda: JSONResponse({"choices": []}),
    "no message": lambda: JSONResponse({"choices": [{"text": "hm"}]}),
    "not an object": lambda: JSONResponse(["hm"]),
    "text that is none": lambda: JSONResponse({"choices": [{"message": {"content": {"a": 1}}}]}),
    "slow": slow,
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_may_pass_is_asked_again(name: str, server: OpenAIServer) -> None:
    server.faults = [None, FAULTS[name], FAULTS[name]]
    endpoint = connect(server, concurrency=1, timeout=1.0)
    assert texts(endpoint.ask(say("a", "b"), 7)) == ["You said: a", "You said: b"]
    assert [body["messages"][0]["content"] for body in server.of("chat/completions")] == ["a", "b", "b", "b"]


@pytest.mark.parametrize("name", FAULTS)
def test_what_does_not_pass_is_one_line_with_the_servers_words(name: str, server: OpenAIServer) -> None:
    server.faults = [FAULTS[name]] * 3
    with pytest.raises(UserError, match=r"127\.0\.0\.1") as caught:
        connect(server, concurrency=1, retries=2, timeout=0.3).ask(say("a"), 7)
    assert len(server.of("chat/completions")) == 3
    assert "asked 3 times" in str(caught.value)
    assert "\n" not in str(caught.value)
    expected = {"internal error": "500, out of memory", "overloaded": "502, .*Bad gateway", "slow": "no answer within",
                "no JSON": r"not the reply .*\{", "dropped connection": "cannot be reached"}  # fmt: skip
    assert caught.match(expected.get(name, ""))


@pytest.mark.parametrize("asked", [lambda: "0.5", lambda: formatdate(time.time() + 2, usegmt=True)])
def test_the_server_says_how_long_to_wait(asked: Callable[[], str], server: OpenAIServer) -> None:
    server.faults = [lambda: error(429, "wait", retry_after=asked())]
    connect(server, model="tiny").ask(say("a"), 7)
    first, second = server.seen
    assert second.at - first.at >= 0.5


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        (lambda: error(429, "wait for tomorrow", retry_after="86400"), "429, wait for tomorrow; asked 1 time"),
        (lambda: error(429, "no money left", code="insufficient_quota"), "429, no money left; asked 1 time"),
        (lambda: error(403, "not for you"), "403, not for you; the key is refused"),
        (lambda: error(400, "maximum context length is 512"), "maximum context length is 512; the server refuses"),
        (lambda: JSONResponse({"detail": "Not Found"}, 404), "404, Not Found; no such model or path"),
    ],
)
def test_what_will_not_pass_is_asked_once(fault: Callable[[], Response], expected: str, server: OpenAIServer) -> None:
    server.faults = [fault]
    with pytest.raises(UserError, match=expected):
        connect(server).ask(say("a"), 7)
    assert len(server.of("chat/completions")) == 1


def test_the_key_comes_from_the_flag_or_the_environment(server: OpenAIServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server.key = "secret"
    with pytest.raises(UserError, match=r"401, Incorrect API key provided; the key is refused: set \$OPENAI_API_KEY"):
        connect(server, api_key="wrong").ask(say("a"), 7)
    connect(server, api_key="secret").ask(say("a"), 7)
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    connect(server).ask(say("b"), 7)
    assert "secret" not in repr(EndpointArguments(endpoint_api_key="secret"))


def test_the_model_is_the_only_one_listed_or_must_be_named(server: OpenAIServer) -> None:
    assert connect(server).model == "tiny"
    server.models = ["tiny", "other"]
    with pytest.raises(UserError, match="tiny, other; name it with --endpoint_model"):
        connect(server).ask(say("a"), 7)
    with pytest.raises(UserError, match="404, The model `third` does not exist; no such model"):
        connect(server, model="third").ask(say("a"), 7)


def test_nobody_at_the_address_is_one_line_at_once(server: OpenAIServer) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    started = time.monotonic()
    with pytest.raises(UserError, match=r"/v1: cannot be reached \(.+\), asked 1 time; is a server running"):
        Endpoint(f"openai::{url}", EndpointArguments()).ask(say("a"), 7)
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("spec", ["openai::localhost:8000", "openai::", "openai::ftp://host/v1"])
def test_a_specification_that_is_no_url_is_named(spec: str, server: OpenAIServer) -> None:
    with pytest.raises(UserError, match=f"{spec}: not a server; write openai::http://host:port/v1"):
        Endpoint(spec, EndpointArguments())


@pytest.mark.parametrize("settings", [{"endpoint_concurrency": 0}, {"endpoint_timeout": 0.0}, {"endpoint_retries": -1}])
def test_settings_without_sense_are_named(settings: dict[str, float]) -> None:
    (name,) = settings
    with pytest.raises(UserError, match=f"--{name} "):
        EndpointArguments(**settings)


def test_a_run_that_failed_continues_where_it_stopped(server: OpenAIServer) -> None:
    server.faults = [None] * 7 + [lambda: error(400, "no")]
    with pytest.raises(UserError, match="400, no"):
        connect(server, concurrency=1).ask(say(*WORDS), 7)
    server.seen.clear()
    assert texts(connect(server, concurrency=1).ask(say(*WORDS), 7)) == [f"You said: {word}" for word in WORDS]
    assert [body["messages"][0]["content"] for body in server.of("chat/completions")] == WORDS[7:]


def test_ctrl_c_loses_the_requests_in_flight_and_no_other(server: OpenAIServer, request: pytest.FixtureRequest) -> None:
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, handler))
    interrupted = threading.Event()

    def too_late() -> Response:
        interrupted.wait(10)
        return error(500, "too late")

    def interrupt() -> None:
        while len(server.of("chat/completions")) < 8:
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
    assert len(server.of("chat/completions")) == len(WORDS) - 6


def test_text_that_utf8_cannot_carry_is_sent_all_the_same(server: OpenAIServer) -> None:
    assert texts(connect(server).ask(say("half \ud83d a pair, 木 and 🙂"), 7)) == ["You said: half ? a pair, 木 and 🙂"]


def test_a_reply_without_text_is_empty(server: OpenAIServer) -> None:
    server.faults = [lambda: JSONResponse({"choices": [{"message": {"content": None}}], "usage": None})]
    assert texts(connect(server).ask(say("a"), 7)) == [""]


# Scores of given answers.


def characters(body: dict) -> dict:
    """A model whose tokens are characters; a character's log-probability is minus its place in the alphabet, / 10."""
    text = body["prompt"] if body["echo"] else ""
    new = "z" * body["max_tokens"]
    values = [-(ord(character) % 32) / 10 for character in text + new]
    logprobs = {"tokens": list(text + new), "token_logprobs": [None, *values[1:]], "text_offset": [*range(len(values))]}
    return {"choices": [{"text": text + new, "logprobs": logprobs}], "usage": {"completion_tokens": len(new)}}


def test_scores_are_the_mean_over_the_answers_tokens(server: OpenAIServer) -> None:
    server.complete = characters
    scores = connect(server).answer_logprobs(["zzz: ", "zz "], ["abc", "b"])
    assert scores == pytest.approx([-0.2, -0.2])
    assert connect(server).answer_logprobs(["zzz: a", "zzz: "], ["bc", "abc"]) == pytest.approx([-0.25, -0.2])
    assert len(server.of("completions")) == 3  # the same text with another border is another question


def refuse_echo(body: dict) -> dict:
    raise Refusal("echo is not supported")


@pytest.mark.parametrize(
    ("complete", "expected"),
    [
        (refuse_echo, "echo is not supported; the server refuses"),
        (lambda body: characters(body | {"echo": False}), "gives no log-probabilities of the prompt"),
        (lambda body: characters(body | {"echo": False, "max_tokens": 9}), "gives no log-probabilities of the prompt"),
        (lambda body: {"choices": [{"text": "hm", "logprobs": None}]}, "gives no log-probabilities of the prompt"),
    ],
)
def test_a_server_that_scores_no_prompts_is_one_line(
    complete: Callable[[dict], dict], expected: str, server: OpenAIServer
) -> None:
    server.complete = complete
    with pytest.raises(UserError, match=expected):
        connect(server).answer_logprobs(["a long prompt, longer than nine: "], ["abc"])


def completion(tokens: list[str], offsets: list[int], values: list[float | None], **usage: int) -> dict:
    logprobs = {"tokens": tokens, "token_logprobs": values, "text_offset": offsets}
    return {"choices": [{"text": "".join(tokens), "logprobs": logprobs}], "usage": usage}


def test_a_token_that_begins_in_the_prompt_and_ends_in_the_answer_counts() -> None:
    reply = completion(["Q", ": A", "nna"], [0, 1, 4], [None, -1.0, -2.0], completion_tokens=0)
    assert answer_tokens(reply, "Q: ", "Anna") == [-1.0, -2.0]
    assert answer_tokens(reply, "Q: A", "nna") == [-2.0]


def test_a_token_that_the_server_puts_in_front_shifts_the_text() -> None:
    reply = completion(["<s>", "Q: ", "Anna", "\n"], [0, 3, 6, 10], [None, -1.0, -2.0, -3.0], completion_tokens=1)
    assert answer_tokens(reply, "Q: ", "Anna") == [-2.0]


def test_parts_of_one_character_all_count_and_a_generated_token_does_not() -> None:
    values = [None, -1.0, -2.0, -3.0, -9.0]
    reply = completion(["Q: ", "木", "", "", "."], [0, 3, 4, 4, 4], values, completion_tokens=1)
    assert answer_tokens(reply, "Q: ", "木") == [-1.0, -2.0, -3.0]
    del reply["usage"]["completion_tokens"]
    assert answer_tokens(reply, "Q: ", "木") == [-1.0, -2.0, -3.0]


def test_an_end_token_that_is_counted_but_not_shown_takes_no_token_away() -> None:
    reply = completion(["Q: ", "An", "na"], [0, 3, 5], [None, -1.0, -2.0], completion_tokens=1)
    assert answer_tokens(reply, "Q: ", "Anna") == [-1.0, -2.0]


# The reader.


def test_the_reader_asks_what_every_other_reader_sees_and_leaves_the_format_to_the_server(
    server: OpenAIServer, documents: list[Document], examples: list[Example]
) -> None:
    asked = Example("And Brask?", chat_history=(Turn("user", "Where is Arlen?"), Turn("assistant", "By the sea.")))
    reader = EndpointReader(connect(server), PromptArguments(chat_format="template", max_new_tokens=9))
    answers = reader.answer([asked, examples[0]], [documents[:2], []])
    bodies = sorted(server.of("chat/completions"), key=lambda body: -len(body["messages"]))
    assert [turn["role"] for turn in bodies[0]["messages"]] == ["user", "assistant", "user"]
    last = bodies[0]["messages"][-1]["content"]
    expected = f"[1] {documents[0].fmt_content}\n\n[2] {documents[1].fmt_content}"
    assert last == reader.prompter.instruction.replace("{passages}", expected).replace("{question}", "And Brask?")
    assert bodies[0]["max_tokens"] == 9
    assert answers[0].text.endswith("And Brask?")
    assert answers[0].num_tokens > 10
    assert answers[1].text.endswith(examples[0].question)


def test_what_is_too_long_by_estimate_loses_passage_text_and_a_question_that_is_too_long_stays_unanswered(
    server: OpenAIServer, documents: list[Document]
) -> None:
    long = Document("wool " * 5000, {"source": "s"})
    reader = EndpointReader(connect(server), PromptArguments(max_seq_length=300, max_new_tokens=50))
    answers = reader.answer([Example("Why?"), Example("Why? " * 400)], [[long], [long]])
    (body,) = server.of("chat/completions")
    sent = body["messages"][0]["content"]
    assert 600 < len(sent) <= 250 * 3
    assert sent.endswith("Question: Why?")
    assert (answers[1].text, answers[1].num_tokens) == ("", 0)


def test_prompt_text_and_messages_are_what_the_local_model_sees(
    tokenizer: object, documents: list[Document], examples: list[Example]
) -> None:
    for limit in (4096, 110):
        prompter = Prompter(tokenizer, PromptArguments(max_seq_length=limit, max_new_tokens=1))
        sequence = prompter.encode(examples[0], documents[:3], examples[0].gold_answer)
        prompt, answer = prompter.text(examples[0], documents[:3], examples[0].gold_answer)
        ids = tokenizer.encode(prompt) + tokenizer.encode(answer) + prompter.end_of_turn
        assert ids == sequence.ids
        template = Prompter(tokenizer, PromptArguments("template", max_seq_length=limit, max_new_tokens=1))
        messages = template.messages(examples[0], documents[:3])
        theirs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        assert tokenizer.encode(theirs) == template.encode(examples[0], documents[:3]).ids
