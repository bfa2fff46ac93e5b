"""The API as its clients use it: the official `openai` client, a browser's request, and whoever sends nonsense."""

import asyncio
import base64
import fcntl
import json
import os
import random
import re
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from openai_server import OpenAIServer, error, event
from starlette.responses import StreamingResponse
from starlette.testclient import TestClient

from rqa.data import Document
from rqa.retrieval.citations import passage_id
from rqa.runtime.text import added
from rqa.serving.app import Api, App, comparison_routes
from rqa.serving.engine import Metrics

ROOT = Path(__file__).parents[2]
ASKED: Any = [{"role": "user", "content": "What does Arlen trade in?"}]
CITED = "The harbour of Arlen is known for its trade in copper. Nobody knows why."
CHAT = "/v1/chat/completions"


@pytest.fixture
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


@pytest.fixture
def http(api: Api) -> TestClient:
    return TestClient(App(api.routes(), api.engine.metrics))


def error_of(response: Any) -> dict[str, Any]:
    """What is told of an error, in OpenAI's one form."""
    assert response.headers["content-type"] == "application/json"
    assert response.json().keys() == {"error"}
    assert response.json()["error"].keys() == {"message", "type", "param", "code"}
    return response.json()["error"]


def test_the_official_client_reads_an_answer_with_its_sources_in_three_forms(
    remote: Api, server: OpenAIServer, client: openai.OpenAI
) -> None:
    server.say = lambda _: CITED
    reply = client.chat.completions.create(model="tiny", messages=ASKED, extra_body={"rqa": {"k": 24}})
    choice, own = reply.choices[0], reply.model_extra or {}
    assert (choice.message.content, choice.finish_reason, choice.message.role) == (CITED, "stop", "assistant")
    passages = own["rqa"]["passages"]
    hits = remote.engine.retriever.retrieve([ASKED[0]["content"]], 24)
    assert [each["rank"] for each in passages] == [*range(1, 25)]
    for shown, place, score in zip(passages, hits.ids[0].tolist(), hits.scores[0].tolist(), strict=True):
        document = remote.engine.retriever.documents[place]
        assert (shown["text"], shown["score"]) == (document.page_content, score)
        assert (shown["title"], shown["source"]) == (document.metadata["title"], document.metadata["source"])
        assert shown["id"] == passage_id(place, document)
    assert own["citations"] == [each["url"] for each in passages]
    cited, *others = choice.message.annotations or []
    (number,) = (each["number"] for each in own["rqa"]["cited"])
    link, named = cited.url_citation, passages[number - 1]
    assert named["text"].startswith("The harbour of Arlen")
    assert CITED[link.start_index : link.end_index] == "The harbour of Arlen is known for its trade in copper."
    assert (link.url, link.title) == (named["url"], "Arlen")
    assert [each.url_citation.url for each in others] == [each["url"] for each in passages if each is not named]
    assert {(each.url_citation.start_index, each.url_citation.end_index) for each in others} == {(len(CITED),) * 2}
    assert httpx.get(link.url, headers={"Accept": "application/json"}).json()["text"] == named["text"]
    assert reply.usage
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens, reply.usage.total_tokens) == (7, 14, 21)


def test_the_official_client_reads_the_same_from_a_stream(
    remote: Api, server: OpenAIServer, client: openai.OpenAI, url: str
) -> None:
    async def read() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:
            options: Any = {"model": "tiny", "messages": ASKED, "stream_options": {"include_usage": True}}
            return [chunk async for chunk in await client.chat.completions.create(**options, stream=True)]

    server.say = lambda _: CITED
    whole = client.chat.completions.create(model="tiny", messages=ASKED)
    *chunks, last, usage = asyncio.run(read())
    deltas = [chunk.choices[0].delta for chunk in [*chunks, last]]
    assert "".join(delta.content or "" for delta in deltas) == CITED
    assert len(chunks) > 10
    assert chunks[0].rqa["passages"] == chunks[-1].rqa["passages"] == (whole.model_extra or {})["rqa"]["passages"]
    expected = [each.model_dump() for each in whole.choices[0].message.annotations or []]
    assert deltas[-2].annotations == expected != []
    assert chunks[0].citations == chunks[-1].citations == (whole.model_extra or {})["citations"]
    assert (last.choices[0].finish_reason, usage.choices, usage.usage) == ("stop", [], whole.usage)


def test_thoughts_that_only_end_are_no_part_of_an_answer(remote: Api, server: OpenAIServer, http: TestClient) -> None:
    server.say = lambda _: "Which harbour? Arlen's.</think>Copper."
    reply = http.post(CHAT, json={"messages": ASKED}).json()
    assert reply["choices"][0]["message"]["content"] == "Copper."
    server.say = lambda _: f"Which harbour? </think>{CITED}"  # by then a stream has shown the thoughts
    lines = http.post(CHAT, json={"messages": ASKED, "stream": True}).text.split("\n\n")[:-2]
    deltas = [json.loads(line.removeprefix("data: "))["choices"][0]["delta"] for line in lines]
    shown = "".join(delta.get("content", "") for delta in deltas)
    assert shown.endswith(CITED)
    link = deltas[-2]["annotations"][0]["url_citation"]
    assert shown[link["start_index"] : link["end_index"]].endswith("known for its trade in copper.")


@pytest.mark.parametrize(
    ("text", "shown", "more"), [("It is", "It", " is"), ("It's", "It '", ""), ("Copper", "Which harbour?", "Copper")]
)
def test_a_reply_grows_by_what_was_not_shown(text: str, shown: str, more: str) -> None:
    assert added(text, shown) == more


def test_who_reads_only_text_gets_a_list_of_sources(remote: Api, server: OpenAIServer, client: openai.OpenAI) -> None:
    remote.sources_in_text, remote.public_url, server.say = True, "https://example.org/", lambda _: "Copper."
    reply = client.chat.completions.create(model="tiny", messages=ASKED)
    first, *lines = (reply.choices[0].message.content or "").split("\n")
    passages = (reply.model_extra or {})["rqa"]["passages"]
    listed = [f"[{n}] {each['title']}: https://example.org/passages/{each['id']}" for n, each in enumerate(passages, 1)]
    assert [first, *lines] == ["Copper.", "", "Sources:", *listed]


def test_instructions_are_read_and_not_searched_with_and_history_is_both(
    remote: Api, server: OpenAIServer, http: TestClient
) -> None:
    searched, retrieve = [], remote.engine.retriever.retrieve
    remote.engine.retriever.retrieve = lambda questions, k: searched.extend(questions) or retrieve(questions, k)
    parts = [{"type": "text", "text": "And"}, {"type": "text", "text": "Brask?"}]
    said = [("developer", "Be brief."), ("user", "Arlen?"), ("assistant", "Copper."), ("user", parts), ("user", "Now.")]
    messages = [{"role": role, "content": content} for role, content in said]
    assert http.post(CHAT, json={"messages": messages}).status_code == 200
    assert searched == ["Arlen?\nCopper.\nAnd\nBrask?\n\nNow."]
    asked = server.of("chat/completions")[0]["messages"]
    assert [each["content"] for each in asked[:2]] == ["Be brief.\n\nArlen?", "Copper."]
    assert asked[2]["content"].endswith("Question: And\nBrask?\n\nNow.")


def test_of_a_long_history_the_latest_turns_are_read_and_the_instructions_stay(
    remote: Api, server: OpenAIServer, http: TestClient
) -> None:
    turns = [{"role": ("user", "assistant")[number % 2], "content": f"turn {number}"} for number in range(4_001)]
    began = time.perf_counter()
    http.post(CHAT, json={"messages": [{"role": "system", "content": "Be brief."}, *turns]}).raise_for_status()
    assert time.perf_counter() - began < 10
    asked = server.of("chat/completions")[0]["messages"]
    assert (len(asked), asked[0]["content"]) == (99, "Be brief.\n\nturn 3902")


def test_embeddings_are_the_encoder_s(api: Api, client: openai.OpenAI) -> None:
    texts, encoder = ["copper", "salt and wool"], api.encoder
    for kind, ids in (("query", encoder.tokenize_queries(texts)), ("passage", encoder.tokenize_passages(texts))):
        for form in ("float", "base64"):
            body: Any = {"encoding_format": form, "extra_body": {"input_type": kind}}
            reply = client.embeddings.create(model="small", input=texts, **body)
            found: list[Any] = [each.embedding for each in reply.data]
            if form == "base64":
                found = [np.frombuffer(base64.b64decode(each), "<f4") for each in found]
            np.testing.assert_array_equal(np.array(found, np.float32), encoder.embed(ids))
            assert reply.usage.prompt_tokens == sum(map(len, ids))


def test_retrieval_as_search_r1_calls_it(api: Api, http: TestClient) -> None:
    queries = ["Who trades in salt?", "When was Lund founded?"]
    scored, bare = (
        http.post("/retrieve", json={"queries": queries, "topk": 4, "return_scores": scores}).json()["result"]
        for scores in (True, False)
    )
    hits = api.engine.retriever.retrieve(queries, 4)
    found = api.engine.retriever.documents_of(hits)
    for row, documents, scores in zip(scored, found, hits.scores.tolist(), strict=True):
        assert [each["score"] for each in row] == scores
        for each, document in zip(row, documents, strict=True):  # as its `_passages2string` takes them apart
            title, *lines = each["document"]["contents"].split("\n")
            assert (title.strip('"'), "\n".join(lines)) == (document.metadata["title"], document.page_content)
    assert bare == [[each["document"] for each in row] for row in scored]
    (one,) = http.post("/retrieve", json={"query": queries[1], "topk": 4}).json()["result"]
    assert one == bare[1]


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_stops_its_generation(remote: Api, server: OpenAIServer, url: str, stream: bool) -> None:
    def wait(condition: Callable[[], object]) -> None:
        end = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < end
            time.sleep(0.01)

    server.pause, server.say = 0.02, lambda _: "word " * 400
    address, body = httpx.URL(url), json.dumps({"messages": ASKED, "stream": stream})
    with socket.create_connection((address.host, address.port)) as client:
        head = f"POST {CHAT} HTTP/1.1", "Host: h", "Content-Type: application/json", f"Content-Length: {len(body)}"
        client.sendall("\r\n".join([*head, "", body]).encode())
        wait(lambda: server.streamed)
    wait(lambda: not remote.engine.running)
    assert server.streamed < 300


def test_clients_that_ask_at_once_get_each_its_own_answer(remote: Api, url: str) -> None:
    def ask(number: int) -> str:
        body = {"messages": [{"role": "user", "content": f"What is {number}?"}], "stream": number % 3 == 0}
        return httpx.post(url + CHAT, json=body, timeout=60).raise_for_status().text

    with ThreadPoolExecutor(16) as clients:
        for number, text in enumerate(clients.map(ask, range(50))):  # the other server repeats what it is asked
            assert re.findall(r" (\d+)\?", text) == [str(number)]


VALUES: list[Any] = [None, True, -1, 0, 1, 1e308, 2**70, "", "text", [], [[]], {}, [{}], ["a", 1], {"role": "user"},
                     [{"role": "user"}], [{"role": "user", "content": 3}], [{"role": [], "content": []}], "\ud800",
                     [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]]  # fmt: skip
FIELDS = {
    CHAT: ["messages", "model", "stream", "max_tokens", "temperature", "top_p", "stop", "n", "tools", "rqa",
           "stream_options", "response_format"],
    "/v1/embeddings": ["model", "input", "encoding_format", "input_type", "dimensions"],
    "/retrieve": ["queries", "query", "topk", "return_scores"],
    "/feedback": ["question", "chat_history", "answer", "rating", "corrected_answer", "passages", "clicked", "model"],
}  # fmt: skip


def malformed(rng: random.Random, path: str) -> bytes:
    """A body that is no JSON object, or one whose fields hold anything; no question that could be answered."""
    body = {name: rng.choice(VALUES) for name in FIELDS[path] if rng.random() < 0.6}
    text = json.dumps(body | {rng.choice(["messages", "input", "queries", "query", "question"]): rng.choice(VALUES)})
    broken = [text[: rng.randrange(len(text))], f"[{text}]", "[" * 5000, text.replace(":", "", 1), "NaN", '"', "\x00"]
    return rng.choice([text, text, rng.choice(broken)]).encode() + rng.choice([b"", b"", b"", b"\xff"])


def test_a_thousand_malformed_bodies_are_refused_as_json(http: TestClient, caplog: pytest.LogCaptureFixture) -> None:
    rng, refused = random.Random(0), 0
    for number in range(1000):
        path = [*FIELDS][number % 4]
        headers = {"Content-Type": "application/json" if rng.random() < 0.95 else "text/plain"}
        body = malformed(rng, path)
        response = http.post(path, content=body, headers=headers)
        if response.status_code == 200:  # what is sent is right by chance
            assert path in ("/v1/embeddings", "/retrieve")
        else:
            assert 400 <= response.status_code < 500, body
            assert error_of(response)["message"]
            refused += 1
    assert refused > 900
    assert not caplog.records


def test_a_page_shows_a_passage_as_text_and_runs_no_script(api: Api, http: TestClient) -> None:
    evil = Document("<script>alert(1)</script>", {"title": "<script>", "source": "javascript:alert(2)"})
    api.engine.retriever.documents = [evil]
    page = http.get(f"/passages/{passage_id(0, evil)}")
    assert "<script" not in page.text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page.text
    assert "script-src 'none'" in page.headers["content-security-policy"]


def test_a_local_server_answers_to_its_own_names_alone(api: Api) -> None:
    http = TestClient(App(api.routes(), api.engine.metrics, hosts=["localhost", "::1"]))
    hosts = {
        "localhost:9": 200,
        "LOCALHOST": 200,
        "[::1]:8000": 200,
        "evil.example": 421,
        "localhost.evil": 421,
        "": 421,
    }
    assert {host: http.get("/metrics", headers={"Host": host}).status_code for host in hosts} == hosts


@pytest.mark.parametrize(
    ("header", "status"),
    [
        (None, 401), ("Bearer wrong", 401), ("Bearer key", 401), ("Basic %%%", 401), ("Basic", 401),
        ("Basic " + base64.b64encode("kéy".encode()).decode(), 401), ("Bearer kéy", 200), ("bearer  kéy ", 200),
        ("Basic " + base64.b64encode("anybody:kéy".encode()).decode(), 200),
    ],
)  # fmt: skip
def test_the_key_guards_everything_but_health(api: Api, header: str | None, status: int) -> None:
    http = TestClient(App(api.routes(), api.engine.metrics, "kéy"))
    headers = {"Authorization": header.encode()} if header else {}
    paths = ["/", "/v1/models", "/metrics", "/passages/0-1a02008e"]
    assert {http.get(path, headers=headers).status_code for path in paths} == {status}
    for path in FIELDS:
        assert (http.post(path, json={}, headers=headers).status_code == 401) == (status == 401)
    assert http.get("/health").json() == {"status": "ok"}
    asks = [http.get("/", headers={"Accept": accept}).headers["www-authenticate"] for accept in ("text/html", "*/*")]
    assert asks == ['Basic realm="rqa"', "Bearer"]


@pytest.mark.parametrize(
    ("body", "status", "param", "code"),
    [
        ({"model": "gpt-4o"}, 404, "model", "model_not_found"),
        ({"messages": [{"role": "user", "content": "why " * 5000}]}, 400, None, "context_length_exceeded"),
        ({"messages": [{"role": "user", "content": "why " * 2**18}]}, 400, None, "context_length_exceeded"),
        ({"messages": [{"role": "assistant", "content": "Hello"}]}, 400, "messages", None),
        ({"messages": [{"role": "tool", "content": "Hello"}]}, 400, "messages[0].role", None),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages[0].content", None),
        ({"n": 2}, 400, "n", None),
        ({"tools": [{"type": "function"}]}, 400, "tools", None),
        ({"logprobs": True}, 400, "logprobs", None),
        ({"response_format": {"type": "json_object"}}, 400, "response_format", None),
        ({"temperature": 2.1}, 400, "temperature", None),
        ({"top_p": 0}, 400, "top_p", None),
        ({"max_tokens": 0}, 400, "max_tokens", None),
        ({"rqa": {"k": 0}}, 400, "k", None),
        ({"stop": ["a", ""]}, 400, "stop", None),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_is_wrong_with_a_question_is_told_by_its_field(
    http: TestClient, body: dict[str, Any], status: int, param: str, code: str | None, stream: bool
) -> None:
    response = http.post(CHAT, json={"messages": ASKED, "stream": stream} | body)
    told = error_of(response)
    assert (response.status_code, told["param"], told["code"]) == (status, param, code)


def test_what_changes_no_answer_is_ignored(http: TestClient) -> None:
    harmless = {"user": "me", "n": 1, "tools": [], "seed": 3, "presence_penalty": 0.0, "store": False, "metadata": {}}
    harmless |= {"response_format": {"type": "text"}, "logprobs": False, "stop": None, "max_completion_tokens": 2}
    reply = http.post(CHAT, json={"messages": ASKED} | harmless).json()
    assert reply["usage"]["completion_tokens"] == 2


def test_who_has_no_place_is_told_when_to_come_again(api: Api, http: TestClient) -> None:
    api.engine.max_queue = 0
    for path, body in ((CHAT, {"messages": ASKED}), ("/retrieve", {"query": "?"}), ("/v1/embeddings", {"input": "?"})):
        response = http.post(path, json=body)
        assert (response.status_code, response.headers["retry-after"]) == (429, "1")
        assert error_of(response)["type"] == "rate_limit_error"
        assert "try again" in error_of(response)["message"]


def test_a_body_is_read_no_further_than_its_limit(api: Api) -> None:
    received, sent = [], []

    async def receive() -> dict[str, Any]:
        received.append(1)
        return {"type": "http.request", "body": b" " * 2**20, "more_body": True}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    headers = [(b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": "/retrieve", "query_string": b"", "headers": headers}
    asyncio.run(App(api.routes(), api.engine.metrics)(scope, receive, send))
    assert (sent[0]["status"], len(received)) == (413, 9)
    assert b"the body is longer than 8 MiB" in sent[1]["body"]


def test_a_body_that_does_not_come_keeps_no_server_from_its_end(
    api: Api, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rqa.serving.app.SLOWEST_BODY", 0.2)
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as client:
        head = "POST /feedback HTTP/1.1", f"Host: {host}", "Content-Type: application/json", "Content-Length: 99"
        client.sendall("\r\n".join([*head, "", "{"]).encode())
        assert client.recv(100).startswith(b"HTTP/1.1 408 ")


def test_a_rating_is_kept_and_while_it_waits_for_its_file_it_holds_up_nobody(api: Api, url: str) -> None:
    found, *_ = httpx.post(f"{url}/retrieve", json={"query": "salt"}).json()["result"][0]
    body = {"question": "Who trades in salt?", "answer": "Dunmore.", "rating": 1, "passages": [found["id"]]}
    with open(api.feedback.path, "ab") as file, ThreadPoolExecutor(1) as pool:
        fcntl.flock(file, fcntl.LOCK_EX)
        saving = pool.submit(httpx.post, f"{url}/feedback", json=body, timeout=10)
        time.sleep(0.2)
        assert httpx.get(f"{url}/health", timeout=2).status_code == 200
        assert not saving.done()
        fcntl.flock(file, fcntl.LOCK_UN)
        assert saving.result().json() == {"status": "saved"}
    (row,) = map(json.loads, api.feedback.path.read_text().splitlines())
    assert (row["question"], row["ctxs"][0]["page_content"]) == (body["question"], found["text"])


def test_what_fails_behind_is_told_and_what_fails_here_is_only_logged(
    remote: Api, server: OpenAIServer, http: TestClient, caplog: pytest.LogCaptureFixture
) -> None:
    server.faults = [lambda: error(400, "too hot")]
    response = http.post(CHAT, json={"messages": ASKED})
    assert response.status_code == 502
    assert "too hot" in error_of(response)["message"]
    broken = {"choices": [{"delta": {"content": "Half"}}]}, {"error": {"message": "out of memory"}}
    server.faults = [lambda: StreamingResponse(map(event, broken))]
    lines = http.post(CHAT, json={"messages": ASKED, "stream": True}).text.split("\n\n")
    assert "Half" in lines[-3]
    told = json.loads(lines[-2].removeprefix("data: "))["error"]["message"]
    assert told.endswith("broke off its reply: out of memory")
    assert remote.engine.metrics["rqa_broken_streams_total"] == 1
    assert not caplog.records
    remote.engine.retriever.retrieve = lambda *_: 1 / 0
    response = http.post(CHAT, json={"messages": ASKED})
    assert (response.status_code, error_of(response)["message"]) == (500, "internal error")
    assert "division by zero" in caplog.text


def test_a_server_without_a_reader_only_retrieves(api: Api, http: TestClient) -> None:
    api.reader_name = api.engine.reader = None
    assert [each["id"] for each in http.get("/v1/models").json()["data"]] == ["small"]
    assert error_of(http.post(CHAT, json={"messages": ASKED}))["code"] == "model_not_found"
    assert len(http.post("/retrieve", json={"query": "salt"}).json()["result"][0]) == 3


@pytest.mark.parametrize(("path", "status"), [("/nothing", 404), ("/passages/0-00000000", 404), ("/retrieve", 405)])
def test_what_is_not_there(http: TestClient, path: str, status: int) -> None:
    response = http.get(path)
    assert (response.status_code, error_of(response)["type"]) == (status, "invalid_request_error")


def test_metrics_can_be_parsed_and_count_what_was_asked(http: TestClient) -> None:
    http.post(CHAT, json={"messages": ASKED, "max_tokens": 4})
    http.post(CHAT, json={"messages": []})
    text = http.get("/metrics").text
    sample = re.compile(r'(\w+)(?:\{((?:\w+="[^"\\]*",?)*)\})? (\S+)')
    lines = [sample.fullmatch(line) for line in text.splitlines() if not line.startswith("# TYPE ")]
    values = {(line[1], line[2]): float(line[3]) for line in lines if line}
    assert len(values) == len(lines)
    assert values["rqa_requests_total", 'handler="chat",status="200"'] == 1
    assert values["rqa_requests_total", 'handler="chat",status="400"'] == 1
    assert values["rqa_generated_tokens_total", None] == 4
    assert values["rqa_retrieval_seconds_count", None] == values["rqa_generation_seconds_count", None] == 1


def test_the_page_runs_its_own_script_alone(http: TestClient) -> None:
    page = http.get("/")
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert policy.count("'sha256-") == page.text.count("<script") == 1
    assert '<body data-mode="chat">' in page.text


def test_the_comparison_page_reads_and_writes_choices() -> None:
    class Once:
        """Answers what it was asked with."""

        next = staticmethod(lambda rater: {"rater": rater})
        rate = staticmethod(lambda body: {"rated": body})

    http = TestClient(App(comparison_routes(Once()), Metrics()))  # type: ignore[arg-type]
    assert http.get("/compare/next?rater=Ann").json() == {"rater": "Ann"}
    assert http.post("/compare/rate", json={"number": 1}).json() == {"rated": {"number": 1}}
    assert '<body data-mode="compare">' in http.get("/").text
    assert http.post(CHAT, json={}).status_code == 404


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_a_stream_end(number: int, data: Path, lm_path: str, tmp_path: Path) -> None:
    line = [sys.executable, ROOT / "bin/serve", "--document_path", data / "documents.jsonl", "--qa_model_name_or_path",
            lm_path, "--embedding_model", "bm25", "--port", "0", "--dtype", "float32", "--chat_format", "template",
            "--max_seq_length", "500", "--max_new_tokens", "300"]  # fmt: skip
    key = {"Authorization": "Bearer of-the-environment"}
    environment = os.environ | {"RQA_API_KEY": "of-the-environment"}
    process = subprocess.Popen(list(map(str, line)), stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=environment)
    assert process.stderr
    ours = next(line for line in process.stderr if "listening on" in line).split()[-1]
    assert httpx.get(f"{ours}/v1/models").status_code == 401
    assert httpx.get(f"{ours}/v1/models", headers=key).json()["data"][0]["id"] == Path(lm_path).name
    body = {"messages": ASKED, "stream": True}
    with httpx.stream("POST", ours + CHAT, json=body, headers=key, timeout=30) as response:
        lines = response.iter_lines()
        assert next(lines).startswith("data: {")
        process.send_signal(number)
        time.sleep(0.2)
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{ours}/health")
        assert [*lines][-2] == "data: [DONE]"
    assert process.wait(10) == (-number if number == signal.SIGTERM else 130)
    assert process.stderr.read().count("\n") <= 1


def test_a_name_makes_no_reader(data: Path, tmp_path: Path) -> None:
    serve = runpy.run_path(str(ROOT / "bin/serve"))
    paths = {"document_path": str(data / "documents.jsonl"), "feedback_path": str(tmp_path / "feedback.jsonl")}
    flags = serve["Flags"](**paths, embedding_model="bm25", served_model_name="mine")
    assert serve["open_api"](flags).reader_name is None


def test_what_bin_serve_refuses(refused: Callable[..., None], data: Path, tmp_path: Path) -> None:
    for given in ([tmp_path], [tmp_path, tmp_path / "..", tmp_path], [tmp_path, tmp_path / "out" / ".."]):
        refused("takes two different directories", "serve", "--compare", *given)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        found = "--document_path", data / "documents.jsonl", "--embedding_model", "bm25"
        refused(f"--port {port}: Address already in use", "serve", *found, "--port", port)
    refused("--host a..b --port 8000: encoding with 'idna' codec failed", "serve", *found, "--host", "a..b")
