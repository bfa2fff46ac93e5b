"""The judge: verdicts are read, asked for again, counted; what it costs is said first, and paid once."""

import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openai_server import OpenAIServer, error, serve

from rqa.endpoint.client import RequestArguments
from rqa.evaluation.judge import INSTRUCTION, JudgeArguments, judge_answers, judge_results, parse_verdict
from rqa.evaluation.results import DETAILS, PREDICTIONS, SCORES
from rqa.runtime.errors import UserError

GIVEN = {"answer 0": "correct", "answer 1": "partially", "answer 2": "incorrect", "answer 3": "correct"}


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[OpenAIServer]:
    monkeypatch.setenv("RQA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(logging.getLogger("rqa"), "propagate", True)  # an executable turns it off
    with serve() as ours:
        ours.models = ["gpt-4o"]
        ours.say = lambda messages: json.dumps({"reason": "so", "verdict": GIVEN[_answer(messages)]})
        yield ours


def _answer(messages: list[dict[str, Any]]) -> str:
    return json.loads(messages[1]["content"])["system_answer"]


def rows(size: int = 4) -> list[dict[str, Any]]:
    return [
        {"question": f"Why {i}?", "gold_answer": f"So {i}.", "generated_answer": f"answer {i}", "chat_history": [],
         "retrieved_docs": [], "scores": {}}
        for i in range(size)
    ]  # fmt: skip


def arguments(server: OpenAIServer, **others: Any) -> JudgeArguments:
    return JudgeArguments(gen_gpt4eval=True, judge_base_url=server.url, **others)


def judge(rows: list[dict[str, Any]], arguments: JudgeArguments) -> dict[str, float]:
    return judge_answers(rows, arguments, RequestArguments())


def test_the_rate_is_the_share_of_correct_answers_and_each_row_keeps_its_verdict(server: OpenAIServer) -> None:
    judged = rows()
    assert judge(judged, arguments(server)) == {
        "gen/gpt4eval": 0.5,
        "gen/gpt4eval_partially": 0.25,
        "gen/gpt4eval_unparsed": 0.0,
    }
    assert [row["gpt4eval"]["verdict"] for row in judged] == list(GIVEN.values())
    assert [row["scores"]["gen/gpt4eval"] for row in judged] == [1.0, 0.0, 0.0, 1.0]


def test_the_judge_sees_question_reference_answer_and_history_at_temperature_zero(server: OpenAIServer) -> None:
    (row,) = rows(1)
    judge([row | {"chat_history": [{"speaker": "user", "message": "Hm."}]}], arguments(server))
    (body,) = server.of("chat/completions")
    assert body["temperature"] == 0
    assert body["messages"][0] == {"role": "system", "content": INSTRUCTION}
    assert json.loads(body["messages"][1]["content"]) == {
        "earlier_turns": [{"speaker": "user", "message": "Hm."}],
        "question": "Why 0?",
        "reference_answer": "So 0.",
        "system_answer": "answer 0",
    }


def test_the_judge_is_asked_as_the_flags_of_requests_say(server: OpenAIServer) -> None:
    server.delay = 0.05
    judge_answers(rows(), arguments(server), RequestArguments(endpoint_concurrency=2))
    assert server.most_at_once == 2
    server.faults = [lambda: error(500, "out of memory")]
    with pytest.raises(UserError, match="500, out of memory; asked 1 time"):
        judge_answers([{**rows(1)[0], "question": "Else?"}], arguments(server), RequestArguments(endpoint_retries=0))


def test_a_verdict_is_paid_once_for_the_same_content(server: OpenAIServer) -> None:
    judge(rows(2), arguments(server))
    judge(rows(3), arguments(server))
    assert len(server.of("chat/completions")) == 3


def test_what_cannot_be_read_is_asked_for_again_and_then_counted(
    server: OpenAIServer, caplog: pytest.LogCaptureFixture
) -> None:
    def say(messages: list[dict[str, Any]]) -> str:
        answer = _answer(messages)
        if answer == "answer 1" or (answer == "answer 2" and len(messages) == 2):
            return "I would rather not."
        return json.dumps({"verdict": GIVEN[answer]})

    server.say = say
    judged = rows()
    scores = judge(judged, arguments(server))
    assert scores["gen/gpt4eval"] == pytest.approx(2 / 3)
    assert scores["gen/gpt4eval_unparsed"] == 1
    assert judged[1]["gpt4eval"] is None
    assert judged[1]["scores"] == {}
    assert judged[2]["gpt4eval"]["verdict"] == "incorrect"
    asked = [_answer(body["messages"]) for body in server.of("chat/completions")]
    assert sorted(asked) == ["answer 0", *["answer 1"] * 3, *["answer 2"] * 2, "answer 3"]
    assert "1 of 4 verdicts cannot be read" in caplog.text
    again = server.of("chat/completions")[-1]["messages"]
    assert [turn["role"] for turn in again] == ["system", "user", "assistant", "user", "assistant", "user"]


def test_no_readable_verdict_at_all_is_an_error(server: OpenAIServer) -> None:
    server.say = lambda messages: "No."
    with pytest.raises(UserError, match="--judge_model gpt-4o: none of its 2 verdicts can be read"):
        judge(rows(2), arguments(server))


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ('{"reason": "r", "verdict": "correct"}', "correct"),
        ('```json\n{"verdict": "Partially ", "reason": "{braces}"}\n```', "partially"),
        ('The set {a, b} matters. {"verdict": "incorrect"} I hope this helps.', "incorrect"),
        ('{"verdict": "correct"} No, wait: {"verdict": "incorrect"}', "incorrect"),
        ('{"grade": {"verdict": "correct"}}', "correct"),
        ('{"verdict": "maybe"}', None),
        ('{"verdict": null}', None),
        ('{"verdict": "correct"', None),
        ("correct", None),
        ("", None),
        ("{" * 3000, None),
    ],
)
def test_verdicts_are_read_from_what_models_write(reply: str, expected: str | None) -> None:
    verdict = parse_verdict(reply)
    assert (verdict and verdict["verdict"]) == expected


def test_so_many_examples_at_most_and_always_the_same(server: OpenAIServer) -> None:
    judged, again = rows(), rows()
    scores = judge(judged, arguments(server, judge_max_examples=3))
    chosen = [number for number, row in enumerate(judged) if "gpt4eval" in row]
    assert len(chosen) == 3 == len(server.of("chat/completions"))
    right = [GIVEN[f"answer {number}"] for number in chosen].count("correct")
    assert scores["gen/gpt4eval"] == pytest.approx(right / 3)
    judge(again, arguments(server, judge_max_examples=3))
    assert again == judged


@pytest.mark.parametrize(
    ("others", "cost"),
    [
        ({"judge_price": [1000.0, 2000.0]}, r"at most 512 out, at most \$1\.\d\d;"),
        ({}, r"at most 512 out;"),
    ],
)
def test_the_cost_is_estimated_before_the_judge_is_asked(
    others: dict[str, Any], cost: str, server: OpenAIServer, caplog: pytest.LogCaptureFixture
) -> None:
    said_before = []
    say = server.say
    server.say = lambda messages: said_before.append(caplog.text) or say(messages)
    with caplog.at_level(logging.INFO, "rqa"):
        judge(rows(2), arguments(server, **others))
    assert all("2 answers, some " in text and "at most 512 out" in text for text in said_before)
    assert len(said_before) == 2
    assert caplog.records[0].getMessage().startswith("judge ")
    assert re.search(cost, caplog.records[0].getMessage())


def test_results_hold_the_judges_rate_with_its_number_and_interval(server: OpenAIServer, tmp_path: Path) -> None:
    scores, _ = judge_results(tmp_path, {"test_gen/f1": 0.25}, rows(), arguments(server), RequestArguments())
    assert json.loads((tmp_path / SCORES).read_text()) == scores
    assert scores["test_gen/f1"] == 0.25
    assert scores["test_gen/gpt4eval"] == 0.5
    detail = json.loads((tmp_path / DETAILS).read_text())["scores"]["test_gen/gpt4eval"]
    assert (detail["value"], detail["n"]) == (0.5, 4)
    assert 0 <= detail["low"] <= 0.5 <= detail["high"] <= 1
    written = [json.loads(line) for line in (tmp_path / PREDICTIONS).open()]
    assert [row["gpt4eval"]["verdict"] for row in written] == list(GIVEN.values())


def test_a_judge_that_cannot_be_asked_costs_no_results(server: OpenAIServer, tmp_path: Path) -> None:
    server.key = "another"
    with pytest.raises(UserError, match="the key is refused"):
        judge_results(
            tmp_path, {"test_gen/f1": 0.25}, rows(), arguments(server, judge_api_key="mine"), RequestArguments()
        )
    assert json.loads((tmp_path / SCORES).read_text()) == {"test_gen/f1": 0.25}
    assert len((tmp_path / PREDICTIONS).read_text().splitlines()) == 4


def test_without_the_flag_nobody_is_asked(server: OpenAIServer, tmp_path: Path) -> None:
    scores, _ = judge_results(
        tmp_path, {"a": 1.0}, rows(), JudgeArguments(judge_base_url=server.url), RequestArguments()
    )
    assert scores == {"a": 1.0}
    assert not server.seen


def test_nothing_to_judge_is_an_error(server: OpenAIServer, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--gen_gpt4eval true: there are no answers to judge"):
        judge_results(tmp_path, {}, [], arguments(server), RequestArguments())


@pytest.mark.parametrize("wrong", [{"judge_max_examples": -1}, {"judge_price": [1.0]}, {"judge_price": [1.0, -1.0]}])
def test_settings_without_sense_are_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"--{next(iter(wrong))}"):
        JudgeArguments(**wrong)
