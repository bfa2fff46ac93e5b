"""RPG: candidates in columns, one document for retriever and teacher; and only the retriever learns."""

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
import numpy as np
import pytest
from fakes import Lengths, gradients, texts_in
from transformers import PreTrainedTokenizerBase

from rqa.data import Document, Example
from rqa.endpoint.client import EstimatedTokens
from rqa.models.encoder import Encoder
from rqa.objectives import rpg
from rqa.objectives.encoding import in_chunks
from rqa.objectives.rpg import LikelihoodArguments, ListBatch, ListObjective, ScoredCandidates
from rqa.retrieval.retriever import Hits, Retriever

TEMPERATURE = 0.1
ABSENT = float("-inf")


@pytest.mark.parametrize("given", [None, 0.7])
def test_the_retrievers_temperature_is_the_spread_of_the_first_batchs_scores_unless_it_is_given(
    given: float | None, encoder: Encoder, batch: "ListBatch"
) -> None:
    raw = ListObjective(encoder, 1.0).logits(batch)[0].detach().double().numpy()
    spread = np.mean([row[np.isfinite(row)].std() for row in raw])
    objective = ListObjective(encoder, given)
    logits = objective.logits(batch)[0].detach().double().numpy()
    one = replace(batch, teacher=torch.full((3, 4), ABSENT))  # of no list, and later batches change nothing
    objective.logits(one)
    assert objective.measured["temperature"] == pytest.approx(given or spread, rel=1e-4)
    np.testing.assert_allclose(logits, raw / (given or spread), rtol=1e-3)
    nothing = ListObjective(encoder, None)
    assert nothing.logits(one).isneginf().all()
    assert nothing.measured["temperature"] == 1


def test_the_language_model_is_asked_by_its_chat_template_where_it_has_one(tokenizer: PreTrainedTokenizerBase) -> None:
    without = SimpleNamespace(chat_template=None)
    asked = {
        (name, given): rpg.LikelihoodArguments(lm_model_path="lm", lm_chat_format=given).lm_prompt(kind).chat_format
        for name, kind in (("with", tokenizer), ("without", without), ("counts bytes", EstimatedTokens()))
        for given in (None, "prefix")
    }
    assert [name for name, chat_format in asked.items() if chat_format == "template"] == [("with", None)]


@pytest.mark.parametrize(
    ("row", "gold", "num_docs", "include_gold", "expected"),
    [([3, 1, 2], [1], 3, True, [3, 1, 2]), ([3, 1, 2], [7], 3, True, [3, 1, 7]),
     ([3, 1, 2], [7], 3, False, [3, 1, 2]), ([3, 1, 2], [7, 8, 9], 2, True, [7, 8]),
     ([3, 1, 2], [1, 8, 8], 3, True, [3, 1, 8]), ([3, -1, -1], [7], 3, True, [3, 7]),
     ([-1, -1, -1], [7], 3, False, []), ([3, 1, 2], [None], 3, True, [3, 1, 2])],  # the database lacks None
)  # fmt: skip
def test_the_gold_passage_replaces_the_last_one_if_it_is_missing(
    row: list[int], gold: list[int | None], num_docs: int, include_gold: bool, expected: list[int],
    documents: list[Document], examples: list[Example],
) -> None:  # fmt: skip
    asked: list[int] = []

    def retrieve(questions: Sequence[str], k: int) -> Hits:
        asked.append(len(questions))
        return Hits(np.array([row[:k]] * 2), np.zeros((2, k)))

    elsewhere = Document("Elsewhere.", {"source": "elsewhere"})
    example = replace(examples[0], gold_docs=tuple(elsewhere if n is None else documents[n] for n in gold))
    retriever: Any = SimpleNamespace(documents=documents, retrieve=retrieve)
    flags = LikelihoodArguments(lm_model_path="lm", num_docs=num_docs, include_gold=include_gold)
    choose = rpg.RetrievedCandidates([example, example], retriever, flags)
    assert choose([1, 0]) == [expected, expected]
    assert asked == [2]  # all questions at once


def test_a_question_without_documents_contributes_zero_and_counts_and_leaves_the_others_alone(
    encoder: Encoder, documents: list[Document], examples: list[Example]
) -> None:
    chosen: dict[int, list[int]] = {0: [3, 1, 2], 5: []}
    collate = ScoredCandidates(examples, documents, encoder, lambda rows: [chosen[i] for i in rows], Lengths(), 10.0)
    objective = ListObjective(encoder, TEMPERATURE)
    ours, alone = (gradients(objective, collate(indices)) for indices in ([0, 5], [0]))
    torch.testing.assert_close(ours, alone, rtol=1e-3, atol=1e-6)
    nothing, found = gradients(objective, collate([5, 5]))
    assert nothing == 0
    assert collate([0, 5]).weight == collate([5, 5]).weight == 2
    assert all((gradient == 0).all() for gradient in found.values())


@pytest.fixture
def batch(encoder: Encoder, examples: list[Example], documents: list[Document]) -> ListBatch:
    """Three questions with four documents of six, the last question with two."""
    queries = encoder.tokenize_queries([example.question for example in examples[:3]])
    passages = encoder.tokenize_passages([document.fmt_content for document in documents[:6]])
    return ListBatch(
        *(in_chunks(encoder, part) for part in (queries, passages)),
        columns=torch.tensor([[0, 1, 2, 3], [5, 4, 1, 0], [2, 3, 0, 0]]),
        teacher=torch.tensor([[-1.0, -9.0, -3.0, -4.0], [-2.0, -2.5, -7.0, -1.5], [-3.0, -6.0, ABSENT, ABSENT]]),
        indices=[0, 1, 2],
    )


@pytest.mark.parametrize("bf16", [False, True])
def test_similarities_are_the_scores_by_which_the_index_ranks(
    bf16: bool, encoder: Encoder, batch: ListBatch, examples: list[Example], documents: list[Document]
) -> None:
    retriever = Retriever(encoder, documents)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        retriever.refresh()
        hits = retriever.retrieve([example.question for example in examples[:3]], len(documents))
        similarity = ListObjective(encoder, TEMPERATURE).logits(batch)[0].detach() * TEMPERATURE
    for row, columns in enumerate(batch.columns.tolist()):
        present = [k for k in range(4) if batch.teacher[row, k] > ABSENT]
        ranked = dict(zip(hits.ids[row].tolist(), hits.scores[row].tolist(), strict=True))
        scores = [ranked[columns[k]] for k in present]
        # In bf16 the embeddings of differently packed rows differ by rounding; products are exact either way.
        assert similarity[row, present].tolist() == pytest.approx(scores, abs=1e-3 if bf16 else 1e-6)
    assert similarity[batch.teacher.isneginf()].isneginf().all()


def test_statistics_tell_the_agreement_and_the_teachers_hit_rate(encoder: Encoder, batch: ListBatch) -> None:
    objective = ListObjective(encoder, TEMPERATURE)
    queries, passages = (encoder.embed(texts_in(part)) for part in (batch.queries, batch.passages))
    ranking = torch.from_numpy(queries @ passages.T).gather(1, batch.columns)
    ranking[2, 2:] = ABSENT
    assert objective(replace(batch, teacher=ranking))[1]["agreement"] == 1
    ranking[0] = -ranking[0]
    statistics = objective(replace(batch, teacher=ranking, hit_rate=0.25))[1]
    assert statistics == {"agreement": pytest.approx(2 / 3), "teacher_hit_rate": 0.25}
