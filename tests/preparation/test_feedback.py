"""Ratings become what readers and retrievers train on, and what they contradict is told."""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from trainers import Train

from rqa.data import Document, Example, iterate_examples, read_examples
from rqa.endpoint.requests import BadRequest
from rqa.preparation.convert import read_layout
from rqa.preparation.feedback import Feedback, read_feedback
from rqa.retrieval.citations import passage_id
from rqa.runtime.errors import UserError

A, B, C = (Document(text, {"source": text}) for text in ("copper", "wool", "amber"))
Rating = dict[str, Any]


def rated(
    rating: int, answer: str = "one", correction: str | None = None, question: str = "q", documents: Any = (A, B, C),
    **marked: tuple[Document, ...],
) -> Rating:  # fmt: skip
    """A line in which passages are marked, as `cited=(A,)`."""
    shown = [d.to_json() | {name: d in those for name, those in marked.items()} for d in documents]
    return {"question": question, "chat_history": [], "ctxs": shown, "generated_answer": answer, "rating": rating,
            "corrected_answer": correction, "model": "m"}  # fmt: skip


def convert(folder: Path, *rows: Rating) -> tuple[dict[str, int], list[Example], list[Example]]:
    """What is counted, the examples for readers, and those for retrievers."""
    timed = [{"time": f"2026-01-{day:02}"} | row for day, row in enumerate(rows, start=1)]
    (folder / "feedback.jsonl").write_text("".join(json.dumps(row) + "\n" for row in timed))
    counts = read_layout("feedback", [folder / "feedback.jsonl"], folder / "data")
    paths = (folder / f"data/feedback_{kind}.jsonl" for kind in ("w_qa", "w_q"))
    return counts, *(list(iterate_examples(path)) if path.exists() else [] for path in paths)


ANSWERS: list[tuple[list[Rating], list[str]]] = [  # the gold answer, then the others
    ([rated(1)], ["one"]),
    ([rated(-1, correction="two")], ["two"]),
    ([rated(1, correction="two")], ["two", "one"]),
    ([rated(1), rated(-1, "three", "two")], ["two", "one"]),
    ([rated(-1, "three", "two"), rated(1)], ["two", "one"]),
    ([rated(-1, "three", "two"), rated(-1, "four", "five")], ["five", "two"]),
    ([rated(-1, correction="two"), rated(-1, correction="three")], ["three"]),  # the latest rating of an answer
    ([rated(-1, correction="two"), rated(1)], ["one"]),
    ([rated(1), rated(-1)], []),
    ([rated(-1, correction="two"), rated(-1, "two")], []),
    ([rated(1), rated(1, "two", question=" Q ")], ["two", "one"]),
]


@pytest.mark.parametrize(("rows", "answers"), ANSWERS)
def test_corrections_are_gold_answers_before_approved_ones_and_the_latest_rating_of_an_answer_holds(
    rows: list[Rating], answers: list[str], tmp_path: Path
) -> None:
    helpful = rated(-1, "of another question", question="r", helpful=(C,))  # so that there is something to write
    _, found, _ = convert(tmp_path, *rows, helpful)
    assert [[each.gold_answer, *each.other_answers] for each in found] == [answers] * bool(answers)


PASSAGES: list[tuple[list[Rating], tuple[Document, ...], tuple[Document, ...]]] = [  # gold ones, hard negatives
    ([rated(1, cited=(A,), clicked=(B,))], (A, B), ()),
    ([rated(-1, cited=(A,), clicked=(B,), helpful=(C,))], (C,), ()),
    ([rated(-1, correction="two", cited=(A,), clicked=(B,), rejected=(C,))], (A,), (C,)),
    ([rated(1, cited=(A, B), rejected=(B,))], (A,), (B,)),
    ([rated(1, cited=(A,)), rated(-1, "two", rejected=(A,), helpful=(B,))], (B,), (A,)),
    ([rated(-1, "two", rejected=(A,)), rated(1, cited=(A,))], (A,), ()),
    ([rated(1, cited=(A,)), rated(1, clicked=(B,))], (B,), ()),  # another rating of the same answer
]


@pytest.mark.parametrize(("rows", "gold", "negative"), PASSAGES)
def test_what_a_right_answer_cites_and_what_helps_is_gold_and_what_is_rejected_a_hard_negative(
    rows: list[Rating], gold: tuple[Document, ...], negative: tuple[Document, ...], tmp_path: Path
) -> None:
    *_, (example,) = convert(tmp_path, *rows)
    assert (example.gold_docs, example.hard_neg_docs, example.gold_answer) == (gold, negative, None)


def test_repeats_conflicts_and_what_is_left_out_are_counted(tmp_path: Path) -> None:
    rows = [
        rated(1, cited=(A,)), rated(1, cited=(A,)), rated(-1, rejected=(A,)),  # the third one holds
        rated(-1, "two", "right", helpful=(A,)), rated(-1, "three", "also right"),
        rated(1, question="without a passage"), rated(-1, question="without anything"),
    ]  # fmt: skip
    counts, for_readers, for_retrievers = convert(tmp_path, *rows)
    assert counts == {
        "ratings": 7, "repeated ratings": 1, "answers rated both up and down": 1, "passages both gold and rejected": 1,
        "questions with different corrections": 1, "answers rated down without a correction": 2,
        "questions of feedback_w_qa": 2, "questions without a right answer left out of feedback_w_qa": 1,
        "questions of feedback_w_q": 1, "questions without a gold passage left out of feedback_w_q": 2,
    }  # fmt: skip
    assert (len(for_readers), len(for_retrievers)) == (2, 1)


def test_the_times_decide_and_not_the_order_of_the_lines(tmp_path: Path) -> None:
    rows = [row for rows, *_ in PASSAGES for row in rows]
    rows = [{"time": f"2026-01-{day:02}"} | row for day, row in enumerate(rows, start=10)]
    counts, *examples = convert(tmp_path, *rows)
    assert convert(tmp_path, *random.Random(0).sample(rows, len(rows))) == (counts, *examples)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (json.dumps(rated(-1)), "feedback.jsonl: holds no rows to write; 1 ratings; 1 answers rated down without"),
        (json.dumps(rated(2)), "feedback.jsonl:1: field 'rating' must be 1 or -1"),
        (json.dumps(rated(1) | {"generated_answer": None}), "feedback.jsonl:1: field 'generated_answer' is missing"),
        (json.dumps(rated(1) | {"ctxs": [3]}), "feedback.jsonl:1: field 'ctxs'"),
        (json.dumps(rated(1) | {"ctxs": [{"page_content": "x", "cited": "no"}]}), "cited are true or false"),
        ('{"question": "cut sho', "feedback.jsonl:1: not valid JSON"),
    ],
)  # fmt: skip
def test_a_file_without_anything_to_train_on_is_refused_in_one_line(
    text: str, message: str, refused: Any, tmp_path: Path
) -> None:
    (tmp_path / "feedback.jsonl").write_text(text)
    line = ["--from_format", "feedback", "--input_path", tmp_path / "feedback.jsonl", "--output_dir", tmp_path / "data"]
    refused(message, "convert_dataset", *line)
    assert not (tmp_path / "data").exists() or not any((tmp_path / "data").iterdir())


def test_a_trainer_takes_a_step_on_ratings(
    documents: list[Document], examples: list[Example], train: Train, tmp_path: Path
) -> None:
    marks = [{"cited": example.gold_docs, "rejected": (documents[3],)} for example in examples[:3]]
    rows = [
        rated(1, str(example.gold_answer), None, example.question, documents[:4], **marked)
        for example, marked in zip(examples, [*marks, {}], strict=False)  # the last one has no gold passage
    ]
    convert(tmp_path, *rows)
    readers, retrievers = (tmp_path / f"data/feedback_{kind}.jsonl" for kind in ("w_qa", "w_q"))
    assert (len(read_examples(readers, answers=True)), len(read_examples(retrievers))) == (4, 3)
    assert train("train_swr", train_file=readers, max_steps=1, eval_file=None, test_file=None).is_dir()


RATED = {"question": "What does Brask trade in?", "answer": "It is not said.", "rating": -1}
MARKS = ("id", "cited", "clicked", "helpful", "rejected")


def ids(documents: Sequence[Document]) -> list[str]:
    return [passage_id(position, document) for position, document in enumerate(documents)]


def test_a_line_is_an_example_with_what_was_done_to_each_passage(documents: list[Document], tmp_path: Path) -> None:
    path, (copper, founded, wool, *_) = tmp_path / "feedback.jsonl", ids(documents)
    turn = {"speaker": "user", "message": "Good day."}
    marks = {"passages": [founded, copper, wool], "clicked": [copper], "helpful": [wool], "rejected": [founded]}
    others = {"corrected_answer": " Brask trades in wool.\n", "model": "tiny", "chat_history": [turn | {"junk": 1}]}
    Feedback(path, documents).save(RATED | marks | others)
    Feedback(path, documents).save(RATED | {"rating": 1, "corrected_answer": RATED["answer"]})  # it corrects nothing
    (row, plain), (example, _) = map(json.loads, path.read_text().splitlines()), read_examples(path)
    assert example.ctxs == (documents[1], documents[0], documents[2])
    assert [[shown[mark] for mark in MARKS] for shown in row.pop("ctxs")] == [
        [founded, False, False, False, True], [copper, False, True, False, False], [wool, True, False, True, False],
    ]  # fmt: skip
    assert row.pop("time") <= plain.pop("time") < "3000"
    asked = {"question": RATED["question"], "generated_answer": RATED["answer"]}
    corrected = {"corrected_answer": "Brask trades in wool.", "model": "tiny", "rating": -1}
    assert row == asked | corrected | {"chat_history": [turn]}
    none = {"corrected_answer": None, "model": "", "rating": 1, "ctxs": [], "chat_history": []}
    assert plain == asked | none


@pytest.mark.parametrize(
    ("param", "wrong"),
    [
        ("question", {"question": None}), ("question", {"question": " "}), ("answer", {"answer": "\n"}),
        ("answer", {"answer": ["a"]}), ("corrected_answer", {"corrected_answer": {}}), ("model", {"model": ["m"]}),
        ("rating", {"rating": 0}), ("rating", {"rating": True}), ("rating", {"rating": None}),
        ("chat_history", {"chat_history": [{"speaker": "user"}]}), ("chat_history", {"chat_history": "Hello"}),
        ("passages", {"passages": "0-12345678"}), ("passages", {"passages": [0]}), ("clicked", {"clicked": [0]}),
        ("passages", {"passages": ["0-12345678"]}), ("passages", {"clicked": ["0-12345678"]}),
        ("passages", {"passages": ["999-12345678"]}),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_and_not_kept(
    param: str, wrong: dict[str, Any], documents: list[Document], tmp_path: Path
) -> None:
    with pytest.raises(BadRequest, match=f"'{param}'") as error:
        Feedback(tmp_path / "feedback.jsonl", documents).save(RATED | wrong)
    assert error.value.param == param
    assert (tmp_path / "feedback.jsonl").read_bytes() == b""


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda inner: st.lists(inner, max_size=3)
                    | st.dictionaries(st.sampled_from(["speaker", "message"]), inner))  # fmt: skip


@given(data=st.data())
def test_whatever_is_sent_is_refused_or_can_be_converted(
    data: st.DataObject, documents: list[Document], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path, some = tmp_path_factory.mktemp("any") / "feedback.jsonl", st.lists(st.sampled_from(ids(documents)[:3]))
    right = {"question": st.text(), "answer": st.text(), "rating": st.sampled_from([1, -1]), "passages": some,
             "corrected_answer": st.none() | st.text(), "clicked": some, "helpful": some, "rejected": some,
             "chat_history": st.lists(st.fixed_dictionaries({"speaker": st.text(), "message": st.text()})),
             "model": st.text()}  # fmt: skip
    body = data.draw(st.fixed_dictionaries(right)) | data.draw(
        st.dictionaries(st.sampled_from([*right]), JSON, max_size=1)
    )
    refused = None
    try:
        Feedback(path, documents).save(body)
    except BadRequest as error:
        refused = error.param
    assert refused in body if refused else ("", "ratings") in list(read_feedback(path, "feedback"))


def test_a_file_that_cannot_be_written_is_refused_at_the_start(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent" / "feedback.jsonl"):
        with pytest.raises(UserError, match=f"^--feedback_path {path}: "):
            Feedback(path, [])
