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
from rqa.models.encoder import Encoder, EncoderArguments, load_encoder
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


def opened(encoder: Encoder, documents: list[Document], path: Path | None = None, **flags: str) -> Retriever:
    return Retriever(encoder, documents, IndexArguments(**flags)).open(path)


def change_weights(encoder: Encoder) -> None:
    with torch.no_grad():
        encoder.backbone.embeddings.word_embeddings.weight.mul_(torch.rand(32) + 0.5)


def expected_scores(encoder: Encoder, documents: list[Document]) -> np.ndarray:
    """One text at a time, inner products in float64."""

    def one(ids: list[int]) -> np.ndarray:
        return encoder.embed([ids])[0].astype(np.float64)

    passages = np.stack([one(encoder.tokenize_passages([document.fmt_content])[0]) for document in documents])
    asked = np.stack([one(encoder.tokenize_queries([question])[0]) for question in QUESTIONS])
    return asked @ passages.T


# ---------------------------------------------------------------- what is found


def test_retrieving_ranks_the_formatted_documents_by_inner_product_with_the_encoders_present_weights(
    encoder: Encoder, documents: list[Document], encoded: list[int]
) -> None:
    encoder.settings = replace(encoder.settings, query_prefix="query: ", passage_prefix="passage: ")
    retriever = Retriever(encoder.train(), documents)
    for _ in range(2):
        encoded.clear()
        retriever.refresh()
        hits = retriever.retrieve(QUESTIONS, 5)
        assert encoded == [len(documents), len(QUESTIONS)]  # all at once
        products = expected_scores(encoder, documents)
        best = -np.sort(-products, axis=1)[:, :5]
        np.testing.assert_allclose(hits.scores, best, atol=1e-5)
        np.testing.assert_allclose(np.take_along_axis(products, hits.ids, axis=1), best, atol=1e-5)
        change_weights(encoder)
    assert all(module.training for module in encoder.modules())


def test_more_than_the_database_holds_is_all_of_it(encoder: Encoder, documents: list[Document]) -> None:
    retriever = opened(encoder, documents[:3])
    hits = retriever.retrieve(QUESTIONS, 10)
    for row in retriever.documents_of(hits):
        assert sorted(document.key for document in row) == sorted(document.key for document in documents[:3])
    assert retriever.retrieve_once(QUESTIONS, 10).ids.tolist() == hits.ids.tolist()


def test_the_documents_of_hits_stand_in_their_order_without_the_missing(
    encoder: Encoder, documents: list[Document]
) -> None:
    hits = Hits(np.array([[3, 0, 2], [5, -1, -1], [-1, -1, -1]]), np.zeros((3, 3)))
    found = Retriever(encoder, documents).documents_of(hits)
    assert found == [[documents[3], documents[0], documents[2]], [documents[5]], []]


# ---------------------------------------------------------------- when the index is built


def test_a_fresh_index_is_loaded_without_encoding(
    encoder: Encoder, encoder_path: str, documents: list[Document], tmp_path: Path, encoded: list[int],
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    first = opened(encoder, documents, tmp_path / "index").retrieve(QUESTIONS, 4)
    encoded.clear()
    with caplog.at_level(logging.INFO, logger="rqa"):
        retriever = opened(load_encoder(encoder_path), list(documents), tmp_path / "index")
    assert encoded == []
    assert [record.levelno for record in caplog.records] == [logging.INFO]
    np.testing.assert_array_equal(retriever.retrieve(QUESTIONS, 4).ids, first.ids)


def other_prefix(encoder: Encoder) -> None:
    encoder.settings = replace(encoder.settings, passage_prefix="passage: ")


@pytest.mark.parametrize(
    ("documents_of", "change", "factory", "bf16"),
    [
        pytest.param(lambda d: [*d[:3], Document(d[3].page_content + "!", d[3].metadata), *d[4:]], None, "Flat", False,
                     id="documents"),
        pytest.param(lambda d: d[:-1], None, "Flat", False, id="fewer documents"),
        pytest.param(lambda d: d[::-1], None, "Flat", False, id="order"),
        pytest.param(lambda d: d, change_weights, "Flat", False, id="weights"),
        pytest.param(lambda d: d, other_prefix, "Flat", False, id="prefix"),
        pytest.param(lambda d: d, None, "HNSW64", False, id="factory"),  # so many links that nothing is missed
        pytest.param(lambda d: d, None, "Flat", True, id="precision"),
    ],
)  # fmt: skip
def test_a_stale_index_is_rebuilt_and_says_so(
    documents_of: Callable[[list[Document]], list[Document]], change: Callable[[Encoder], None] | None, factory: str,
    bf16: bool, encoder: Encoder, documents: list[Document], tmp_path: Path, encoded: list[int],
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    path = tmp_path / "index"
    opened(encoder, documents, path)
    changed = documents_of(documents)
    if change:
        change(encoder)
    encoded.clear()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        for _ in range(2):
            retriever = opened(encoder, changed, path, index_factory=factory)
    assert encoded == [len(changed)]  # once
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert warning == f"index {path} was made from other documents, weights or settings: rebuilding it"
    best = retriever.retrieve(QUESTIONS, 1).scores[:, 0]
    np.testing.assert_allclose(best, expected_scores(encoder, changed).max(axis=1), atol=1e-2 if bf16 else 1e-5)


def test_a_damaged_index_is_rebuilt(
    encoder: Encoder, documents: list[Document], tmp_path: Path, encoded: list[int]
) -> None:
    path = tmp_path / "index"
    opened(encoder, documents, path)
    for harm in (lambda: (path / "COMPLETE").unlink(), lambda: (path / "index.faiss").write_bytes(b"half")):
        harm()
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


@pytest.mark.parametrize("stamped", [True, False])
def test_retrieving_once_reads_from_the_disk_the_second_time(
    stamped: bool, encoder: Encoder, encoder_path: str, documents: list[Document], encoded: list[int], tmp_path: Path
) -> None:
    """And encodes again if what was written is damaged."""
    retrievers = [Retriever(each, documents) for each in (encoder, load_encoder(encoder_path))]
    for retriever in retrievers:
        retriever.refresh(retriever.stamp() if stamped else "")
    encoded.clear()
    first, second = (retriever.retrieve_once(QUESTIONS, 3) for retriever in retrievers)
    assert encoded == [len(QUESTIONS)]
    (mark,) = (tmp_path / "cache").rglob("COMPLETE")
    mark.unlink()
    (mark.parent / "ids.npy").write_bytes(b"")
    third = retrievers[0].retrieve_once(QUESTIONS, 3)
    assert encoded == [len(QUESTIONS)] * 2
    expected = retrievers[0].retrieve(QUESTIONS, 3)
    for hits in (first, second, third):
        np.testing.assert_array_equal(hits.ids, expected.ids)
        np.testing.assert_array_equal(hits.scores, expected.scores)


def test_what_was_retrieved_once_serves_nothing_else(
    encoder: Encoder, encoder_path: str, documents: list[Document], encoded: list[int]
) -> None:
    asked, settings = ["a b", "c", *QUESTIONS], {"index_factory": "HNSW8"}
    opened(encoder, documents, **settings).retrieve_once(asked, 3)
    prefixed, changed = load_encoder(encoder_path, EncoderArguments(query_prefix="query: ")), load_encoder(encoder_path)
    change_weights(changed)
    for number, (model, database, questions, k, flags) in enumerate(
        [
            (encoder, documents, [*asked[:-1], asked[-1] + "?"], 3, settings),
            (encoder, documents, asked[::-1], 3, settings),
            (encoder, documents, ["a", "b c", *QUESTIONS], 3, settings),
            (encoder, documents, asked, 4, settings),
            (encoder, documents[1:], asked, 3, settings),
            (changed, documents, asked, 3, settings),
            (prefixed, documents, asked, 3, settings),
            (encoder, documents, asked, 3, {"index_factory": "Flat"}),
            (encoder, documents, asked, 3, settings | {"index_search_parameters": "efSearch=1"}),
        ]
    ):
        retriever = opened(model, database, **flags)
        encoded.clear()
        hits = retriever.retrieve_once(questions, k)
        assert encoded == [len(questions)], number
        np.testing.assert_array_equal(hits.ids, retriever.retrieve(questions, k).ids)
