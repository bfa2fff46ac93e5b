"""A rating is kept as an example that training can use, or it is refused; there is nothing in between."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rqa.data import Document, read_examples
from rqa.endpoint.requests import BadRequest
from rqa.preparation.feedback import read_feedback
from rqa.runtime.errors import UserError
from rqa.serving.feedback import Feedback
from rqa.serving.sources import passage_id

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
