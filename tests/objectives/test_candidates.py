"""Candidates: chosen for a whole batch at once, scored, and packed with each column one document."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import numpy as np
import pytest

from rqa.data import Document, Example
from rqa.models.encoder import Encoder, load_encoder
from rqa.objectives.rpg import CandidateArguments, Distillation, RetrievedCandidates, ScoredCandidates
from rqa.objectives.teacher import Pair, Teacher
from rqa.retrieval.index import IndexArguments
from rqa.retrieval.retriever import Hits, Retriever
from rqa.runtime.errors import UserError


class Fixed(Retriever):
    """A retriever that finds what it is told to, and counts how often it is asked."""

    def __init__(self, encoder: Encoder, documents: Sequence[Document], rows: Sequence[Sequence[int]]) -> None:
        super().__init__(encoder, documents, IndexArguments())
        self.rows = np.array(rows)
        self.asked = 0

    def retrieve(self, queries: Sequence[str], k: int) -> Hits:
        self.asked += 1
        return Hits(self.rows[:, :k], np.zeros_like(self.rows[:, :k], dtype=np.float32))


def score(pairs: Sequence[Pair]) -> Iterable[tuple[int, float]]:
    """A score that tells question and document: by lengths, last pair first."""
    yield from reversed([(n, -len(p.document.page_content) - 1 / len(p.example.question)) for n, p in enumerate(pairs)])


@pytest.fixture
def encoder(encoder_path: str) -> Encoder:
    return load_encoder(encoder_path)


@pytest.fixture
def teacher(tmp_path: Path) -> Teacher:
    return Teacher(score, "lengths", tmp_path / "scores.sqlite")


@pytest.mark.parametrize(
    ("row", "gold", "num_docs", "include_gold", "expected"),
    [
        ([3, 1, 2], [1], 3, True, [3, 1, 2]),
        ([3, 1, 2], [7], 3, True, [3, 1, 7]),
        ([3, 1, 2], [7], 3, False, [3, 1, 2]),
        ([3, 1, 2], [7, 8], 2, True, [7, 8]),
        ([3, 1, 2], [7, 8, 9], 2, True, [7, 8]),
        ([3, 1, 2], [1, 8, 8], 3, True, [3, 1, 8]),
        ([3, -1, -1], [7], 3, True, [3, 7]),
        ([-1, -1, -1], [7], 3, False, []),
        ([3, 1, 2], [None], 3, True, [3, 1, 2]),  # a gold passage that the database lacks
    ],
)
def test_the_gold_passage_replaces_the_last_one_if_it_is_missing(
    row: list[int],
    gold: list[int | None],
    num_docs: int,
    include_gold: bool,
    expected: list[int],
    encoder: Encoder,
    documents: list[Document],
    examples: list[Example],
) -> None:
    elsewhere = Document("Elsewhere.", {"source": "elsewhere"})
    example = replace(examples[0], gold_docs=tuple(elsewhere if n is None else documents[n] for n in gold))
    retriever = Fixed(encoder, documents, [row, row])
    arguments = CandidateArguments(num_docs, include_gold)
    choose = RetrievedCandidates([example, example], retriever, arguments, torch.float32)
    assert choose([1, 0]) == [expected, expected]
    assert retriever.asked == 1


def test_fewer_than_two_documents_are_refused() -> None:
    with pytest.raises(UserError, match="--num_docs 1"):
        CandidateArguments(num_docs=1)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_a_column_is_one_document_for_retriever_and_teacher(
    temperature: float, encoder: Encoder, teacher: Teacher, documents: list[Document], examples: list[Example]
) -> None:
    chosen = [[3, 1, 2], [1], [], [2, 5]]
    collate = ScoredCandidates(examples, documents, encoder, lambda _: chosen, teacher, temperature)
    batch = collate([4, 0, 2, 9])
    texts = encoder.tokenize_passages([document.fmt_content for document in documents])
    assert len(batch.passages) == 4  # distinct ones
    for row, (index, numbers) in enumerate(zip([4, 0, 2, 9], chosen, strict=True)):
        assert batch.queries[row] == encoder.tokenize_queries([examples[index].question])[0]
        assert [batch.passages[c] for c in batch.columns[row, : len(numbers)]] == [texts[n] for n in numbers]
        expected = [value for n in numbers for _, value in score([Pair(examples[index], documents[n])])]
        assert (batch.teacher[row, : len(numbers)] * temperature).tolist() == pytest.approx(expected)
        assert batch.teacher[row, len(numbers) :].isneginf().all()
    assert batch.weight == 4
    assert batch.hit_rate == 0
    assert collate([4, 0, 2, 9]).hit_rate == 0.5


@pytest.mark.parametrize("direction", ["teacher_to_student", "student_to_teacher"])
def test_a_question_without_documents_contributes_zero_and_counts(
    direction: str, encoder: Encoder, teacher: Teacher, documents: list[Document], examples: list[Example]
) -> None:
    """Nor does it disturb the others: loss and gradient are theirs alone, and finite."""
    objective = Distillation(encoder.eval(), 0.1, direction)

    def run(chosen: dict[int, list[int]]) -> tuple[float, torch.Tensor, int]:
        choose = lambda indices: [chosen[i] for i in indices]  # noqa: E731
        batch = ScoredCandidates(examples, documents, encoder, choose, teacher, 10.0)(list(chosen))
        objective.zero_grad()
        loss, statistics = objective(batch)
        loss.backward()
        assert all(np.isfinite(value) for value in statistics.values())
        parts = [p.grad.flatten() for n, p in objective.named_parameters() if p.grad is not None]
        return float(loss.detach()), torch.cat(parts), batch.weight

    loss, gradient, weight = run({0: [3, 1, 2], 5: []})
    alone, expected, _ = run({0: [3, 1, 2]})
    assert weight == 2
    assert loss == pytest.approx(alone, rel=1e-5)
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-6)
    nothing, gradient, weight = run({0: [], 5: []})
    assert (nothing, weight) == (0, 2)
    assert (gradient == 0).all()
