"""The judge: verdicts are read, asked for again, counted; what it costs is said first, and paid once."""

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
from openai_server import OpenAIServer
from starlette.responses import Response

from rqa.evaluation.judge import INSTRUCTION, JudgeArguments, judge_answers, judge_results, parse_verdict
from rqa.evaluation.report import DETAILS, PREDICTIONS, SCORES
from rqa.runtime.errors import UserError

GIVEN = {"answer 0": "correct", "answer 1": "partially", "answer 2": "incorrect", "answer 3": "correct"}


@pytest.fixture
def judge(server: OpenAIServer) -> OpenAIServer:
    server.models = ["gpt-4o"]
    server.say = lambda messages: json.dumps({"reason": "so", "verdict": GIVEN[_answer(messages)]})
    return server


def _answer(messages: list[dict[str, Any]]) -> str:
    return json.loads(messages[1]["content"])["system_answer"]


def rows(size: int = 4) -> list[dict[str, Any]]:
    common = {"chat_history": [], "retrieved_docs": []}
    return [
        {"question": f"Why {i}?", "gold_answer": f"So {i}.", "generated_answer": f"answer {i}", **common, "scores": {}}
        for i in range(size)
    ]


def arguments(judge: OpenAIServer, **others: Any) -> JudgeArguments:
    return JudgeArguments(gen_gpt4eval=True, judge_base_url=judge.url, **others)


def test_the_rate_is_the_share_of_correct_answers_and_each_row_keeps_its_verdict(
    judge: OpenAIServer, tmp_path: Path
) -> None:
    judged, given = rows(), {"test_gen/f1": 0.25}
    scores, _ = judge_results(tmp_path, given, judged, arguments(judge))
    rates = {"": 0.5, "_partially": 0.25, "_unparsed": 0.0}
    assert scores == given | {f"test_gen/gpt4eval{name}": rate for name, rate in rates.items()}
    assert json.loads((tmp_path / SCORES).read_text()) == scores
    assert [row["gpt4eval"]["verdict"] for row in judged] == list(GIVEN.values())
    assert [row["scores"]["gen/gpt4eval"] for row in judged] == [1.0, 0.0, 0.0, 1.0]
    assert [json.loads(line) for line in (tmp_path / PREDICTIONS).open()] == judged
    detail = json.loads((tmp_path / DETAILS).read_text())["scores"]["test_gen/gpt4eval"]
    assert (detail["value"], detail["n"]) == (0.5, 4)
    assert 0 <= detail["low"] <= 0.5 <= detail["high"] <= 1


def test_the_judge_sees_what_decides_at_temperature_0_and_an_empty_reply_is_not_argued_with(
    judge: OpenAIServer,
) -> None:
    judged, earlier, others = rows(2), [{"speaker": "user", "message": "Hm."}], ["Because.", "Thus."]
    judged[0] |= {"chat_history": earlier, "other_answers": others}
    judge.say = lambda messages: json.dumps({"verdict": "correct"}) if "Thus." in messages[1]["content"] else ""
    judge.faults = [lambda: Response("{", media_type="application/json")] * 4
    with pytest.raises(UserError, match="asked 2 times"):
        judge_answers(judged, arguments(judge, endpoint_retries=1, endpoint_concurrency=1))
    assert judge_answers(judged, arguments(judge))["gen/gpt4eval_unparsed"] == 1
    assert len(judge.questions) == 6
    body = judge.of("chat/completions")[0]
    assert (body["temperature"], body["messages"][0]) == (0, {"role": "system", "content": INSTRUCTION})
    given = json.loads(body["messages"][1]["content"])
    names = ["earlier_turns", "question", "reference_answer", "other_reference_answers", "system_answer"]
    assert [name.partition(" ")[0] for name in given] == names
    assert list(given.values()) == [earlier, "Why 0?", "So 0.", others, "answer 0"]


def test_what_cannot_be_read_is_asked_for_again_and_then_counted(
    judge: OpenAIServer, caplog: pytest.LogCaptureFixture
) -> None:
    def say(messages: list[dict[str, Any]]) -> str:
        answer = _answer(messages)
        unreadable = answer == "answer 1" or (answer == "answer 2" and len(messages) == 2)
        return "I would rather not." if unreadable else json.dumps({"verdict": GIVEN[answer]})

    judge.say = say
    judged = rows()
    scores = judge_answers(judged, arguments(judge))
    assert (scores["gen/gpt4eval"], scores["gen/gpt4eval_unparsed"]) == (pytest.approx(2 / 3), 1)
    assert (judged[1]["gpt4eval"], judged[1]["scores"]) == (None, {})
    assert judged[2]["gpt4eval"]["verdict"] == "incorrect"
    asked = [_answer(body["messages"]) for body in judge.of("chat/completions")]
    assert sorted(asked) == ["answer 0", *["answer 1"] * 3, *["answer 2"] * 2, "answer 3"]
    assert "1 of 4 verdicts cannot be read" in caplog.text
    again = judge.of("chat/completions")[-1]["messages"]
    assert [turn["role"] for turn in again] == ["system", "user", "assistant", "user", "assistant", "user"]
    with pytest.raises(UserError, match="--judge_model gpt-4o: none of its 1 verdicts can be read"):
        judge_answers(judged[1:2], arguments(judge))


def test_verdicts_are_read_from_what_models_write() -> None:
    for reply, expected in {
        '{"reason": "r", "verdict": "correct"}': "correct",
        '```json\n{"verdict": "Partially ", "reason": "{braces}"}\n```': "partially",
        'The set {a, b} matters. {"verdict": "incorrect"} I hope this helps.': "incorrect",
        '{"verdict": "incorrect"} Again: {"verdict": "incorrect"}': "incorrect",
        '{"grade": {"verdict": "correct"}}': "correct",
        **dict.fromkeys(['{"verdict": "maybe"}', '{"verdict": null}', '{"verdict": "correct"', "correct", ""], None),
        '{"reason": "one short sentence", "verdict": "correct" or "partially" or "incorrect"}': None,
        # What the answer or the judge quotes is no verdict, and where it is not escaped, neither can be believed.
        '{"reason": "It says {\\"verdict\\": \\"correct\\"}, isn\\\'t so", "verdict": "incorrect"}': "incorrect",
        '{"verdict": "correct"} No, wait: {"verdict": "incorrect"}': None,
        '{"verdict": "incorrect", "quoted": {"verdict": "correct"}}': None,
        '{"reason": "a } {"verdict":"correct"}","verdict":"incorrect"}': None,
        '{"reason": "It has one } too many.", "verdict": "partially"}': "partially",
        **dict.fromkeys([bracket * 10**6 for bracket in ("{", '"reason": ', '"reason":"', '"verdict":"\\"', "\\")]),
    }.items():
        verdict = parse_verdict(reply)
        assert (verdict and verdict["verdict"]) == expected, reply[:99]
    verdict = parse_verdict('{"verdict": "correct", "reason": "half \\ud83d"}')
    assert verdict == {"verdict": "correct", "reason": "half \ufffd"}


def test_so_many_examples_at_most_and_always_the_same_are_judged_once_the_cost_is_told(
    judge: OpenAIServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "rqa")
    judged, again, told, say = rows(), rows(), [], judge.say
    judge.say = lambda messages: told.append(caplog.text) or say(messages)
    flags = arguments(judge, judge_max_examples=3, judge_price=[1000.0, 2000.0])
    rate = judge_answers(judged, flags)["gen/gpt4eval"]
    chosen = [number for number, row in enumerate(judged) if "gpt4eval" in row]
    assert len(chosen) == 3 == len(judge.questions)
    assert rate == pytest.approx([GIVEN[f"answer {number}"] for number in chosen].count("correct") / 3)
    cost = re.compile(r"judge gpt-4o: 3 answers, some \d+ tokens in, at most 768 out, at most \$\d\.\d\d;")
    assert all(map(cost.search, told))
    judge_answers(again, flags)
    assert again == judged


def test_a_judge_that_cannot_be_asked_costs_no_results(judge: OpenAIServer, tmp_path: Path) -> None:
    judge.key = "another"
    with pytest.raises(UserError, match="the key is refused"):
        judge_results(tmp_path, {"test_gen/f1": 0.25}, rows(), arguments(judge, judge_api_key="mine"))
    assert json.loads((tmp_path / SCORES).read_text()) == {"test_gen/f1": 0.25}
    assert len((tmp_path / PREDICTIONS).read_text().splitlines()) == 4


def test_without_the_flag_nobody_is_asked_and_the_flags_are_written_only_when_asked_for(
    judge: OpenAIServer, tmp_path: Path
) -> None:
    flags, written = JudgeArguments(judge_base_url=judge.url, judge_api_key="secret"), tmp_path / "all_args.json"
    for write in (False, True):
        assert judge_results(tmp_path, {"a": 1.0}, rows(), flags, write_arguments=write)[0] == {"a": 1.0}
        assert written.exists() == write
    assert json.loads(written.read_text())["judge_model"] == "gpt-4o"
    assert "secret" not in written.read_text() + repr(flags)
    assert not judge.seen
