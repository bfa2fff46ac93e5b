"""The index follows the encoder, on schedule."""

import math
import random
import threading
from pathlib import Path

import torch
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rqa.data import Document, Example
from rqa.models import encoder as encoder_module
from rqa.models.encoder import Encoder, load_encoder
from rqa.objectives.ctl import MinedNegatives, NegativeArguments
from rqa.packing import TokenBatch
from rqa.retrieval.index import Index, IndexArguments
from rqa.retrieval.refresh import RefreshArguments, Refresher, documents_to_encode, parse_schedule
from rqa.retrieval.retriever import Retriever
from rqa.runtime.errors import UserError


@pytest.fixture
def retriever(encoder_path: str, documents: list[Document]) -> Retriever:
    return Retriever(load_encoder(encoder_path), documents, IndexArguments())


@pytest.fixture
def questions(examples: list[Example]) -> list[str]:
    return [example.question for example in examples]


def change_weights(encoder: torch.nn.Module) -> None:
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
    refresher = Refresher(retriever, RefreshArguments(schedule))
    assert {step for step in range(51) if refresher.due(step)} == due
    steps: list[int] = []
    encode = retriever.encode
    monkeypatch.setattr(retriever, "encode", lambda numbers: steps.append(step) or encode(numbers))
    for step in range(51):
        refresher(step)
    assert steps == [0, *sorted(due)]  # and at the first step, since nothing is indexed


def test_a_run_that_continues_in_the_middle_indexes_at_its_first_step(retriever: Retriever) -> None:
    Refresher(retriever, RefreshArguments("100"))(37)
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
    refresher = Refresher(retriever, RefreshArguments("10"))
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
    Refresher(retriever, RefreshArguments("10"))(0)
    first = retriever.retrieve(questions, 8)
    Refresher(retriever, RefreshArguments("10"))(10)
    second = retriever.retrieve(questions, 8)
    assert all(module.training for module in retriever.encoder.modules())
    np.testing.assert_array_equal(first.scores, second.scores)
    assert all(parameter.grad is None for parameter in retriever.encoder.parameters())


def test_what_follows_a_refresh_sees_the_new_index(retriever: Retriever) -> None:
    seen: list[int] = []
    refresher = Refresher(retriever, RefreshArguments("2"), then=lambda: seen.append(len(retriever.index)))
    for step in range(5):
        refresher(step)
    assert seen == [len(retriever.documents)] * 3


def table(retriever: Retriever) -> np.ndarray:
    """The embeddings that the index holds, asked of FAISS itself. [N, D]"""
    return retriever.index._faiss.reconstruct_n(0, len(retriever.index))


def fresh_table(retriever: Retriever) -> np.ndarray:
    """Those that a whole new index would hold."""
    fresh = Retriever(retriever.encoder, retriever.documents, IndexArguments())
    fresh.refresh()
    return table(fresh)


@pytest.mark.parametrize("fraction", [0.04, 0.1, 1 / 3, 0.5, 0.99, 1.0])
def test_every_document_comes_round_in_a_partial_refresh(
    fraction: float, retriever: Retriever, questions: list[str]
) -> None:
    """Within ceil(1 / f) refreshes if nothing is retrieved, and within ceil(2 / f) if ever so much is."""
    for rounds, asked in ((math.ceil(1 / fraction), []), (math.ceil(2 / fraction), questions)):
        retriever.index = Index(IndexArguments())
        refresher = Refresher(retriever, RefreshArguments("1", refresh_fraction=fraction))
        refresher(0)
        old = table(retriever)
        change_weights(retriever.encoder)
        expected = fresh_table(retriever)
        for step in range(1, rounds + 1):
            if asked:
                retriever.retrieve(asked, 3)
            refresher(step)
        np.testing.assert_allclose(table(retriever), expected, atol=1e-5)
        assert np.abs(old - expected).max() > 1e-2


def test_a_partial_refresh_encodes_its_share_and_keeps_the_other_embeddings(retriever: Retriever) -> None:
    refresher = Refresher(retriever, RefreshArguments("1", refresh_fraction=0.25))
    refresher(0)
    old = table(retriever)
    change_weights(retriever.encoder)
    new = fresh_table(retriever)
    # Of 24 documents 6 are new, the others of one step before.
    assert refresher(1) == {"index_staleness": 0.75, "index_refreshed": True}
    now = table(retriever)
    np.testing.assert_allclose(now[:6], new[:6], atol=1e-5)
    np.testing.assert_array_equal(now[6:], old[6:])


def test_the_whole_share_of_one_is_a_full_refresh_to_the_bit(retriever: Retriever, questions: list[str]) -> None:
    refresher = Refresher(retriever, RefreshArguments("2", refresh_fraction=1.0))
    refresher(0)
    change_weights(retriever.encoder)
    retriever.retrieve(questions, 3)
    refresher(2)
    np.testing.assert_array_equal(table(retriever), fresh_table(retriever))


def test_documents_found_since_the_last_refresh_are_encoded_at_once(retriever: Retriever, questions: list[str]) -> None:
    refresher = Refresher(retriever, RefreshArguments("1", refresh_fraction=0.25))
    refresher(0)
    hits = retriever.retrieve(questions, 4)
    counts = np.bincount(hits.ids.flatten(), minlength=24)
    often = set(np.argsort(-counts, kind="stable")[:3].tolist())
    change_weights(retriever.encoder)
    refresher(1)
    assert often <= set(np.flatnonzero(refresher.made_at == 1).tolist())
    assert not retriever.found.any()  # counted anew


@given(
    found=st.lists(st.integers(0, 3), min_size=1, max_size=40),
    fraction=st.floats(0, 1, exclude_min=True),
    chance=st.randoms(use_true_random=False),
)
def test_a_share_is_exact_whatever_was_found(found: list[int], fraction: float, chance: random.Random) -> None:
    made_at = np.array([chance.randrange(5) for _ in found])
    chosen = documents_to_encode(fraction, np.array(found), made_at)
    n = math.ceil(fraction * len(found))
    assert len(chosen) == n
    assert sorted(set(chosen.tolist())) == chosen.tolist()
    left = set(range(len(found))) - set(chosen.tolist())
    # Whoever was found often and left out gave way to others found as often, half of the share.
    for number in left:
        if found[number]:
            assert sum(found[other] >= found[number] for other in chosen) >= n // 2
    # Whoever is old and left out gave way to others as old, at least the other half.
    for number in left:
        assert sum(made_at[other] <= made_at[number] for other in chosen) >= n - n // 2


def wait(refresher: Refresher) -> None:
    """Until the documents in work are encoded."""
    refresher._work._thread.join(timeout=60)


@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_an_index_made_in_the_background_is_that_of_the_weights_at_its_beginning(
    fraction: float, retriever: Retriever
) -> None:
    """Training goes on meanwhile: the weights change, the mode stays, and the old index serves until the swap."""
    retriever.encoder.train()
    seen: list[int] = []
    arguments = RefreshArguments("2", refresh_fraction=fraction, refresh_async=True)
    refresher = Refresher(retriever, arguments, then=lambda: seen.append(1))
    assert refresher(0) == {
        "index_staleness": 0,
        "index_refreshed": True,
    }  # nothing to retrieve from yet: this one is waited for
    old = table(retriever)
    assert refresher(1) == {"index_staleness": 1}
    change_weights(retriever.encoder)
    expected = fresh_table(retriever)
    assert refresher(2) == {"index_staleness": 2}
    change_weights(retriever.encoder)
    np.testing.assert_array_equal(table(retriever), old)
    wait(refresher)
    assert refresher(3) == {"index_staleness": 1 * fraction + 3 * (1 - fraction), "index_refreshed": True}
    n = round(24 * fraction)
    np.testing.assert_allclose(table(retriever)[:n], expected[:n], atol=1e-6)
    np.testing.assert_array_equal(table(retriever)[n:], old[n:])
    assert len(seen) == 2
    assert all(module.training for module in retriever.encoder.modules())
    assert all(parameter.requires_grad for parameter in retriever.encoder.parameters())


def test_a_refresh_that_falls_due_during_another_begins_after_it(
    retriever: Retriever, monkeypatch: pytest.MonkeyPatch
) -> None:
    refresher = Refresher(retriever, RefreshArguments("2", refresh_async=True))
    refresher(0)
    go, encode = threading.Event(), retriever.encode
    monkeypatch.setattr(retriever, "encode", lambda *arguments: go.wait(60) and encode(*arguments))
    for step in range(2, 6):  # another is due at step 4
        assert refresher(step) == {"index_staleness": step}
    go.set()
    wait(refresher)
    assert refresher(7) == {"index_staleness": 5, "index_refreshed": True}  # of step 2, and the next one begins
    wait(refresher)
    assert refresher(9) == {"index_staleness": 2, "index_refreshed": True}
    refresher.close()


def test_what_goes_wrong_in_the_background_goes_wrong_in_training(
    retriever: Retriever, monkeypatch: pytest.MonkeyPatch
) -> None:
    refresher = Refresher(retriever, RefreshArguments("1", refresh_async=True))
    refresher(0)

    def encode(*_: object) -> np.ndarray:
        raise UserError("documents.jsonl:7: unreadable")

    monkeypatch.setattr(retriever, "encode", encode)
    refresher(1)
    wait(refresher)
    with pytest.raises(UserError, match="jsonl:7"):
        refresher(2)


def test_closing_stops_the_background_before_its_next_batch(
    retriever: Retriever, monkeypatch: pytest.MonkeyPatch
) -> None:
    refresher = Refresher(retriever, RefreshArguments("1", refresh_async=True))
    refresher(0)
    begun, closed, forwards = threading.Event(), threading.Event(), []
    forward = Encoder.forward

    def slow(self: Encoder, batch: TokenBatch) -> torch.Tensor:
        forwards.append(1)
        begun.set()
        closed.wait(60)
        return forward(self, batch)

    monkeypatch.setattr(Encoder, "forward", slow)
    monkeypatch.setattr(
        encoder_module, "token_budget_batches", lambda lengths, *_, **__: [[i] for i in range(len(lengths))]
    )
    refresher(1)
    begun.wait(60)
    work = refresher._work
    threading.Timer(0.1, closed.set).start()
    refresher.close()
    assert not work._thread.is_alive()
    assert 1 <= len(forwards) < len(retriever.documents)
    refresher.close()  # nothing is left to close


@pytest.mark.parametrize("arguments", [{}, {"refresh_fraction": 0.3}, {"refresh_async": True}], ids=str)
def test_no_refresh_disturbs_the_random_stream(arguments: dict[str, object], retriever: Retriever) -> None:
    """Dropout in training is the same, whatever is encoded between its draws or beside them."""
    retriever.encoder.train()
    refresher = Refresher(retriever, RefreshArguments("1", **arguments))
    torch.manual_seed(1)
    expected = torch.rand(8)
    torch.manual_seed(1)
    drawn, state = [], random.getstate()
    for step in range(4):
        refresher(step)
        drawn.append(torch.rand(2))
    if refresher._work:
        wait(refresher)
    torch.testing.assert_close(torch.cat(drawn), expected, rtol=0, atol=0)
    assert random.getstate() == state
    refresher.close()


def test_the_background_computes_in_the_precision_of_training(retriever: Retriever) -> None:
    """Autocast holds for a thread: the one in the background must enter it by itself."""
    tables = []
    for in_background in (False, True):
        retriever.index = Index(IndexArguments())
        arguments = RefreshArguments("1", refresh_async=in_background)
        refresher = Refresher(retriever, arguments, dtype=torch.bfloat16)
        refresher(0)
        refresher(1)
        if in_background:
            first = table(retriever).copy()
            wait(refresher)
            refresher(2)
            assert refresher.made_at.tolist() == [1] * 24
            np.testing.assert_array_equal(table(retriever), first)
        tables.append(table(retriever))
        refresher.close()
    np.testing.assert_array_equal(*tables)
    assert np.abs(tables[0] - fresh_table(retriever)).max() > 1e-5  # bf16 is not float32


def test_frozen_passages_are_encoded_once_and_what_follows_a_refresh_still_runs(retriever: Retriever) -> None:
    seen: list[int] = []
    arguments = RefreshArguments("2", train_query_encoder_only=True)
    arguments.freeze_passages(retriever.encoder)
    refresher = Refresher(retriever, arguments, then=lambda: seen.append(1))
    assert refresher(0) == {}  # never stale
    first = retriever.index._faiss
    change_weights(retriever.encoder.backbone)
    for step in range(1, 6):
        refresher(step)
    assert retriever.index._faiss is first
    assert len(seen) == 3
    np.testing.assert_array_equal(table(retriever), fresh_table(retriever))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"refresh_fraction": 0.0}, "--refresh_fraction 0.0: must be above 0"),
        ({"refresh_fraction": 1.5}, "--refresh_fraction 1.5: must be above 0"),
        ({"refresh_fraction": float("nan")}, "--refresh_fraction nan"),
        ({"refresh_step": "x"}, "--refresh_step x"),
        ({"train_query_encoder_only": True, "refresh_async": True}, "leave out --refresh_async"),
        ({"train_query_encoder_only": True, "refresh_fraction": 0.5}, "leave out --refresh_fraction"),
    ],
)
def test_arguments_that_make_no_sense_name_the_flag(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        RefreshArguments(**arguments)


def test_a_model_with_frozen_passages_is_not_trained_whole(retriever: Retriever) -> None:
    RefreshArguments(train_query_encoder_only=True).freeze_passages(retriever.encoder)
    with pytest.raises(UserError, match="--train_query_encoder_only true"):
        RefreshArguments().freeze_passages(retriever.encoder)


@pytest.mark.parametrize("fraction", [1.0, 0.25])
def test_a_saved_index_goes_on_as_if_nothing_had_happened(
    fraction: float, retriever: Retriever, encoder_path: str, questions: list[str], tmp_path: Path
) -> None:
    arguments = RefreshArguments("2", refresh_fraction=fraction)
    refresher = Refresher(retriever, arguments)
    refresher(0)
    change_weights(retriever.encoder)
    refresher(2)
    retriever.retrieve(questions, 3)
    change_weights(retriever.encoder)
    refresher.snapshot()(tmp_path)
    other = Retriever(load_encoder(encoder_path), retriever.documents, IndexArguments())
    other.encoder.load_state_dict(retriever.encoder.state_dict())
    again = Refresher(other, arguments)
    again.load(tmp_path)
    for step in (3, 4, 5, 6):
        assert again(step) == refresher(step)
        np.testing.assert_array_equal(table(other), table(retriever))


def test_what_is_saved_before_the_first_step_is_resumed_as_a_new_run(
    retriever: Retriever, examples: list[Example], questions: list[str], tmp_path: Path
) -> None:
    def begin() -> tuple[Refresher, MinedNegatives]:
        fresh = Retriever(retriever.encoder, retriever.documents, IndexArguments())
        mined = MinedNegatives(examples, fresh, NegativeArguments(negatives_to_rank=5))
        return Refresher(fresh, RefreshArguments("10"), then=mined), mined

    first, _ = begin()
    first.snapshot()(tmp_path)
    resumed, mined = begin()
    resumed.load(tmp_path)
    straight, wanted = begin()
    assert resumed(0) == straight(0) == {"index_staleness": 0.0, "index_refreshed": True}
    assert (resumed.retriever.retrieve(questions, 3).ids == straight.retriever.retrieve(questions, 3).ids).all()
    assert [mined[i] for i in range(len(examples))] == [wanted[i] for i in range(len(examples))]


def test_a_saved_index_of_whole_refreshes_is_made_anew_where_partial_ones_follow(
    retriever: Retriever, tmp_path: Path
) -> None:
    refresher = Refresher(retriever, RefreshArguments())
    refresher(0)
    refresher.snapshot()(tmp_path)
    change_weights(retriever.encoder)
    retriever.index = Index(IndexArguments())
    partial = Refresher(retriever, RefreshArguments(refresh_fraction=0.5))
    partial.load(tmp_path)
    assert partial(7) == {"index_staleness": 0, "index_refreshed": True}
    np.testing.assert_array_equal(table(retriever), fresh_table(retriever))


def test_a_saved_index_of_other_documents_is_made_anew(retriever: Retriever, tmp_path: Path) -> None:
    refresher = Refresher(retriever, RefreshArguments())
    refresher(0)
    refresher.snapshot()(tmp_path)
    fewer = Retriever(retriever.encoder, retriever.documents[:-1], IndexArguments())
    again = Refresher(fewer, RefreshArguments())
    again.load(tmp_path)
    assert again(7) == {"index_staleness": 0, "index_refreshed": True}
    np.testing.assert_array_equal(table(fewer), fresh_table(fewer))
