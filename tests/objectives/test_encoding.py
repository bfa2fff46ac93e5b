"""Tokens and numbers of documents, found when asked for; embeddings with gradient, in chunks as all at once."""

from itertools import chain

import torch
import numpy as np
import pytest
from torch import Tensor
from hypothesis import given, settings
from hypothesis import strategies as st

from rqa.data import Document
from rqa.models.encoder import Encoder
from rqa.objectives import encoding
from rqa.objectives.encoding import Tokens, embed_chunks, in_chunks, numbered


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
