"""Examples: every field read and checked, blank ones left out, written and read back."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from rqa.data import Document, Example, Turn, read_examples, write_examples
from rqa.runtime.errors import UserError

PASSAGE = {"page_content": "Arlen trades in copper.", "metadata": {"source": "guide/0"}}
ARLEN = Document("Arlen trades in copper.", {"source": "guide/0"})
OTHER = {"page_content": "Brask trades in wool.", "metadata": {"source": "guide/2"}}
BRASK = Document("Brask trades in wool.", {"source": "guide/2"})


def write_rows(path: Path, *rows: Any) -> Path:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return path


def test_a_row_holds_question_answer_history_and_passages(tmp_path: Path) -> None:
    path = write_rows(
        tmp_path / "examples.jsonl",
        {
            "chat_history": [{"speaker": "User", "message": "Hello."}, {"speaker": "Assistant", "message": ""}],
            "question": "What does Arlen trade in?",
            "gold_docs": [PASSAGE],
            "gold_answer": "Copper.",
            "hard_neg_docs": [OTHER],
            "ctxs": [OTHER | {"score": 2}, PASSAGE | {"score": -0.5}],
        },
    )
    assert read_examples(path, answers=True) == [
        Example(
            question="What does Arlen trade in?",
            gold_docs=(ARLEN,),
            gold_answer="Copper.",
            chat_history=(Turn("User", "Hello."), Turn("Assistant", "")),
            hard_neg_docs=(BRASK,),
            ctxs=(BRASK, ARLEN),
            ctx_scores=(2.0, -0.5),
        )
    ]


def test_all_but_the_question_may_be_absent(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "examples.jsonl", {"question": "Why?"}, {"question": "How?", "gold_docs": None})
    assert read_examples(path) == [Example("Why?"), Example("How?")]
    assert [example.where for example in read_examples(path)] == [f"{path}:1", f"{path}:2"]


def test_contexts_without_scores_have_none(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "examples.jsonl", {"question": "Why?", "ctxs": [PASSAGE, OTHER]})
    (example,) = read_examples(path)
    assert example.ctxs == (ARLEN, BRASK)
    assert example.ctx_scores is None


def test_scores_are_one_for_each_context_or_none_at_all(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "examples.jsonl", {"question": "Why?", "ctxs": [PASSAGE | {"score": 1.0}, OTHER]})
    (example,) = read_examples(path)
    assert example.ctx_scores is None


def test_each_of_several_questions_becomes_one_example(tmp_path: Path) -> None:
    path = write_rows(
        tmp_path / "examples.jsonl",
        {"questions": ["What?", "Where?", "When?"], "gold_docs": [PASSAGE], "hard_neg_docs": [OTHER]},
        {"question": "Who?", "gold_docs": [OTHER]},
    )
    read = read_examples(path)
    assert read == [
        *(Example(text, (ARLEN,), hard_neg_docs=(BRASK,)) for text in ("What?", "Where?", "When?")),
        Example("Who?", (BRASK,)),
    ]
    assert [example.where for example in read] == [f"{path}:1"] * 3 + [f"{path}:2"]


@pytest.mark.parametrize(
    ("row", "field"),
    [
        ({"question": "", "gold_answer": "A."}, "question"),
        ({"question": " \t\n", "gold_answer": "A."}, "question"),
        ({"question": "Why?", "gold_answer": ""}, "gold_answer"),
        ({"question": "Why?", "gold_answer": "\u3000\n"}, "gold_answer"),
    ],
)
def test_blank_questions_and_answers_are_reported_by_line_and_left_out(
    row: dict[str, Any], field: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = {"question": "Good?", "gold_answer": "Yes."}
    path = write_rows(tmp_path / "examples.jsonl", good, "", row, good)
    monkeypatch.setattr(logging.getLogger("rqa"), "propagate", True)  # an executable turns it off
    with caplog.at_level(logging.INFO, logger="rqa"):
        assert read_examples(path, answers=True) == [Example("Good?", gold_answer="Yes.")] * 2
    (record,) = caplog.records
    assert record.name.startswith("rqa.")
    assert record.levelno == logging.WARNING
    assert record.getMessage().startswith(f"{path}:3: field '{field}' is blank")


def test_one_blank_question_of_several_leaves_the_others(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_rows(tmp_path / "examples.jsonl", {"questions": ["What?", " ", "When?"]})
    monkeypatch.setattr(logging.getLogger("rqa"), "propagate", True)
    with caplog.at_level(logging.INFO, logger="rqa"):
        assert [example.question for example in read_examples(path)] == ["What?", "When?"]
    assert [f"{path}:1" in record.getMessage() for record in caplog.records] == [True]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("{", "JSON"),
        ("[]", "found list"),
        ({}, "'question'"),
        ({"question": None}, "'question'"),
        ({"question": ["Why?"]}, "'question'"),
        ({"questions": "Why?"}, "'questions'"),
        ({"questions": []}, "'questions'"),
        ({"questions": ["Why?", 3]}, "'questions'"),
        ({"question": "Why?", "gold_answer": 3}, "'gold_answer'"),
        ({"question": "Why?", "gold_answer": ["A."]}, "'gold_answer'"),
        ({"question": "Why?", "gold_docs": "guide"}, "'gold_docs'"),
        ({"question": "Why?", "gold_docs": PASSAGE}, "'gold_docs'"),
        ({"question": "Why?", "gold_docs": ["guide"]}, "'gold_docs'.*found str"),
        ({"question": "Why?", "gold_docs": [PASSAGE, {}]}, "'gold_docs'.*'page_content'"),
        ({"question": "Why?", "gold_docs": [{"page_content": "x", "metadata": 3}]}, "'gold_docs'.*'metadata'"),
        ({"question": "Why?", "hard_neg_docs": [{"page_content": ""}]}, "'hard_neg_docs'.*'page_content'"),
        ({"question": "Why?", "hard_neg_docs": 1}, "'hard_neg_docs'"),
        ({"question": "Why?", "ctxs": [{"text": "x", "score": 1}]}, "'ctxs'.*'page_content'"),
        ({"question": "Why?", "ctxs": {"0": PASSAGE}}, "'ctxs'"),
        ({"question": "Why?", "chat_history": "Hello."}, "'chat_history'"),
        ({"question": "Why?", "chat_history": ["Hello."]}, "'chat_history'.*'speaker'"),
        ({"question": "Why?", "chat_history": [{"speaker": "User"}]}, "'chat_history'.*'message'"),
        ({"question": "Why?", "chat_history": [{"speaker": "User", "message": None}]}, "'chat_history'"),
    ],
)
def test_a_malformed_row_is_named_by_file_line_and_field(row: Any, reason: str, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "examples.jsonl", {"question": "Good?"}, "", row)
    with pytest.raises(UserError, match=reason) as caught:
        read_examples(path)
    assert str(caught.value).startswith(f"{path}:3: ")


@pytest.mark.parametrize("row", [{"question": "Why?"}, {"question": "Why?", "gold_answer": None}])
def test_answers_may_be_absent_only_where_none_are_needed(row: dict[str, Any], tmp_path: Path) -> None:
    path = write_rows(tmp_path / "examples.jsonl", {"question": "Good?", "gold_answer": "Yes."}, row)
    assert len(read_examples(path)) == 2
    with pytest.raises(UserError, match=r"examples\.jsonl:2: field 'gold_answer'"):
        read_examples(path, answers=True)


def test_one_answer_does_not_serve_several_questions(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "examples.jsonl", {"questions": ["What?", "Where?"], "gold_answer": "There."})
    with pytest.raises(UserError, match=r"examples\.jsonl:1: .*'questions'"):
        read_examples(path, answers=True)


@pytest.mark.parametrize("rows", [(), ("", ""), ({"question": " "},)])
def test_a_file_without_examples_is_an_error(rows: tuple[Any, ...], tmp_path: Path) -> None:
    path = write_rows(tmp_path / "examples.jsonl", *rows)
    with pytest.raises(UserError, match=r"examples\.jsonl: holds no examples"):
        read_examples(path)


def test_what_is_written_is_read_back_the_same(tmp_path: Path, examples: list[Example]) -> None:
    written = [
        *examples,
        Example("¿Qué? 😀\n二", (ARLEN, BRASK), "Ü\u2028", (Turn("User", "hi\r\n"), Turn("AI", ""))),
        Example("Retriever's", (ARLEN,), hard_neg_docs=(BRASK, ARLEN)),
        Example("Scored?", ctxs=(BRASK, ARLEN), ctx_scores=(0.1 + 0.2, -1e-9)),
        Example("Unscored?", ctxs=(ARLEN,)),
        Example("Alone?"),
    ]
    write_examples(tmp_path / "examples.jsonl", written)
    read = read_examples(tmp_path / "examples.jsonl")
    assert read == written
    write_examples(tmp_path / "again.jsonl", read)
    assert (tmp_path / "again.jsonl").read_bytes() == (tmp_path / "examples.jsonl").read_bytes()
