"""The index follows the encoder, on schedule; saved, it goes on as if nothing had happened."""

import copy
import random
import threading
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import torch
import numpy as np
import pytest
from fakes import change_weights

from rqa.data import Document, Example
from rqa.models import encoder as encoder_module
from rqa.models.encoder import Encoder, load_encoder
from rqa.objectives.ctl import MinedNegatives, NegativeArguments
from rqa.packing import TokenBatch
from rqa.retrieval.index import IndexArguments
from rqa.retrieval.refresh import RefreshArguments, Refresher
from rqa.retrieval.retriever import Retriever
from rqa.runtime.errors import UserError
from rqa.training.checkpoint import LiveState


@pytest.fixture
def retriever(encoder_path: str, documents: list[Document]) -> Retriever:
    return Retriever(load_encoder(encoder_path), documents)


def refresher_of(retriever: Retriever, schedule: str = "10", then: Any = None, **flags: bool) -> Refresher:
    return Refresher(retriever, RefreshArguments(refresh_step=schedule, **flags), then)


def table(retriever: Retriever) -> np.ndarray:
    """The embeddings that the index holds, asked of FAISS itself. [N, D]"""
    return retriever.index._faiss.reconstruct_n(0, len(retriever.index))


def fresh_table(retriever: Retriever) -> np.ndarray:
    """Those that a whole new index would hold."""
    return table(Retriever(retriever.encoder, retriever.documents).open())


def new(staleness: float = 0.0) -> dict[str, float]:
    """What a refresher says of an index that it has just made or swapped in."""
    return {"index_staleness": staleness, "index_refreshed": 1.0}


@pytest.mark.parametrize(
    ("schedule", "due"),
    [("10", {10, 20, 30, 40, 50}), ("1", set(range(1, 51))), ("100", set()), ("7-22:7", {7, 14, 21}),
     ("0-20:5,20-1000:20", {5, 10, 15, 20, 40}), (" 0-20:5 , 30-45:10 ", {5, 10, 15, 30, 40})],
)  # fmt: skip
def test_a_refresh_and_what_follows_it_come_at_the_first_step_and_when_the_schedule_says(
    schedule: str, due: set[int], retriever: Retriever, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps, seen, replace, count = [], [], retriever.replace, len(retriever.documents)
    monkeypatch.setattr(retriever, "encode", lambda encoder: np.full((count, 4), step, np.float32))
    monkeypatch.setattr(retriever, "replace", lambda vectors: steps.append(step) or replace(vectors))
    refresher = refresher_of(retriever, schedule, then=lambda: seen.append(int(table(retriever)[0, 0])))
    for step in range(51):
        last = max([0, *(each for each in due if each <= step)])
        assert refresher(step) == (new() if step in {0, *due} else {"index_staleness": step - last})
        assert refresher.version == f"index-{last}"
    assert steps == seen == [0, *sorted(due)]  # what follows sees the new index


@pytest.mark.parametrize(
    "schedule",
    ["", "x", "0", "-5", "1.5", "10,", "0-100", "100-0:10", "5-5:1", "0-100:0", "0-100:x", "0-100;10", "10 20", "0:10"],
)
def test_a_malformed_schedule_names_the_flag(schedule: str) -> None:
    with pytest.raises(UserError, match=r"--refresh_step .*: write a number of steps, or .0-100:10,100-1000:100"):
        RefreshArguments(refresh_step=schedule)


def test_frozen_passages_are_encoded_once_and_what_follows_a_refresh_still_runs(retriever: Retriever) -> None:
    seen: list[int] = []
    refresher = refresher_of(retriever, "2", then=lambda: seen.append(1), train_query_encoder_only=True)
    refresher.flags.freeze_passages(retriever.encoder)
    assert refresher(0) == {}  # never stale
    first = retriever.index._faiss
    change_weights(retriever.encoder.backbone)
    for step in range(1, 6):
        assert refresher(step) == {}
    assert retriever.index._faiss is first
    assert len(seen) == 3
    assert refresher.version == "index-4"  # what follows is saved anew
    np.testing.assert_array_equal(table(retriever), fresh_table(retriever))
    with pytest.raises(UserError, match="--train_query_encoder_only true"):
        RefreshArguments().freeze_passages(retriever.encoder)


@pytest.mark.parametrize("in_background", [False, True])
def test_no_refresh_disturbs_the_random_stream(in_background: bool, retriever: Retriever) -> None:
    """Dropout in training is the same, whatever is encoded between its draws or beside them."""
    retriever.encoder.train()
    refresher = refresher_of(retriever, "1", refresh_async=in_background)
    expected, state, drawn = torch.rand(8, generator=torch.manual_seed(1)), random.getstate(), []
    torch.manual_seed(1)
    for step in range(4):
        refresher(step)
        drawn.append(torch.rand(2))
    refresher.close()
    assert torch.equal(torch.cat(drawn), expected)
    assert random.getstate() == state


def wait(refresher: Refresher) -> None:
    """Until the documents in work are encoded."""
    refresher._work.embeddings.exception(timeout=60)


def test_an_index_made_in_the_background_has_its_first_weights(retriever: Retriever) -> None:
    """Training goes on meanwhile: the weights change, the mode stays, and the old index serves until the swap."""
    retriever.encoder.train()
    seen: list[int] = []
    refresher = refresher_of(retriever, "2", lambda: seen.append(1), refresh_async=True)
    assert refresher(0) == new()  # nothing to retrieve from yet: this one is waited for
    old = table(retriever)
    assert refresher(1) == {"index_staleness": 1}
    change_weights(retriever.encoder)
    expected = fresh_table(retriever)
    assert refresher(2) == {"index_staleness": 2}
    change_weights(retriever.encoder)
    np.testing.assert_array_equal(table(retriever), old)
    wait(refresher)
    assert refresher(3) == new(staleness=1)
    assert refresher.version == "index-2"
    np.testing.assert_array_equal(table(retriever), expected)
    assert len(seen) == 2
    assert all(module.training for module in retriever.encoder.modules())
    assert all(parameter.requires_grad for parameter in retriever.encoder.parameters())


def test_a_refresh_due_during_another_begins_after_it(retriever: Retriever, monkeypatch: pytest.MonkeyPatch) -> None:
    refresher = refresher_of(retriever, "2", refresh_async=True)
    refresher(0)
    go, encode = threading.Event(), retriever.encode
    monkeypatch.setattr(retriever, "encode", lambda *given, **named: go.wait(60) and encode(*given, **named))
    for step in range(2, 6):  # another is due at step 4
        assert refresher(step) == {"index_staleness": step}
    go.set()
    wait(refresher)
    assert refresher(7) == new(staleness=5)  # of step 2, and the next one begins
    wait(refresher)
    assert refresher(9) == new(staleness=2)
    refresher.close()


def test_a_resumed_run_begins_what_fell_due_since_the_weights_of_its_index(
    retriever: Retriever, documents: list[Document], tmp_path: Path
) -> None:
    """What was being encoded is lost; when the next one begins follows from the steps alone."""
    refresher = refresher_of(retriever, "4", refresh_async=True)
    refresher(0)
    refresher(4)
    wait(refresher)
    assert refresher(5) == new(staleness=1)
    refresher(8)  # begins, and its end is not waited for
    assert refresher._work
    refresher.close()
    refresher.save(tmp_path)
    for step, begins in ((6, False), (8, True), (10, True)):
        again = refresher_of(Retriever(retriever.encoder, documents), "4", refresh_async=True)
        again.load(tmp_path)
        assert again.version == "index-4"
        assert again(step) == {"index_staleness": step - 4}
        assert (again._work is not None) == begins
        again.close()
    anew = refresher_of(Retriever(retriever.encoder, documents[1:]), "4", refresh_async=True)
    anew.load(tmp_path)
    assert anew(6) == new()
    assert anew(7) == {"index_staleness": 1}
    assert anew._work is None  # that of step 4 is in this index
    anew(8)
    assert anew._work
    anew.close()


def test_what_fails_in_the_background_fails_in_training(retriever: Retriever, monkeypatch: pytest.MonkeyPatch) -> None:
    refresher = refresher_of(retriever, "1", refresh_async=True)
    refresher(0)
    monkeypatch.setattr(retriever, "encode", Mock(side_effect=UserError("documents.jsonl:7: unreadable")))
    refresher(1)
    wait(refresher)
    with pytest.raises(UserError, match="jsonl:7"):
        refresher(2)


def test_closing_stops_the_work_before_its_next_batch(retriever: Retriever, monkeypatch: pytest.MonkeyPatch) -> None:
    refresher = refresher_of(retriever, "1", refresh_async=True)
    refresher(0)
    begun, closed, forwards, forward = threading.Event(), threading.Event(), [], Encoder.forward

    def slow(self: Encoder, batch: TokenBatch) -> torch.Tensor:
        forwards.append(begun.set())
        closed.wait(60)
        return forward(self, batch)

    monkeypatch.setattr(Encoder, "forward", slow)
    singly = lambda lengths, *_, **__: [[i] for i in range(len(lengths))]  # noqa: E731
    monkeypatch.setattr(encoder_module, "token_budget_batches", singly)
    refresher(1)
    begun.wait(60)
    work = refresher._work
    threading.Timer(0.1, closed.set).start()
    refresher.close()
    assert work.embeddings.done()
    assert 1 <= len(forwards) < len(retriever.documents)
    refresher.close()  # nothing is left to close


def test_a_saved_index_finds_the_very_same_and_goes_on_as_if_nothing_had_happened(
    retriever: Retriever, examples: list[Example], documents: list[Document], tmp_path: Path
) -> None:
    questions, mining = [example.question for example in examples], NegativeArguments(negatives_to_rank=5)
    refresher = refresher_of(retriever, "2", then=MinedNegatives(examples, retriever, mining))
    assert isinstance(refresher, LiveState)
    refresher(0)
    change_weights(retriever.encoder)
    refresher(2)
    change_weights(retriever.encoder)
    (tmp_path / str(refresher.version)).mkdir()
    refresher.save(tmp_path / "index-2")
    other = Retriever(copy.deepcopy(retriever.encoder), list(documents))
    again = refresher_of(other, "2", then=MinedNegatives(examples, other, mining))
    again.load(tmp_path / "index-2")
    assert again.version == "index-2"
    for step in (3, 4, 5, 6):
        assert again(step) == refresher(step)
        ours, theirs = other.retrieve(questions, 9), retriever.retrieve(questions, 9)
        np.testing.assert_array_equal(ours.ids, theirs.ids)
        np.testing.assert_array_equal(ours.scores, theirs.scores)
        assert [again.then[i] for i in range(24)] == [refresher.then[i] for i in range(24)]


def test_before_negatives_are_mined_there_is_nothing_to_save(retriever: Retriever, examples: list[Example]) -> None:
    """Also where the index was opened: a checkpoint of step 0 would keep it without them."""
    refresher = refresher_of(retriever.open(), then=MinedNegatives(examples, retriever, NegativeArguments()))
    assert refresher.version is None
    refresher(0)
    assert refresher.version == "index-0"


@pytest.mark.parametrize(("fewer", "factory"), [(1, "Flat"), (0, "HNSW16")])
def test_a_saved_index_of_other_documents_or_another_kind_is_made_anew(
    fewer: int, factory: str, retriever: Retriever, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    refresher = refresher_of(retriever)
    refresher(0)
    refresher.save(tmp_path)
    other = Retriever(retriever.encoder, retriever.documents[fewer:], IndexArguments(index_factory=factory))
    again = refresher_of(other)
    again.load(tmp_path)
    assert again.version is None
    assert "its index has other documents or another kind; encoding the documents again" in caplog.text
    assert again(7) == new()
    assert again.version == "index-7"
    if factory == "Flat":
        np.testing.assert_array_equal(table(other), fresh_table(other))
