"""The retriever: when an index is built, when it is used again, and what is found."""

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import numpy as np
import pytest

from rqa.data import Document
from rqa.models.encoder import Encoder, load_encoder
from rqa.retrieval.index import IndexArguments
from rqa.retrieval.retriever import Hits, Retriever
from rqa.runtime.errors import UserError

QUESTIONS = ["What does Arlen trade in?", "When was Brask founded?", "amber", "Where is the market of Hask?"]


@pytest.fixture
def encoder(encoder_path: str) -> Encoder:
    return load_encoder(encoder_path)


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many texts each call of `Encoder.embed` was given."""
    calls: list[int] = []
    embed = Encoder.embed

    def counting(self: Encoder, sequences: Any, *args: Any, **options: Any) -> np.ndarray:
        calls.append(len(sequences))
        return embed(self, sequences, *args, **options)

    monkeypatch.setattr(Encoder, "embed", counting)
    return calls


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RQA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(logging.getLogger("rqa"), "propagate", True)  # an executable turns it off


def opened(encoder: Encoder, documents: list[Document], path: Path | None = None, factory: str = "Flat") -> Retriever:
    retriever = Retriever(encoder, documents, IndexArguments(factory))
    retriever.open(path)
    return retriever


def change_weights(encoder: Encoder) -> None:
    with torch.no_grad():
        encoder.backbone.embeddings.word_embeddings.weight.mul_(torch.rand(32) + 0.5)


def expected_ranking(encoder: Encoder, documents: list[Document], queries: list[str]) -> np.ndarray:
    """One text at a time, inner products in float64."""

    def one(ids: list[int]) -> np.ndarray:
        return encoder.embed([ids])[0].astype(np.float64)

    passages = np.stack([one(encoder.tokenize_passages([document.fmt_content])[0]) for document in documents])
    asked = np.stack([one(encoder.tokenize_queries([query])[0]) for query in queries])
    return asked @ passages.T


# ---------------------------------------------------------------- what is found


def test_retrieving_ranks_the_formatted_documents_by_inner_product(encoder: Encoder, documents: list[Document]) -> None:
    encoder.settings = replace(encoder.settings, query_prefix="query: ", passage_prefix="passage: ")
    hits = opened(encoder, documents).retrieve(QUESTIONS, 5)
    products = expected_ranking(encoder, documents, QUESTIONS)
    best = -np.sort(-products, axis=1)[:, :5]
    np.testing.assert_allclose(hits.scores, best, atol=1e-5)
    np.testing.assert_allclose(np.take_along_axis(products, hits.ids, axis=1), best, atol=1e-5)


def test_all_questions_are_encoded_in_one_call(encoder: Encoder, documents: list[Document], encoded: list[int]) -> None:
    opened(encoder, documents).retrieve(QUESTIONS, 2)
    assert encoded == [len(documents), len(QUESTIONS)]


def test_more_than_the_database_holds_is_all_of_it(encoder: Encoder, documents: list[Document]) -> None:
    retriever = opened(encoder, documents[:3])
    hits = retriever.retrieve(QUESTIONS, 10)
    found = retriever.documents_of(hits)
    assert [len(row) for row in found] == [3] * len(QUESTIONS)
    assert all({document.key for document in row} == {d.key for d in documents[:3]} for row in found)
    assert retriever.retrieve_once(QUESTIONS, 10).ids.tolist() == hits.ids.tolist()


def test_the_documents_of_hits_stand_in_their_order_without_the_missing(
    encoder: Encoder, documents: list[Document]
) -> None:
    retriever = Retriever(encoder, documents, IndexArguments())
    hits = Hits(np.array([[3, 0, 2], [5, -1, -1], [-1, -1, -1]]), np.zeros((3, 3)))
    assert retriever.documents_of(hits) == [[documents[3], documents[0], documents[2]], [documents[5]], []]


def test_a_refresh_ranks_by_the_encoders_present_weights(encoder: Encoder, documents: list[Document]) -> None:
    retriever = opened(encoder, documents)
    before = retriever.retrieve(QUESTIONS, 24)
    change_weights(encoder)
    retriever.refresh()
    after = retriever.retrieve(QUESTIONS, 24)
    np.testing.assert_allclose(
        after.scores, -np.sort(-expected_ranking(encoder, documents, QUESTIONS), axis=1), atol=1e-5
    )
    assert before.ids.tolist() != after.ids.tolist()


def test_a_refresh_leaves_a_training_encoder_in_training(encoder: Encoder, documents: list[Document]) -> None:
    retriever = Retriever(encoder.train(), documents, IndexArguments())
    retriever.refresh()
    retriever.retrieve(QUESTIONS, 1)
    assert all(module.training for module in encoder.modules())


# ---------------------------------------------------------------- when the index is built


def test_a_fresh_index_is_loaded_without_encoding(
    encoder: Encoder,
    encoder_path: str,
    documents: list[Document],
    tmp_path: Path,
    encoded: list[int],
    caplog: pytest.LogCaptureFixture,
) -> None:
    first = opened(encoder, documents, tmp_path / "index").retrieve(QUESTIONS, 4)
    encoded.clear()
    for again in (encoder, load_encoder(encoder_path)):
        with caplog.at_level(logging.INFO, logger="rqa"):
            caplog.clear()
            retriever = opened(again, list(documents), tmp_path / "index")
        assert encoded == []
        assert [record.levelno for record in caplog.records] == [logging.INFO]
    np.testing.assert_array_equal(retriever.retrieve(QUESTIONS, 4).ids, first.ids)


def other_documents(encoder: Encoder, documents: list[Document]) -> tuple[list[Document], str]:
    changed = Document(documents[3].page_content + "!", documents[3].metadata)
    return [*documents[:3], changed, *documents[4:]], "Flat"


def fewer_documents(encoder: Encoder, documents: list[Document]) -> tuple[list[Document], str]:
    return documents[:-1], "Flat"


def other_order(encoder: Encoder, documents: list[Document]) -> tuple[list[Document], str]:
    return documents[::-1], "Flat"


def other_weights(encoder: Encoder, documents: list[Document]) -> tuple[list[Document], str]:
    change_weights(encoder)
    return documents, "Flat"


def other_prefix(encoder: Encoder, documents: list[Document]) -> tuple[list[Document], str]:
    encoder.settings = replace(encoder.settings, passage_prefix="passage: ")
    return documents, "Flat"


def other_factory(encoder: Encoder, documents: list[Document]) -> tuple[list[Document], str]:
    return documents, "HNSW64"  # so many links that nothing is missed


@pytest.mark.parametrize(
    "change", [other_documents, fewer_documents, other_order, other_weights, other_prefix, other_factory]
)
def test_a_stale_index_is_rebuilt_and_says_so(
    change: Callable[[Encoder, list[Document]], tuple[list[Document], str]],
    encoder: Encoder,
    documents: list[Document],
    tmp_path: Path,
    encoded: list[int],
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = tmp_path / "index"
    opened(encoder, documents, path)
    changed, factory = change(encoder, documents)
    encoded.clear()
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="rqa"):
        retriever = opened(encoder, changed, path, factory)
    assert encoded == [len(changed)]
    (warning,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert str(path) in warning.getMessage()
    assert "rebuilding" in warning.getMessage()
    products = expected_ranking(encoder, changed, QUESTIONS)
    best = retriever.retrieve(QUESTIONS, 1)
    np.testing.assert_allclose(best.scores[:, 0], products.max(axis=1), atol=1e-5)
    encoded.clear()
    opened(encoder, changed, path, factory)
    assert encoded == []


@pytest.mark.parametrize("kind", ["no mark", "truncated"])
def test_a_damaged_index_is_rebuilt(
    kind: str, encoder: Encoder, documents: list[Document], tmp_path: Path, encoded: list[int]
) -> None:
    path = tmp_path / "index"
    opened(encoder, documents, path)
    if kind == "no mark":
        (path / "COMPLETE").unlink()
    else:
        (path / "index.faiss").write_bytes((path / "index.faiss").read_bytes()[:100])
    encoded.clear()
    opened(encoder, documents, path)
    opened(encoder, documents, path)
    assert encoded == [len(documents)]


def test_an_index_in_memory_writes_nothing(encoder: Encoder, documents: list[Document], tmp_path: Path) -> None:
    opened(encoder, documents)
    assert not list(tmp_path.iterdir())


def test_a_foreign_directory_is_refused_before_anything_is_encoded(
    encoder: Encoder, documents: list[Document], tmp_path: Path, encoded: list[int]
) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match="precious"):
        opened(encoder, documents, tmp_path / "precious")
    assert encoded == []
    assert (tmp_path / "precious" / "thesis.tex").read_text() == "mine"


# ---------------------------------------------------------------- retrieved once


def test_retrieving_once_reads_from_the_disk_the_second_time(
    encoder: Encoder, encoder_path: str, documents: list[Document], encoded: list[int], tmp_path: Path
) -> None:
    first = opened(encoder, documents).retrieve_once(QUESTIONS, 3)
    assert encoded == [len(documents), len(QUESTIONS)]
    np.testing.assert_array_equal(first.ids, opened(encoder, documents).retrieve(QUESTIONS, 3).ids)
    again = opened(load_encoder(encoder_path), documents)
    encoded.clear()
    second = again.retrieve_once(QUESTIONS, 3)
    assert encoded == []
    np.testing.assert_array_equal(second.ids, first.ids)
    np.testing.assert_array_equal(second.scores, first.scores)


def test_retrieving_once_works_before_an_index_is_stamped(
    encoder: Encoder, documents: list[Document], encoded: list[int]
) -> None:
    retriever = Retriever(encoder, documents, IndexArguments())
    retriever.refresh()
    first = retriever.retrieve_once(QUESTIONS, 3)
    encoded.clear()
    np.testing.assert_array_equal(retriever.retrieve_once(QUESTIONS, 3).ids, first.ids)
    assert encoded == []


@pytest.mark.parametrize(
    "change", ["questions", "order", "border", "k", "documents", "weights", "prefix", "factory", "parameters"]
)
def test_what_was_retrieved_once_serves_nothing_else(
    change: str, encoder: Encoder, documents: list[Document], encoded: list[int]
) -> None:
    questions, k, factory, parameters = ["a b", "c", *QUESTIONS], 3, "HNSW8", ""
    opened(encoder, documents, factory=factory).retrieve_once(questions, k)
    if change == "questions":
        questions[-1] += "?"
    elif change == "order":
        questions.reverse()
    elif change == "border":
        questions[:2] = ["a", "b c"]
    elif change == "k":
        k = 4
    elif change == "documents":
        documents = documents[1:]
    elif change == "weights":
        change_weights(encoder)
    elif change == "prefix":
        encoder.settings = replace(encoder.settings, query_prefix="query: ")
    elif change == "factory":
        factory = "Flat"
    else:
        parameters = "efSearch=1"
    retriever = Retriever(encoder, documents, IndexArguments(factory, parameters))
    retriever.open(None)
    encoded.clear()
    hits = retriever.retrieve_once(questions, k)
    assert encoded == [len(questions)]
    np.testing.assert_array_equal(hits.ids, retriever.retrieve(questions, k).ids)


def test_a_half_written_result_is_not_read(
    encoder: Encoder, documents: list[Document], encoded: list[int], tmp_path: Path
) -> None:
    retriever = opened(encoder, documents)
    first = retriever.retrieve_once(QUESTIONS, 3)
    (mark,) = (tmp_path / "cache").rglob("COMPLETE")
    mark.unlink()
    (mark.parent / "ids.npy").write_bytes(b"")
    encoded.clear()
    np.testing.assert_array_equal(retriever.retrieve_once(QUESTIONS, 3).ids, first.ids)
    assert encoded == [len(QUESTIONS)]
