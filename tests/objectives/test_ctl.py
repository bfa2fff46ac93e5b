"""CTL: one loss and gradient, however the batch is cut and ordered; and which passages are hard negatives."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import numpy as np
import pytest
from torch import Tensor
from hypothesis import given, settings
from hypothesis import strategies as st

from rqa.data import Document, Example, Turn
from rqa.models.encoder import Encoder, load_encoder
from rqa.objectives import ctl
from rqa.objectives.ctl import Contrastive, ContrastiveBatch, MinedNegatives, NegativeArguments, NegativeChooser
from rqa.objectives.encoding import embed_in_chunks
from rqa.prompts import retrieval_query
from rqa.retrieval.retriever import Hits, Retriever

TEMPERATURE = 0.1


@pytest.fixture
def encoder(encoder_path: str) -> Encoder:
    """Without dropout, so that runs can be compared."""
    return load_encoder(encoder_path).eval()


@pytest.fixture
def batch(encoder: Encoder, examples: list[Example], documents: list[Document]) -> ContrastiveBatch:
    """Five questions, two of them with one gold passage, one with two; hard negatives, one of them a gold passage."""
    numbers = [0, 1, 4, 6, 7, 9, 10]
    return ContrastiveBatch(
        queries=encoder.tokenize_queries([examples[i].question for i in (0, 1, 4, 5, 6)]),
        passages=encoder.tokenize_passages([documents[number].fmt_content for number in numbers]),
        documents=torch.tensor(numbers),
        targets=torch.tensor([0, 1, 4, 4, 6]),
        gold=torch.tensor([[0, -1], [1, -1], [4, -1], [4, -1], [6, 7]]),
        indices=range(5),
    )


def gradients(encoder: Encoder, batch: ContrastiveBatch, chunk_size: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
    objective = Contrastive(encoder, TEMPERATURE, chunk_size)
    objective.zero_grad()
    loss, _ = objective(batch)
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in objective.encoder.named_parameters() if p.grad is not None}


def naive_loss(batch: ContrastiveBatch, queries: Tensor, passages: Tensor, temperature: float) -> float:
    """One question and one document at a time, in float64; other gold passages are left out."""
    loss = 0.0
    for query, target, gold in zip(queries.double(), batch.targets.tolist(), batch.gold.tolist(), strict=True):
        logits = {
            number: query @ passage / temperature
            for number, passage in zip(batch.documents.tolist(), passages.double(), strict=True)
            if number == target or number not in gold
        }
        loss += float(torch.stack(list(logits.values())).logsumexp(0) - logits[target])
    return loss


def test_the_loss_is_the_mean_formula_one_text_at_a_time_and_reaches_the_whole_encoder(
    encoder: Encoder, batch: ContrastiveBatch
) -> None:
    singly = [torch.from_numpy(np.concatenate([encoder.embed([ids]) for ids in part]))
              for part in (batch.queries, batch.passages)]  # fmt: skip
    loss, found = gradients(encoder, batch)
    assert float(loss) == pytest.approx(naive_loss(batch, *singly, TEMPERATURE), rel=1e-4)
    assert {id(p) for p in Contrastive(encoder, TEMPERATURE).parameters()} == {id(p) for p in encoder.parameters()}
    assert all("pooler" in name for name in {name for name, _ in encoder.named_parameters()} - found.keys())
    assert all(gradient.abs().sum() > 0 for name, gradient in found.items() if "key.bias" not in name)


def test_the_similarity_is_computed_in_float32_under_autocast(encoder: Encoder, batch: ContrastiveBatch) -> None:
    """At a temperature of 0.001, bf16's rounding of a similarity near 1 would be a logit of 4."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        embeddings = [embed_in_chunks(encoder, part, 0).detach() for part in (batch.queries, batch.passages)]
        loss, _ = Contrastive(encoder, 0.001)(batch)
    assert float(loss.detach()) == pytest.approx(naive_loss(batch, *embeddings, 0.001), rel=1e-3)


def test_permuting_questions_and_documents_in_chunks_changes_nothing(encoder: Encoder, batch: ContrastiveBatch) -> None:
    questions, columns = torch.randperm(5), torch.randperm(7)
    permuted = ContrastiveBatch(
        queries=[batch.queries[i] for i in questions],
        passages=[batch.passages[i] for i in columns],
        documents=batch.documents[columns],
        targets=batch.targets[questions],
        gold=batch.gold[questions],
        indices=questions.tolist(),
    )
    torch.testing.assert_close(gradients(encoder, permuted, 3), gradients(encoder, batch), atol=1e-5, rtol=1e-4)


# ---------------------------------------------------------------- which passages are hard negatives


@settings(max_examples=200, deadline=None)
@given(
    texts=st.lists(st.sampled_from("abcdefg"), max_size=12),
    gold=st.sets(st.sampled_from("ABcx"), min_size=1),
    first=st.integers(1, 4),
    width=st.integers(0, 8),
    share=st.none() | st.floats(0.1, 1),
    data=st.data(),
)
def test_the_negatives_of_a_ranking_are_those_of_a_naive_choice(
    texts: list[str], gold: set[str], first: int, width: int, share: float | None, data: st.DataObject
) -> None:
    """Gold passages and repeated texts, whatever their source and case, have no rank."""
    size = len(texts)
    scores = sorted(data.draw(st.lists(st.floats(-9, 9), min_size=size, max_size=size)), reverse=True)
    golden = [score for text, score in zip(texts, scores, strict=True) if text.upper() in {g.upper() for g in gold}]
    others = [i for i in range(size) if texts[i].upper() not in {g.upper() for g in gold}]
    distinct = [i for i in others if texts.index(texts[i]) == i]
    expected = []
    for rank, i in enumerate(distinct, start=1):
        low_enough = share is None or (bool(golden) and scores[i] <= golden[0] - (1 - share) * abs(golden[0]))
        if first <= rank <= first + width and low_enough:
            expected.append(i)
    documents = [Document(text, {"source": str(number)}) for number, text in enumerate(texts)]
    example = Example("?", tuple(Document(text, {"source": "gold"}) for text in gold))
    window = {"negatives_from_rank": first, "negatives_to_rank": first + width}
    chooser = NegativeChooser([example], documents, NegativeArguments(**window, negatives_max_share=share))
    assert chooser(0, [*range(size), -1], [*scores, -np.inf]) == expected
    assert chooser.counts["passages left out as gold"] == len(golden)
    assert chooser.counts["searches that found a gold passage"] == bool(golden)
    assert chooser.depth == first + width + len({text.upper() for text in gold})


def test_a_passage_that_is_gold_for_the_same_question_elsewhere_is_no_negative(documents: list[Document]) -> None:
    asked = [Example("Where is copper sold?", (documents[0],)), Example("Who?", (documents[3],)),
             Example("WHERE is copper sold? ", (documents[1],))]  # fmt: skip
    copy = Document(documents[0].page_content.upper() + "\n", {"source": "copy"})
    chooser = NegativeChooser(asked, [*documents[:4], copy], NegativeArguments())
    assert [chooser(n, range(5), [5.0, 4, 3, 2, 1]) for n in range(3)] == [[2, 3], [0, 1, 2], [2, 3]]


def document(score: float, source: str = "s") -> Document:
    return Document(str(score), {"source": source})


def mined(golds: Sequence[Sequence[Document]], database: Sequence[Document], **flags: Any) -> list[list[float]]:
    """The negatives of questions with these gold passages, where a document is ranked by the number that it is."""
    scores = np.array([float(found.page_content) for found in database])
    order = np.argsort(-scores)

    def retrieve(questions: Sequence[str], k: int) -> Hits:
        return Hits(*(np.tile(row[:k], (len(questions), 1)) for row in (order, scores[order])))

    examples = [Example(f"Question {number}", tuple(gold)) for number, gold in enumerate(golds)]
    retriever: Any = SimpleNamespace(documents=database, retrieve=retrieve)
    pools = MinedNegatives(examples, retriever, NegativeArguments(**flags))
    pools()
    return [[float(found.page_content) for found in pools[number]] for number in range(len(golds))]


def test_the_best_that_are_not_gold_are_mined_best_first_below_a_share_of_the_best_gold_passages_score() -> None:
    database = [document(score) for score in (0.1, 0.9, 0.5, 0.7, 0.3, 0.8, 0.6)]
    reformatted = replace(document(0.9), fmt_content="Of another format: 0.9")
    golds = [[document(0.7)], [reformatted, document(0.7, "elsewhere")], [document(0.3), document(0.7)], [document(2)]]
    best = [0.9, 0.8, 0.6, 0.5, 0.3, 0.1]
    assert mined(golds, database) == [best, best[1:], [0.9, 0.8, 0.6, 0.5, 0.1], sorted([*best, 0.7], reverse=True)]
    assert mined(golds, database, negatives_max_share=0.8) == [[0.5, 0.3, 0.1], [0.6, 0.5, 0.3, 0.1], [0.5, 0.1], []]


def test_gold_takes_no_rank_from_the_window_and_gold_below_it_vouches_for_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ctl, "QUERIES_AT_ONCE", 2)
    many = [document(score) for score in range(100)]
    golds = [[document(score) for score in range(60, 100)], [document(99)], [document(50)]]
    window = {"negatives_from_rank": 2, "negatives_to_rank": 5}
    assert mined(golds, many, **window) == [[58, 57, 56, 55], [97, 96, 95, 94], [98, 97, 96, 95]]
    assert mined(golds[1:], many, **window, negatives_max_share=0.97) == [[96, 95, 94], []]


def test_with_a_real_encoder_negatives_are_what_the_retriever_finds_minus_gold_and_they_are_kept(
    encoder: Encoder, examples: list[Example], documents: list[Document], tmp_path: Path
) -> None:
    retriever = Retriever(encoder.train(), documents)
    retriever.refresh()
    asked = [*examples[:5], replace(examples[5], chat_history=(Turn("user", "Tell me about amber."),))]
    flags = NegativeArguments(negatives_from_rank=2, negatives_to_rank=9)
    pools, again = (MinedNegatives(asked, retriever, flags) for _ in range(2))
    pools()
    pools.save(tmp_path)
    again.load(tmp_path)
    for number, example in enumerate(asked):
        (found,) = retriever.documents_of(retriever.retrieve([retrieval_query(example)], 24))
        assert pools[number] == again[number] == [hit for hit in found if hit not in example.gold_docs][1:9]
    assert encoder.training
    with pytest.raises(ValueError, match="mined negatives are of another training file"):
        MinedNegatives(asked[1:], retriever, flags).load(tmp_path)
