"""The projection: what sentence-transformers computes from the saved files; kept by all that keeps an encoder."""

from pathlib import Path

import torch
import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

from rqa.data import Document
from rqa.models.encoder import Encoder, EncoderArguments, load_encoder
from rqa.retrieval.index import IndexArguments
from rqa.retrieval.retriever import Retriever
from rqa.runtime.errors import UserError

D = 12


@pytest.fixture
def encoder(encoder_path: str) -> Encoder:
    encoder = load_encoder(encoder_path)
    encoder.project(D)
    torch.nn.init.normal_(encoder.projection.norm.weight)
    torch.nn.init.normal_(encoder.projection.norm.bias)
    return encoder


def embed(encoder: Encoder, documents: list[Document]) -> np.ndarray:
    return encoder.embed(encoder.tokenize_passages([document.fmt_content for document in documents]))


def test_the_embedding_is_layernorm_of_a_linear_map_of_the_pooled_one(
    encoder: Encoder, encoder_path: str, documents: list[Document]
) -> None:
    pooled = embed(load_encoder(encoder_path, EncoderArguments(normalize=False)), documents).astype(np.float64)
    weight, bias, scale, shift = (p.detach().double().numpy() for p in encoder.projection.parameters())
    mapped = pooled @ weight.T + bias
    centred = mapped - mapped.mean(1, keepdims=True)
    expected = centred / np.sqrt((centred**2).mean(1, keepdims=True) + 1e-5) * scale + shift
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(embed(encoder, documents), expected, atol=1e-5)


@pytest.mark.parametrize("normalize", [True, False])
def test_a_saved_projection_embeds_alike_here_and_in_sentence_transformers(
    normalize: bool, encoder_path: str, documents: list[Document], tmp_path: Path
) -> None:
    encoder = load_encoder(encoder_path, EncoderArguments(normalize=normalize))
    encoder.project(D)
    encoder.save_pretrained(tmp_path / "saved")
    ours = embed(encoder, documents)
    assert ours.shape == (len(documents), D)
    again = load_encoder(str(tmp_path / "saved"))
    np.testing.assert_allclose(embed(again, documents), ours, atol=1e-6)
    assert again.fingerprint() == encoder.fingerprint()
    theirs = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    found = theirs.encode([document.fmt_content for document in documents], show_progress_bar=False)
    np.testing.assert_allclose(found, ours, atol=1e-5)


def test_a_frozen_passage_encoder_keeps_a_projection_of_its_own(
    encoder: Encoder, documents: list[Document], tmp_path: Path
) -> None:
    encoder.freeze_passages()
    with torch.no_grad():
        encoder.projection.linear.weight.add_(torch.randn(D, 32))
    encoder.save_pretrained(tmp_path / "saved")
    again = load_encoder(str(tmp_path / "saved"))
    texts = [document.fmt_content for document in documents]
    queries, passages = again.embed(again.tokenize_queries(texts)), embed(again.passage_side, documents)
    np.testing.assert_allclose(queries, encoder.embed(encoder.tokenize_queries(texts)), atol=1e-6)
    np.testing.assert_allclose(passages, embed(encoder.passage_side, documents), atol=1e-6)
    assert np.abs(queries - passages).max() > 1e-2
    assert again.fingerprint() == encoder.fingerprint()
    theirs = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    np.testing.assert_allclose(theirs.encode_query(texts, show_progress_bar=False), queries, atol=1e-5)
    np.testing.assert_allclose(theirs.encode_document(texts, show_progress_bar=False), passages, atol=1e-5)


def test_the_index_holds_projected_embeddings_and_is_stale_when_the_projection_changes(
    encoder: Encoder, documents: list[Document]
) -> None:
    retriever = Retriever(encoder, documents, IndexArguments())
    retriever.refresh()
    queries = [document.page_content for document in documents[:3]]
    similarity = encoder.embed(encoder.tokenize_queries(queries)) @ embed(encoder, documents).T
    assert retriever.retrieve(queries, 1).ids[:, 0].tolist() == similarity.argmax(1).tolist()
    before = encoder.fingerprint()
    with torch.no_grad():
        encoder.projection.norm.bias.add_(0.1)
    assert encoder.fingerprint() != before


def test_a_projection_is_made_once_and_its_width_is_kept(encoder: Encoder) -> None:
    kept = encoder.projection
    encoder.project(D)
    assert encoder.projection is kept
    with pytest.raises(UserError, match="--indexing_dimension 8: the model's projection has 12 dimensions"):
        encoder.project(8)


def test_a_missing_projection_is_named(encoder: Encoder, tmp_path: Path) -> None:
    encoder.save_pretrained(tmp_path / "saved")
    (tmp_path / "saved/2_Dense/model.safetensors").unlink()
    with pytest.raises(UserError, match="saved: the projection cannot be loaded"):
        load_encoder(str(tmp_path / "saved"))
