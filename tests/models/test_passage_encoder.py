"""An encoder of questions that trains, beside the frozen one of passages: saved, loaded and asked."""

from pathlib import Path

import torch
import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

from rqa.data import Document, Example
from rqa.models.encoder import Encoder, EncoderArguments, load_encoder
from rqa.objectives.ctl import Contrastive, ContrastiveBatch
from rqa.retrieval.index import IndexArguments
from rqa.retrieval.retriever import Retriever

PREFIXES = EncoderArguments(query_prefix="query: ", passage_prefix="passage: ")


@pytest.fixture
def encoder(encoder_path: str) -> Encoder:
    """With passages frozen, and other weights for questions than those of passages."""
    encoder = load_encoder(encoder_path, PREFIXES)
    encoder.freeze_passages()
    with torch.no_grad():
        for parameter in encoder.backbone.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return encoder


def test_passages_keep_the_initial_encoder(encoder: Encoder, encoder_path: str, documents: list[Document]) -> None:
    initial = load_encoder(encoder_path, PREFIXES)
    texts = initial.tokenize_passages([document.fmt_content for document in documents])
    np.testing.assert_array_equal(encoder.passage_side.embed(texts), initial.embed(texts))
    assert np.abs(encoder.embed(texts) - initial.embed(texts)).max() > 1e-2
    frozen = encoder.passage_encoder
    encoder.freeze_passages()  # once frozen, for ever
    assert encoder.passage_encoder is frozen


def test_what_is_saved_and_loaded_finds_the_same_documents(
    encoder: Encoder, documents: list[Document], examples: list[Example], tmp_path: Path
) -> None:
    questions = [example.question for example in examples]

    def hits(encoder: Encoder) -> tuple[np.ndarray, np.ndarray, str]:
        retriever = Retriever(encoder, documents, IndexArguments())
        retriever.open(None)
        found = retriever.retrieve(questions, 10)
        return found.ids, found.scores, retriever.identity()

    encoder.save_pretrained(tmp_path)
    loaded = load_encoder(str(tmp_path))
    for ours, theirs in zip(hits(encoder), hits(loaded), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    alone = load_encoder(str(tmp_path / "passage_encoder"))
    assert not alone.passage_encoder
    assert (hits(alone)[0] != hits(encoder)[0]).any()
    assert loaded.settings == encoder.settings == alone.settings


def test_sentence_transformers_asks_each_encoder_for_its_side(
    encoder: Encoder, documents: list[Document], examples: list[Example], tmp_path: Path
) -> None:
    encoder.save_pretrained(tmp_path)
    theirs = SentenceTransformer(str(tmp_path), device="cpu")
    questions, texts = [example.question for example in examples], [document.fmt_content for document in documents]
    queries = encoder.embed(encoder.tokenize_queries(questions))
    passages = encoder.passage_side.embed(encoder.tokenize_passages(texts))
    np.testing.assert_allclose(theirs.encode_query(questions), queries, atol=1e-5)
    np.testing.assert_allclose(theirs.encode_document(texts), passages, atol=1e-5)


def test_a_passage_encoder_that_another_run_left_behind_is_not_loaded(
    encoder: Encoder, encoder_path: str, tmp_path: Path
) -> None:
    encoder.save_pretrained(tmp_path)
    load_encoder(encoder_path).save_pretrained(tmp_path)
    assert (tmp_path / "passage_encoder").is_dir()
    assert load_encoder(str(tmp_path)).passage_encoder is None
    assert SentenceTransformer(str(tmp_path), device="cpu").encode(["What?"]).shape == (1, 32)


def test_the_gradient_reaches_questions_alone_and_passages_have_no_dropout(
    encoder: Encoder, documents: list[Document], examples: list[Example]
) -> None:
    encoder.train()
    assert all(module.training for module in encoder.backbone.modules())
    assert not any(module.training for module in encoder.passage_side.modules())
    for chunk_size in (0, 1):
        encoder.zero_grad()
        batch = ContrastiveBatch(
            queries=encoder.tokenize_queries([example.question for example in examples[:3]]),
            passages=encoder.tokenize_passages([document.fmt_content for document in documents[:3]]),
            documents=torch.arange(3),
            targets=torch.arange(3),
            gold=torch.arange(3)[:, None],
            indices=range(3),
        )
        Contrastive(encoder, 0.05, chunk_size)(batch)[0].backward()
        reached = {name.partition(".")[0] for name, p in encoder.named_parameters() if p.grad is not None}
        assert reached == {"backbone"}
    encoder.eval()
    encoder.embed(batch.queries)
    assert not encoder.passage_side.training


def test_either_encoder_s_weights_change_the_fingerprint(encoder: Encoder) -> None:
    found = {encoder.fingerprint()}
    for part in (encoder.backbone, encoder.passage_side.backbone):
        with torch.no_grad():
            next(part.parameters())[0, 0] += 1
        found.add(encoder.fingerprint())
    assert len(found) == 3
