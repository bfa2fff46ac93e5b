"""Mined negatives, from embeddings made by hand."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from rqa.data import Document, Example, Turn
from rqa.models.encoder import load_encoder
from rqa.objectives import negatives
from rqa.objectives.ctl import MinedNegatives, NegativeArguments
from rqa.prompts import retrieval_query
from rqa.retrieval.index import IndexArguments
from rqa.retrieval.retriever import Retriever

# A text is its own embedding: one number, and every question's is 1. The inner product is the document's number.


class Numbers:
    """An encoder of texts that end in a number."""

    def tokenize_queries(self, texts: Sequence[str]) -> list[float]:
        return [1.0 for _ in texts]

    def tokenize_passages(self, texts: Sequence[str]) -> list[float]:
        return [float(text.split()[-1]) for text in texts]

    @property
    def passage_side(self) -> "Numbers":
        return self

    def embed(self, sequences: Sequence[float], desc: str | None = None) -> np.ndarray:
        return np.array(sequences, dtype=np.float32).reshape(-1, 1)


def document(score: float, source: str = "s") -> Document:
    return Document(str(score), {"source": source})


def score_of(document: Document) -> float:
    return float(document.page_content)


DATABASE = [document(score) for score in (0.1, 0.9, 0.5, 0.7, 0.3, 0.8, 0.6)]


def mined(
    examples: Sequence[Example],
    from_rank: int = 1,
    margin: float | None = None,
    database: Sequence[Document] = DATABASE,
    to_rank: int = 20,
) -> list[list[float]]:
    retriever = Retriever(Numbers(), database, IndexArguments())  # type: ignore[arg-type]
    retriever.refresh()
    pools = MinedNegatives(examples, retriever, NegativeArguments(from_rank, to_rank, margin))
    pools()
    return [[score_of(found) for found in pools[number]] for number in range(len(examples))]


def test_the_best_documents_that_are_not_gold_are_mined_best_first() -> None:
    asked = [Example("a", (document(0.7),)), Example("b", (document(0.9), document(0.1))), Example("c", (DATABASE[0],))]
    assert mined(asked) == [
        [0.9, 0.8, 0.6, 0.5, 0.3, 0.1],
        [0.8, 0.7, 0.6, 0.5, 0.3],
        [0.9, 0.8, 0.7, 0.6, 0.5, 0.3],
    ]


def test_gold_is_told_by_its_text_whatever_its_source_and_format() -> None:
    reformatted = replace(document(0.9), fmt_content="Of another format: 0.9")
    same_text_elsewhere = document(0.8, source="elsewhere")
    assert mined([Example("a", (reformatted, same_text_elsewhere))])[0] == [0.7, 0.6, 0.5, 0.3, 0.1]


@pytest.mark.parametrize(("from_rank", "first"), [(1, 0.9), (2, 0.8), (3, 0.6), (6, 0.1), (7, None)])
def test_ranks_are_counted_from_1_over_documents_that_are_not_gold(from_rank: int, first: float | None) -> None:
    (found,) = mined([Example("a", (document(0.7),))], from_rank)
    assert found[:1] == ([] if first is None else [first])


@pytest.mark.parametrize(
    ("margin", "expected"),
    [(None, [0.9, 0.8, 0.6, 0.5, 0.3, 0.1]), (0.0, [0.6, 0.5, 0.3, 0.1]),
     (0.15, [0.5, 0.3, 0.1]), (0.5, [0.1]), (2.0, [])],
)  # fmt: skip
def test_negatives_score_lower_than_the_gold_passage_by_the_margin(margin: float | None, expected: list[float]) -> None:
    assert mined([Example("a", (document(0.7),))], margin=margin)[0] == expected


def test_the_margin_is_measured_from_the_best_gold_passage_and_without_one_nothing_is_taken() -> None:
    asked = [Example("a", (document(0.3), document(0.7))), Example("b", (document(0.55, "not in the database"),))]
    assert mined(asked, margin=0.15) == [[0.5, 0.1], []]
    many = [document(score) for score in range(100)]
    far, near = Example("c", (document(50),)), Example("d", (document(97),))
    assert mined([far, near], margin=1, database=many, to_rank=4) == [[], [96, 95]]


def test_rank_and_margin_leave_out_what_either_leaves_out() -> None:
    assert mined([Example("a", (document(0.7),))], from_rank=4, margin=0.15)[0] == [0.5, 0.3, 0.1]
    assert mined([Example("a", (document(0.7),))], from_rank=2, margin=0.3)[0] == [0.3, 0.1]


def test_gold_takes_no_rank_from_the_window(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(negatives, "QUERIES_AT_ONCE", 2)
    many = [document(score) for score in range(100)]
    greedy = Example("a", tuple(document(score) for score in range(60, 100)))
    asked = [greedy, Example("b", (document(99),)), Example("c", (document(50),))]
    found = mined(asked, from_rank=2, to_rank=5, database=many)
    assert found == [[58, 57, 56, 55], [97, 96, 95, 94], [98, 97, 96, 95]]


def test_with_a_real_encoder_negatives_are_what_the_retriever_finds_minus_gold(
    encoder_path: str, examples: list[Example], documents: list[Document]
) -> None:
    encoder = load_encoder(encoder_path).train()
    retriever = Retriever(encoder, documents, IndexArguments())
    retriever.refresh()
    asked = [*examples[:5], replace(examples[5], chat_history=(Turn("user", "Tell me about amber."),))]
    pools = MinedNegatives(asked, retriever, NegativeArguments(negatives_from_rank=2, negatives_to_rank=9))
    pools()
    for number, example in enumerate(asked):
        (found,) = retriever.documents_of(retriever.retrieve([retrieval_query(example)], 24))
        assert pools[number] == [hit for hit in found if hit not in example.gold_docs][1:9]
    assert encoder.training
