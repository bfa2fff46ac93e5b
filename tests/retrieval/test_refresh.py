"""The index follows the encoder, on schedule."""

import numpy as np
import pytest
import torch

from rqa.data.documents import Document
from rqa.data.examples import Example
from rqa.models.encoder import Encoder, load_encoder
from rqa.retrieval.index import IndexArguments
from rqa.retrieval.refresh import Refresher, parse_schedule
from rqa.retrieval.retriever import Retriever
from rqa.runtime.errors import UserError


@pytest.fixture
def retriever(encoder_path: str, documents: list[Document]) -> Retriever:
    return Retriever(load_encoder(encoder_path), documents, IndexArguments())


@pytest.fixture
def questions(examples: list[Example]) -> list[str]:
    return [example.question for example in examples]


def change_weights(encoder: Encoder) -> None:
    """As a training step might, only more."""
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)


@pytest.mark.parametrize(
    ("schedule", "due"),
    [
        ("10", {10, 20, 30, 40, 50}),
        ("1", set(range(1, 51))),
        ("100", set()),
        ("0-20:5,20-1000:20", {5, 10, 15, 20, 40}),
        (" 0-20:5 , 30-45:10 ", {5, 10, 15, 30, 40}),
        ("7-22:7", {7, 14, 21}),
    ],
)
def test_a_schedule_says_at_which_steps_a_refresh_is_due(
    schedule: str, due: set[int], retriever: Retriever, monkeypatch: pytest.MonkeyPatch
) -> None:
    refresher = Refresher(retriever, schedule)
    assert {step for step in range(51) if refresher.due(step)} == due
    steps: list[int] = []
    refresh = retriever.refresh
    monkeypatch.setattr(retriever, "refresh", lambda: (steps.append(step), refresh()))
    for step in range(51):
        refresher(step)
    assert steps == [0, *sorted(due)]  # and at the first step, since nothing is indexed


def test_a_run_that_continues_in_the_middle_indexes_at_its_first_step(retriever: Retriever) -> None:
    Refresher(retriever, "100")(37)
    assert len(retriever.index) == len(retriever.documents)


@pytest.mark.parametrize(
    "schedule",
    ["", "x", "0", "-5", "1.5", "10,", "0-100", "100-0:10", "5-5:1", "0-100:0", "0-100:x", "0-100;10", "10 20", "0:10"],
)
def test_a_malformed_schedule_names_the_flag(schedule: str) -> None:
    with pytest.raises(UserError, match="--refresh_step") as error:
        parse_schedule(schedule)
    assert "0-100:10,100-1000:100" in str(error.value)


def test_a_refresh_after_new_weights_changes_what_is_retrieved_to_what_a_new_index_would_find(
    retriever: Retriever, questions: list[str]
) -> None:
    refresher = Refresher(retriever, "10")
    refresher(0)
    before = retriever.retrieve(questions, 8)
    old = retriever.index.search(retriever.encoder.embed(retriever.encoder.tokenize_queries(questions)), 8)
    np.testing.assert_array_equal(before.ids, old[1])
    change_weights(retriever.encoder)
    refresher(9)  # not due
    stale = retriever.retrieve(questions, 8)
    refresher(10)
    after = retriever.retrieve(questions, 8)
    assert (before.ids != after.ids).any()
    assert np.abs(stale.scores - after.scores).max() > 1e-3
    fresh = Retriever(retriever.encoder, retriever.documents, IndexArguments())
    fresh.refresh()
    expected = fresh.retrieve(questions, 8)
    np.testing.assert_array_equal(after.ids, expected.ids)
    np.testing.assert_array_equal(after.scores, expected.scores)


def test_a_refresh_leaves_train_mode_on_and_indexes_without_dropout(retriever: Retriever, questions: list[str]) -> None:
    retriever.encoder.train()
    Refresher(retriever, "10")(0)
    first = retriever.retrieve(questions, 8)
    Refresher(retriever, "10")(10)
    second = retriever.retrieve(questions, 8)
    assert all(module.training for module in retriever.encoder.modules())
    np.testing.assert_array_equal(first.scores, second.scores)
    assert all(parameter.grad is None for parameter in retriever.encoder.parameters())


def test_what_follows_a_refresh_sees_the_new_index(retriever: Retriever) -> None:
    seen: list[int] = []
    refresher = Refresher(retriever, "2", then=lambda: seen.append(len(retriever.index)))
    for step in range(5):
        refresher(step)
    assert seen == [len(retriever.documents)] * 3
