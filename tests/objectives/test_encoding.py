"""Tokens and numbers of documents, found when asked for; embeddings with gradient, in chunks as all at once."""

from dataclasses import replace
from itertools import chain, product
from pathlib import Path

import torch
import numpy as np
import pytest
from torch import Tensor
from fakes import gradients
from hypothesis import given, settings
from hypothesis import strategies as st
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import losses

from rqa.data import Document, Example
from rqa.models.encoder import Encoder
from rqa.objectives import encoding
from rqa.objectives.ctl import Contrastive, ContrastiveBatch
from rqa.objectives.encoding import Chunks, EncoderObjective, Tokens, embed_chunks, in_chunks, numbered
from rqa.objectives.losses import distillation, marginal_nll
from rqa.objectives.rpg import ListBatch, ListObjective
from rqa.runtime.errors import UserError


def test_tokens_are_made_once_while_they_are_remembered_and_of_no_other_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "TEXTS_KEPT", 4)
    asked: list[list[str]] = []
    tokens = Tokens(lambda texts: asked.append(texts) or [[ord(text), 2**31 - 1] for text in texts], chr)
    for numbers in ([70, 80, 70], [80, 90, 91], [92], [], [70, 92]):  # before the last of these, five are remembered
        assert [*map(list, tokens(numbers))] == [[number, 2**31 - 1] for number in numbers]
    assert asked == [["F", "P"], ["Z", "["], ["\\"], [], ["F", "\\"]]


@settings(max_examples=100)
@given(st.lists(st.sampled_from("abcdef"), unique=True), st.lists(st.lists(st.sampled_from("abcdef"))))
def test_what_the_database_lacks_is_numbered_behind_it(database: list[str], rows: list[list[str]]) -> None:
    documents = [Document("text", {"source": name}) for name in database]
    brought = [[Document("text", {"source": name, "title": "?"}) for name in row] for row in rows]
    known, numbers = numbered(documents, brought)
    assert [[known[number].key[0] for number in row] for row in numbers] == rows
    assert [known[number] for number in range(len(database))] == documents
    assert len(known) == len({*database, *chain(*rows)})


@pytest.fixture
def sequences(encoder: Encoder, documents: list[Document]) -> list[list[int]]:
    return encoder.tokenize_passages([documents[0].page_content[:length] for length in (18, 4, 27, 6, 3, 30, 5)])


def loss_and_gradients(encoder: Encoder, embeddings: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Of a loss that every number of every embedding decides."""
    encoder.zero_grad()
    weights = torch.linspace(-1, 1, embeddings.numel(), device=embeddings.device).sin().view_as(embeddings)
    loss = (embeddings * weights).sum()
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in encoder.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("size", [0, 1, 2, 3, 7, 100])
def test_chunks_give_the_embeddings_of_one_text_at_a_time_and_the_gradient_of_the_whole_batch(
    size: int, encoder: Encoder, sequences: list[list[int]]
) -> None:
    expected = torch.cat([torch.from_numpy(encoder.embed([ids])) for ids in sequences])
    device = encoder.backbone.device
    ours = embed_chunks(encoder, in_chunks(encoder, sequences, size).to(device))
    torch.testing.assert_close(ours.detach().cpu(), expected, atol=1e-5, rtol=1e-4)
    both = (embed_chunks(encoder, in_chunks(encoder, sequences, n).to(device)) for n in (size, 0))
    found, wanted = (loss_and_gradients(encoder, embeddings) for embeddings in both)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA"))]
)
def test_under_dropout_the_backward_pass_repeats_the_choice_of_the_forward_pass(
    device: str, encoder: Encoder, sequences: list[list[int]]
) -> None:
    """Beside the same chunks whose activations are kept."""
    ours = in_chunks(encoder.train().to(device), sequences, 2).to(encoder.backbone.device)
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    torch.manual_seed(1)
    chunks = [encoder.collate([sequences[i] for i in order[start : start + 2]]) for start in range(0, 7, 2)]
    embeddings = torch.cat([encoder(chunk.to(encoder.backbone.device)) for chunk in chunks])
    expected = loss_and_gradients(encoder, embeddings[np.argsort(order)])
    torch.manual_seed(1)
    found = loss_and_gradients(encoder, embed_chunks(encoder, ours))
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    other, _ = loss_and_gradients(encoder, embed_chunks(encoder, ours))
    assert other != found[0]  # dropout is on


NAIVE = {  # from the retriever's distribution over five passages, and the number of a question, whose gold that is
    "ctl": lambda ours, row: -ours[row].log(),
    "rpg and dca": lambda ours, _: (JUDGED.softmax(0) * (JUDGED.softmax(0) / ours).log()).sum(),
    "emdr": lambda ours, _: -(JUDGED.exp() * ours).sum().log(),
}
JUDGED = torch.arange(5).double()


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("name", NAIVE)
def test_with_matryoshka_dims_loss_and_gradient_are_the_mean_over_embeddings_cut_and_normalised_again(
    name: str, normalize: bool, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder.settings = replace(encoder.settings, normalize=normalize)
    sides, dims = [torch.randn(rows, 32).requires_grad_() for rows in (3, 5)], [2, 32, 7]
    unread, numbers = (Chunks((), torch.empty(0)),) * 2, torch.arange(5)
    batch = ListBatch(*unread, range(3), numbers.expand(3, -1), JUDGED.float().expand(3, -1))
    objective = ListObjective(encoder, 0.1, marginal_nll if name == "emdr" else distillation, dims)
    if name == "ctl":
        objective = Contrastive(encoder, 0.1, dims)
        batch = ContrastiveBatch(*unread, range(3), numbers, numbers[:3], numbers[:3, None])
    monkeypatch.setattr(objective, "embed", lambda batch: sides)
    loss, _ = objective(batch)
    loss.backward()
    theirs, expected = [side.detach().double().requires_grad_() for side in sides], 0.0
    for d, row in product(dims, range(3)):
        query, *passages = (x[:d] / (x[:d].norm() if normalize else 1) for x in (theirs[0][row], *theirs[1]))
        ours = torch.stack([(query * passage).sum() / 0.1 for passage in passages]).softmax(0)
        expected = expected + NAIVE[name](ours, row) / len(dims)
    expected.backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    for side, other in zip(sides, theirs, strict=True):
        torch.testing.assert_close(side.grad.double(), other.grad, rtol=1e-4, atol=1e-5)


def test_matryoshka_is_the_loss_that_sentence_transformers_calls_so(
    encoder: Encoder, examples: list[Example], tmp_path: Path
) -> None:
    """Theirs is a sum over dimensions, and a mean over questions."""
    encoder.save_pretrained(tmp_path)
    model = SentenceTransformer(str(tmp_path), device="cpu").eval()
    texts = [[e.question for e in examples[:4]], [e.gold_docs[0].fmt_content for e in examples[:4]]]
    loss = losses.MatryoshkaLoss(model, losses.MultipleNegativesRankingLoss(model, scale=20), [32, 16, 5])
    expected = loss([model.preprocess(side) for side in texts], torch.empty(0)) * 4 / 3
    expected.backward()
    sides = (in_chunks(encoder, encoder.tokenize_queries(side)) for side in texts)
    batch = ContrastiveBatch(*sides, range(4), torch.arange(4), torch.arange(4), torch.arange(4)[:, None])
    ours, found = gradients(Contrastive(encoder, 1 / 20, [5, 16, 32]), batch)
    torch.testing.assert_close(ours, expected.detach())
    for name, parameter in model[0].auto_model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(found[f"encoder.backbone.{name}"], parameter.grad, rtol=1e-3, atol=1e-5)


def test_matryoshka_dims_that_do_not_fit_the_embeddings_are_named(
    encoder: Encoder, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(UserError, match="--matryoshka_dims 33: the embeddings have 32 dim"):
        EncoderObjective(encoder, 0.1, [33, 8])
    EncoderObjective(encoder, 0.1, [16, 8])
    assert "--matryoshka_dims: without 32, whole embeddings are not trained" in caplog.text
