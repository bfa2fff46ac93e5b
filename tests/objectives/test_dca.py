"""DCA: the targets are the reader's cross-attention over a question's own passages, in the retriever's columns."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
import pytest
from fakes import texts_in

from rqa.data import Document, Example
from rqa.models.encoder import Encoder
from rqa.models.encoder_decoder import fid_batch, load_encoder_decoder, passage_scores
from rqa.objectives.dca import CrossAttentionScorer, DCAArguments, GivenScores, find_contexts
from rqa.objectives.fid import FiDArguments
from rqa.objectives.rpg import ScoredCandidates
from rqa.objectives.teacher import Pair, Teacher
from rqa.packing import pad

FLAGS = FiDArguments(dtype="float32", embedding_model="bm25", max_encoder_seq_length=64, max_decoder_seq_length=16)


def scorer(path: str, batch_size: int = 2, kind: str = "plain") -> CrossAttentionScorer:
    return CrossAttentionScorer(*load_encoder_decoder(path, FLAGS), batch_size, kind)


def pairs_of(examples: Sequence[Example], lists: Sequence[Sequence[Document]]) -> list[Pair]:
    return [Pair(example, passage, tuple(row)) for example, row in zip(examples, lists, strict=True) for passage in row]


@pytest.fixture
def lists(documents: list[Document]) -> list[list[Document]]:
    """The passages of five questions: 4, 3, 2, 1 and 4."""
    return [documents[:4], documents[3:6], documents[6:8], documents[9:10], documents[10:14]]


@pytest.mark.parametrize(("batch_size", "kind"), [(1, "plain"), (2, "value_norm"), (8, "plain")])
def test_every_pair_gets_its_own_score_whatever_is_read_at_once(
    batch_size: int, kind: str, t5_path: str, examples: list[Example], lists: list[list[Document]]
) -> None:
    reader = scorer(t5_path, batch_size, kind)
    reader.model.train()
    pairs = pairs_of(examples[:5], lists)
    order = torch.randperm(len(pairs)).tolist()
    found = dict(reader([pairs[i] for i in order]))
    assert reader.model.training
    assert not any(parameter.requires_grad for parameter in reader.model.parameters())
    assert sorted(found) == list(range(len(pairs)))
    expected = []
    for example, row in zip(examples, lists, strict=False):
        batch = fid_batch([reader.prompter.encode(example, row)], pad)
        expected += passage_scores(reader.model.eval(), batch, kind)[0].tolist()
    assert [found[order.index(i)] for i in range(len(pairs))] == pytest.approx(expected, abs=1e-5)


def test_a_question_that_does_not_fit_tells_no_passages_apart(
    t5_path: str, examples: list[Example], lists: list[list[Document]]
) -> None:
    long = Example("Why is that so? " * 60)
    found = dict(scorer(t5_path)(pairs_of([long, examples[0]], [lists[0], lists[1]])))
    assert len({found[i] for i in range(4)}) == 1
    assert math.isfinite(found[0])
    assert len({found[i] for i in range(4, 7)}) == 3


def test_column_k_is_one_document_for_reader_and_retriever_and_a_boost_raises_the_gold_one_alone(
    encoder: Encoder, examples: list[Example], documents: list[Document], lists: list[list[Document]], tmp_path: Path
) -> None:
    lengths = Teacher(lambda pairs: enumerate(len(p.document.page_content) for p in pairs), "", tmp_path / "scores")
    lists[2] = [documents[4], documents[2], documents[3]]  # the second one is gold; question 4 lacks its own
    asked = [replace(e, ctxs=(*row, row[0])) for e, row in zip(examples[:5], lists, strict=True)]
    known, contexts = find_contexts(DCAArguments(with_score=True), "", asked, documents[2:])  # it lacks two of them
    passages = {tuple(encoder.tokenize_passages([document.fmt_content])[0]): document for document in documents}
    for boost in (False, True):
        choose = lambda indices: [contexts[i] for i in indices]  # noqa: E731
        batch = ScoredCandidates(examples, known, encoder, choose, lengths, 0.1, boost=boost)([4, 2])
        for row, number in enumerate((4, 2)):
            shown = [passages[tuple(texts_in(batch.passages)[column])] for column in batch.columns[row].tolist()]
            assert shown[: len(lists[number])] == lists[number]
            expected = [len(document.page_content) for document in lists[number]]
            if boost and number == 2:
                expected[1] = max(expected) + statistics.pstdev(expected)
            assert (batch.teacher[row, : len(expected)] * 0.1).tolist() == pytest.approx(expected)
            assert batch.teacher[row, len(expected) :].isneginf().all()
        assert batch.hit_rate == boost / 2  # the second time all are known


def test_given_scores_stand_beside_the_contexts(examples: list[Example], documents: list[Document]) -> None:
    given = replace(examples[0], ctxs=tuple(documents[:3]), ctx_scores=(0.5, -1.0, 2.0))
    assert GivenScores([given])(pairs_of([given], [documents[2::-1]])) == [2.0, -1.0, 0.5]
