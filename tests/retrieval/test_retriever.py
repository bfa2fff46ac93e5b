"""The retriever: when an index is built, when it is used again, and what is found."""

import logging
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any

import torch
import numpy as np
import pytest
from fakes import change_weights, full_disk

from rqa.data import Document
from rqa.models.encoder import Encoder, EncoderArguments, load_encoder
from rqa.retrieval import retriever as retriever_module
from rqa.retrieval.faiss_index import FaissIndex
from rqa.retrieval.index import IndexArguments
from rqa.retrieval.retriever import Hits, Retriever
from rqa.runtime.errors import UserError
from rqa.runtime.files import alone

QUESTIONS = ["What does Arlen trade in?", "When was Brask founded?", "amber", "Where is the market of Hask?"]


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many texts each call of `Encoder.embed` was given."""
    calls, embed = [], Encoder.embed
    counting = lambda self, texts, *given: calls.append(len(texts)) or embed(self, texts, *given)  # noqa: E731
    monkeypatch.setattr(Encoder, "embed", counting)
    return calls


def opened(encoder: Encoder, documents: list[Document], path: Path | None = None, **flags: Any) -> Retriever:
    return Retriever(encoder, documents, IndexArguments(**flags)).open(path)


def expected_scores(encoder: Encoder, documents: list[Document]) -> np.ndarray:
    """One text at a time, inner products in float64."""
    texts, asked = encoder.tokenize_passages([d.fmt_content for d in documents]), encoder.tokenize_queries(QUESTIONS)
    passages, queries = (np.float64([encoder.embed([ids])[0] for ids in each]) for each in (texts, asked))
    return queries @ passages.T


def test_retrieving_ranks_the_formatted_documents_by_inner_product_with_the_encoders_present_weights(
    encoder: Encoder, documents: list[Document], encoded: list[int]
) -> None:
    encoder.settings = replace(encoder.settings, query_prefix="query: ", passage_prefix="passage: ")
    retriever = Retriever(encoder.train(), documents)
    for _ in range(2):
        encoded.clear()
        retriever.refresh()
        hits = retriever.retrieve(QUESTIONS, 5)
        assert encoded == [len(documents), len(QUESTIONS)]
        products = expected_scores(encoder, documents)
        best = -np.sort(-products, axis=1)[:, :5]
        np.testing.assert_allclose(hits.scores, best, atol=1e-5)
        np.testing.assert_allclose(np.take_along_axis(products, hits.ids, axis=1), best, atol=1e-5)
        change_weights(encoder)
    assert all(module.training for module in encoder.modules())


def test_an_index_in_memory_writes_nothing_and_what_was_not_found_is_no_document(
    encoder: Encoder, documents: list[Document], tmp_path: Path
) -> None:
    retriever = opened(encoder, documents[:3])
    retriever.retrieve(QUESTIONS, 10)
    assert not list(tmp_path.iterdir())
    some = Hits(np.array([[2, 0, 1], [1, -1, -1], [-1, -1, -1]]), np.zeros((3, 3)))
    assert retriever.documents_of(some) == [[documents[2], documents[0], documents[1]], [documents[1]], []]


def test_an_index_is_loaded_without_encoding_rebuilt_if_it_is_stale_or_damaged_and_beside_foreign_files_refused(
    encoder: Encoder, encoder_path: str, documents: list[Document], tmp_path: Path, encoded: list[int],
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    path, other = tmp_path / "index", load_encoder(encoder_path)
    change_weights(other)
    opened(encoder, documents, path)
    for damaged, model in ((None, load_encoder(encoder_path)), ("COMPLETE", encoder), ("index.faiss", encoder),
                           (None, other)):  # fmt: skip
        if damaged:
            (path / damaged).write_bytes(b"half")
        for stale in (bool(damaged) or model is other, False):
            encoded.clear()
            caplog.clear()
            with caplog.at_level(logging.INFO, logger="rqa"):
                retriever = opened(model, list(documents), path)
            assert encoded == [len(documents)] * stale
            assert [record.levelno for record in caplog.records] == [logging.WARNING] * stale + [logging.INFO]
            assert ("settings, or is damaged; rebuilding it" in caplog.text) == stale
        best = retriever.retrieve(QUESTIONS, 1).scores[:, 0]
        np.testing.assert_allclose(best, expected_scores(model, documents).max(axis=1), atol=1e-5)
    (path / "thesis.tex").write_text("mine")
    encoded.clear()
    with pytest.raises(UserError, match="holds something that is not an rqa index"):
        opened(encoder, documents, path)
    assert encoded == []


def test_whatever_decides_the_index_or_what_is_found_in_it_makes_another_fingerprint(
    encoder_path: str, documents: list[Document]
) -> None:
    other = Document(documents[3].page_content + "!", documents[3].metadata)

    def made(database: list[Document] = documents, changed: bool = False, dtype: str = "float32", flags: Any = None,
             **settings: str) -> tuple[str, str]:  # fmt: skip
        encoder = load_encoder(encoder_path, EncoderArguments(dtype=dtype, **settings))
        if changed:
            change_weights(encoder)
        retriever = Retriever(encoder, list(database), IndexArguments(**(flags or {})))
        return retriever.stamp(), retriever.identity()

    stamps, identities = zip(
        made(), made([*documents[:3], other, *documents[4:]]), made(documents[:-1]), made(documents[::-1]),
        made(changed=True), made(passage_prefix="passage: "), made(query_prefix="query: "), strict=True,
    )  # fmt: skip
    assert len(set(identities)) == 7
    assert len(set(stamps)) == 6  # an index serves its passages in any order
    assert stamps[3] == stamps[0]
    assert made() == made(dtype="bfloat16") == (stamps[0], identities[0])  # an index serves any precision
    for flags in ({"index_search_parameters": "efSearch=1"}, {"index_factory": "HNSW8"}):
        stamp, identity = made(flags=flags)
        assert stamp == stamps[0]
        assert identity not in identities


def test_what_is_retrieved_once_is_read_from_the_disk_and_anew_for_other_questions_encoders_or_damaged_files(
    encoder: Encoder, encoder_path: str, documents: list[Document], encoded: list[int], tmp_path: Path
) -> None:
    def check(questions: list[str], k: int, model: Encoder = encoder, read: bool = False) -> None:
        retriever = opened(model, documents)
        expected = retriever.retrieve(questions, k)
        encoded.clear()
        hits = retriever.retrieve_once(questions, k)
        assert encoded == [len(questions)] * (not read)
        np.testing.assert_array_equal(hits.ids, expected.ids)
        np.testing.assert_array_equal(hits.scores, expected.scores)

    asked = ["a b", "c", *QUESTIONS]
    check(asked, 3)
    check(asked, 3, load_encoder(encoder_path), read=True)
    (mark,) = (tmp_path / "cache").rglob("COMPLETE")
    mark.unlink()
    (mark.parent / "hits.npz").write_bytes(b"")
    check(asked, 3)
    check(asked, 4)
    for questions in ([*asked[:-1], "?"], asked[::-1], ["a", "b c", *QUESTIONS]):
        check(questions, 3)
    change_weights(encoder)
    check(asked, 3)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_an_encoder_that_is_not_finite_indexes_nothing_and_is_not_asked(
    value: float, encoder: Encoder, documents: list[Document], tmp_path: Path
) -> None:
    retriever = opened(encoder, documents)
    (_, *_, word, _), *_ = encoder.tokenize_queries(["amber"])
    encoder.backbone.embeddings.word_embeddings.weight.data[word] = value
    with pytest.raises(UserError, match="the embedding of 'amber' is not finite"):
        retriever.retrieve(QUESTIONS, 3)
    with pytest.raises(UserError, match=r"corvo.* is not finite"):
        opened(encoder, documents, tmp_path / "index")
    assert not (tmp_path / "index").exists()


def test_what_does_not_fit_on_the_disk_is_not_kept(encoder: Encoder, documents: list[Document], tmp_path: Path) -> None:
    retriever = opened(encoder, documents)
    retriever.retrieve_once(QUESTIONS, 3)
    (kept,) = (tmp_path / "cache").rglob("hits.npz")
    with full_disk(kept.stat().st_size - 10), pytest.raises(OSError, match="File too large"):
        retriever.retrieve_once(QUESTIONS[::-1], 3)
    assert list((tmp_path / "cache").rglob("hits.npz")) == [kept]


@pytest.mark.parametrize("factory", ["Flat", "IVF4,Flat", "SQ8", "SQ8,RFlat", "IVF4,SQ8,RFlat", "SQ4,Refine(SQ8)"])
def test_an_update_encodes_what_is_new_or_changed_and_finds_what_a_whole_new_index_finds(
    factory: str, encoder: Encoder, documents: list[Document], tmp_path: Path, encoded: list[int]
) -> None:
    flags = {"index_factory": factory, "index_search_parameters": "nprobe=4" if factory.startswith("IVF") else ""}
    opened(encoder, documents, tmp_path / "index", **flags)
    changed = [replace(document, page_content=document.page_content + "!", formatted="") for document in documents[:2]]
    database = [changed[1], *documents[:7:-1], changed[0]]  # two changed, six gone, all in another order
    encoded.clear()
    retriever = opened(encoder, database, tmp_path / "index", **flags, update=True)
    assert encoded == [2]
    anew = opened(encoder, database, tmp_path / "other", **flags)
    found, expected = (each.retrieve(QUESTIONS, 5) for each in (retriever, anew))
    if factory.endswith("Flat"):
        np.testing.assert_array_equal(found.ids, expected.ids)
        np.testing.assert_array_equal(found.scores, expected.scores)
    everything = retriever.retrieve(QUESTIONS, 50).ids
    assert [sorted(row[row >= 0]) for row in everything] == [list(range(len(database)))] * len(QUESTIONS)
    encoded.clear()
    again = opened(encoder, database[::-1], tmp_path / "index", **flags)  # the order is not the index's
    np.testing.assert_array_equal(len(database) - 1 - again.retrieve(QUESTIONS, 1).ids, found.ids[:, :1])
    assert encoded == [len(QUESTIONS)]
    assert retriever.identity() not in (again.identity(), anew.identity())


def test_an_update_of_a_graph_that_would_lose_passages_is_refused_and_changes_nothing(
    encoder: Encoder, documents: list[Document], tmp_path: Path
) -> None:
    opened(encoder, documents, tmp_path / "index", index_factory="HNSW8")
    with pytest.raises(UserError, match="--update true: HNSW8 cannot remove passages; rebuild the index without it"):
        opened(encoder, documents[1:], tmp_path / "index", index_factory="HNSW8", update=True)
    assert opened(encoder, documents, tmp_path / "index").index.factory == "HNSW8"
    more = [*documents, Document("A last one.")]
    opened(encoder, more, tmp_path / "index", index_factory="HNSW8", update=True)
    hits = opened(encoder, more, tmp_path / "index", index_search_parameters="efSearch=100").retrieve(QUESTIONS, 25)
    assert (np.sort(hits.ids, axis=1) == np.arange(len(more))).all()


@pytest.mark.parametrize("update", [False, True])
def test_an_interrupted_build_goes_on_where_it_was(
    update: bool, encoder: Encoder, documents: list[Document], tmp_path: Path, encoded: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(retriever_module, "TEXTS_AT_ONCE", 5)
    path = tmp_path / "index"
    if update:
        opened(encoder, documents[:4], path)
    embed = Encoder.embed
    monkeypatch.setattr(Encoder, "embed", lambda *given: _killed() if len(encoded) == 2 else embed(*given))
    encoded.clear()
    with pytest.raises(KeyboardInterrupt):
        opened(encoder, documents, path, update=update)
    assert len(opened(encoder, documents[:4], path).index) == 4 if update else not path.exists()
    monkeypatch.setattr(Encoder, "embed", embed)
    encoded.clear()
    retriever = opened(encoder, documents, path, update=update)
    assert sum(encoded) == len(documents) - 10 - 4 * update
    assert [entry.name for entry in tmp_path.iterdir() if entry.name.startswith("index")] == ["index"]
    expected = opened(encoder, documents).retrieve(QUESTIONS, 6)
    np.testing.assert_array_equal(retriever.retrieve(QUESTIONS, 6).ids, expected.ids)


def test_a_build_killed_before_an_update_adds_nothing_twice_and_damaged_or_foreign_files_are_dropped_or_refused(
    encoder: Encoder, documents: list[Document], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retriever_module, "TEXTS_AT_ONCE", 5)
    path, building = tmp_path / "index", tmp_path / "index.building"
    opened(encoder, documents[:20], path)
    for update, harm in ((False, b""), (True, b""), (True, b"PK")):
        swap = FaissIndex.swap
        monkeypatch.setattr(FaissIndex, "swap", lambda *_: _killed())
        with pytest.raises(KeyboardInterrupt):
            opened(encoder, documents[: None if update else 22], path, update=update)
        monkeypatch.setattr(FaissIndex, "swap", swap)
        chunk = min(building.glob("*.npz"))
        chunk.write_bytes(harm or chunk.read_bytes())
    (building / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match=r"index\.building holds thesis\.tex; move it elsewhere"):
        opened(encoder, documents, path, update=True)
    (building / "thesis.tex").unlink()
    retriever = opened(encoder, documents, path, update=True)
    assert retriever.index._faiss.ntotal == len(documents)
    expected = opened(encoder, documents).retrieve(QUESTIONS, 6)
    np.testing.assert_array_equal(retriever.retrieve(QUESTIONS, 6).ids, expected.ids)


def _killed() -> None:
    raise KeyboardInterrupt


def test_of_two_that_build_one_index_the_second_waits_and_uses_it(
    encoder: Encoder, documents: list[Document], tmp_path: Path, encoded: list[int]
) -> None:
    first, second = (Retriever(encoder, documents) for _ in range(2))
    waiting = Thread(target=second.open, args=[tmp_path / "index"])
    with alone(tmp_path / "index"):
        waiting.start()
        waiting.join(0.2)
        assert waiting.is_alive()
    waiting.join(60)
    first.open(tmp_path / "index")
    assert encoded == [len(documents)]
