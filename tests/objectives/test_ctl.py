"""CTL: one loss and gradient, however the batch is cut and ordered; and which passages are hard negatives."""

from dataclasses import replace
from pathlib import Path

import torch
import numpy as np
import pytest
from torch import Tensor
from fakes import gradients, texts_in
from hypothesis import given, settings
from hypothesis import strategies as st

from rqa.data import Document, Example, Turn
from rqa.models.encoder import Encoder
from rqa.objectives import ctl
from rqa.objectives.ctl import (
    Contrastive,
    ContrastiveBatch,
    Contrasts,
    CTLArguments,
    MinedNegatives,
    NegativeArguments,
    NegativeChooser,
)
from rqa.objectives.encoding import embed_chunks, in_chunks
from rqa.prompts import retrieval_query
from rqa.retrieval.retriever import Hits, Retriever

TEMPERATURE = 0.1


NUMBERS = [0, 1, 4, 6, 7, 9, 10]


@pytest.fixture
def texts(encoder: Encoder, examples: list[Example], documents: list[Document]) -> list[list[list[int]]]:
    """Token ids of five questions and seven passages."""
    asked, found = [examples[i].question for i in (0, 1, 4, 5, 6)], [documents[n].fmt_content for n in NUMBERS]
    return [encoder.tokenize_queries(asked), encoder.tokenize_passages(found)]


@pytest.fixture
def batch(encoder: Encoder, texts: list[list[list[int]]]) -> ContrastiveBatch:
    """Five questions, two of them with one gold passage, one with two; hard negatives, one of them a gold passage."""
    return ContrastiveBatch(
        *(in_chunks(encoder, part) for part in texts),
        documents=torch.tensor(NUMBERS),
        targets=torch.tensor([0, 1, 4, 4, 6]),
        gold=torch.tensor([[0, -1], [1, -1], [4, -1], [4, -1], [6, 7]]),
        indices=range(5),
    )


def naive_loss(batch: ContrastiveBatch, queries: Tensor, passages: Tensor, temperature: float) -> float:
    """One question and one document at a time, in float64; other gold passages are left out."""
    loss = 0.0
    for query, target, gold in zip(queries.double(), batch.targets.tolist(), batch.gold.tolist(), strict=True):
        pairs = zip(batch.documents.tolist(), passages.double(), strict=True)
        logits = {n: query @ passage / temperature for n, passage in pairs if n == target or n not in gold}
        loss += float(torch.stack(list(logits.values())).logsumexp(0) - logits[target])
    return loss


def test_the_loss_is_the_mean_formula_one_text_at_a_time_and_reaches_the_whole_encoder(
    encoder: Encoder, batch: ContrastiveBatch, texts: list[list[list[int]]]
) -> None:
    singly = [torch.cat([torch.from_numpy(encoder.embed([ids])) for ids in part]) for part in texts]
    objective = Contrastive(encoder, TEMPERATURE)
    loss, found = gradients(objective, batch)
    assert float(loss) == pytest.approx(naive_loss(batch, *singly, TEMPERATURE), rel=1e-4)
    assert {id(p) for p in objective.parameters()} == {id(p) for p in encoder.parameters()}
    assert all("pooler" in name for name in {name for name, _ in objective.named_parameters()} - found.keys())
    assert all(gradient.abs().sum() > 0 for name, gradient in found.items() if "key.bias" not in name)


def test_the_similarity_is_computed_in_float32_under_autocast(encoder: Encoder, batch: ContrastiveBatch) -> None:
    """At a temperature of 0.001, bf16's rounding of a similarity near 1 would be a logit of 4."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        embeddings = [embed_chunks(encoder, part).detach() for part in (batch.queries, batch.passages)]
        loss, _ = Contrastive(encoder, 0.001)(batch)
    assert float(loss.detach()) == pytest.approx(naive_loss(batch, *embeddings, 0.001), rel=1e-3)


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
    """Gold passages of the same question, in any line, and repeated texts have no rank, whatever their case."""
    size = len(texts)
    scores = sorted(data.draw(st.lists(st.floats(-9, 9), min_size=size, max_size=size)), reverse=True)
    golden = [score for text, score in zip(texts, scores, strict=True) if text.upper() in {g.upper() for g in gold}]
    others = [i for i in range(size) if texts[i].upper() not in {g.upper() for g in gold}]
    distinct = [i for i in others if texts.index(texts[i]) == i]
    window = distinct[first - 1 : first + width]
    limit = golden[0] - (1 - (share or 0)) * abs(golden[0]) if golden else -np.inf
    expected = [i for i in window if share is None or scores[i] <= limit]
    documents = [Document(text, {"source": str(number)}) for number, text in enumerate(texts)]
    golds = [Document(text, {"source": "gold"}) for text in sorted(gold)]
    asked = [Example("Who?", tuple(golds[:1])), Example("WHO? ", tuple(golds[1:])), Example("Why?", (Document("d"),))]
    flags = NegativeArguments(negatives_from_rank=first, negatives_to_rank=first + width, negatives_max_share=share)
    chooser = NegativeChooser(asked, documents, flags)
    assert chooser(0, [*range(size), -1], [*scores, -np.inf]) == expected
    assert chooser.counts["passages left out as gold"] == len(golden)
    assert chooser.counts["searches that found a gold passage"] == bool(golden)
    assert chooser.depth == first + width + len({text.upper() for text in gold})


def test_a_hard_negative_of_the_file_has_no_gold_text_and_counts_once(
    encoder: Encoder, documents: list[Document], caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever its source; gold texts of the same question in another line count, too."""
    copies = [replace(document, metadata={"source": "copy"}) for document in documents[:3]]
    asked = [Example("Who?", (documents[0],), hard_neg_docs=(copies[0], copies[1], documents[2], copies[2])),
             Example("who?", (documents[1],))]  # fmt: skip
    collate = Contrasts(asked, documents, encoder, None, CTLArguments(num_hard_negatives=9), 0)
    batch = collate([0])
    assert (batch.documents.tolist(), batch.gold.tolist()) == ([0, 2], [[0, 1]])
    assert "3 passages of hard_neg_docs are left out" in caplog.text
    Contrasts(asked[1:], documents, encoder, None, CTLArguments(), 0)
    assert "no question has hard_neg_docs" in caplog.text


@pytest.mark.parametrize("mined", [False, True])
@pytest.mark.parametrize(
    ("own", "counts"), [({"num_hard_negatives": 0}, {0}), ({"hard_neg_ratio": 0.5}, {1, 2}), ({}, {5, 6, 7, 8})]
)
def test_a_batch_holds_a_gold_passage_of_each_question_and_the_negatives_asked_for(
    own: dict[str, float], counts: set[int], mined: bool, encoder: Encoder, examples: list[Example],
    documents: list[Document],
) -> None:  # fmt: skip
    """Two of the file's for each question, or mined ones beside; the last of the file's is not in the database."""
    stranger, numbers, pools = Document("A market of nowhere."), [0, 2, 4, 6], {}
    asked = [replace(e, hard_neg_docs=(documents[n + 3], stranger)) for n, e in enumerate(examples[:8])]
    if mined:
        pools = {number: [number + 10, number + 11] for number in numbers}
    batch = Contrasts(asked, documents, encoder, pools or None, CTLArguments(**own), seed=1)(numbers)
    texts = encoder.tokenize_passages([document.fmt_content for document in (*documents, stranger)])
    assert texts_in(batch.queries) == encoder.tokenize_queries([asked[number].question for number in numbers])
    assert texts_in(batch.passages) == [texts[number] for number in batch.documents]
    assert (batch.targets.tolist(), batch.gold.tolist()) == (numbers, [[number] for number in numbers])
    golds, negatives = batch.documents.tolist()[:4], batch.documents.tolist()[4:]
    assert golds == numbers
    assert len(negatives) == len({*negatives} - {*numbers}) in counts
    assert {*negatives} <= {24, *(number + 3 for number in numbers), *(n for pool in pools.values() for n in pool)}
    assert mined or own or {*negatives} == {24, 3, 5, 7, 9}


@pytest.mark.parametrize("share", [None, 0.999])
def test_what_is_mined_is_the_window_of_the_retrievers_own_ranking_and_it_is_kept(
    share: float | None, encoder: Encoder, examples: list[Example], documents: list[Document], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """With a share, a question whose gold passage is not in that ranking gets none."""
    monkeypatch.setattr(ctl, "QUERIES_AT_ONCE", 4)
    retriever = Retriever(encoder.train(), documents)
    retriever.refresh()
    ((first, second),) = retriever.documents_of(retriever.retrieve([examples[4].question], 2))
    two = replace(examples[4], gold_docs=(replace(first, formatted="Of another format."), second))
    asked = [*examples[:4], two, replace(examples[5], chat_history=(Turn("user", "Tell me about amber."),))]
    flags = NegativeArguments(negatives_from_rank=2, negatives_to_rank=9, negatives_max_share=share)
    pools, again = (MinedNegatives(asked, retriever, flags) for _ in range(2))
    pools()
    pools.save(tmp_path)
    again.load(tmp_path)
    for number, example in enumerate(asked):
        hits = retriever.retrieve([retrieval_query(example)], 9 + 2)
        ranking = list(zip(*retriever.documents_of(hits), hits.scores[0], strict=True))
        gold = {passage.key for passage in example.gold_docs}
        best = max([score for passage, score in ranking if passage.key in gold], default=-np.inf)
        others = [(passage, score) for passage, score in ranking if passage.key not in gold][1:9]
        expected = [passage for passage, score in others if share is None or score <= best - (1 - share) * abs(best)]
        assert pools[number] == again[number]
        assert [documents[position] for position in pools[number]] == expected
    counts = {len(pools[number]) for number in range(6)}
    assert counts == {8} if share is None else {0, 8} < counts
    assert encoder.training
    asks = []
    nothing = [Hits(np.empty((size, 0), int), np.empty((size, 0))) for size in range(3)]
    monkeypatch.setattr(
        retriever, "retrieve", lambda questions, k: asks.append(len(questions)) or nothing[len(questions)]
    )
    monkeypatch.setattr("rqa.runtime.distributed.world_size", lambda: 2)
    monkeypatch.setattr("rqa.runtime.distributed.gather", list)
    for rank in range(2):  # to retrieve is a collective call: both make as many
        monkeypatch.setattr("rqa.runtime.distributed.rank", lambda rank=rank: rank)
        MinedNegatives([*asked, *asked[:3]], retriever, flags)()
    assert asks == [2, 2, 1, 2, 2, 0]
    with pytest.raises(ValueError, match="mined negatives belong to another training file"):
        MinedNegatives(asked[1:], retriever, flags).load(tmp_path)
