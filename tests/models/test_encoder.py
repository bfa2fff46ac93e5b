"""The encoder against sentence-transformers, and against itself in other batches."""

import json
import random
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import numpy as np
import pytest
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel, PreTrainedTokenizerBase

from rqa.data import Document, Example
from rqa.models.encoder import Encoder, EncoderArguments, EncoderSettings, load_encoder
from rqa.packing import pack, pad
from rqa.runtime.errors import UserError

try:
    from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Transformer
except ImportError:
    from sentence_transformers.models import Dense, Normalize, Pooling, Transformer


@pytest.fixture(scope="module")
def queries(examples: list[Example]) -> list[str]:
    return [example.question for example in examples[:7]] + ["?", "What " * 100]


@pytest.fixture(scope="module")
def passages(documents: list[Document]) -> list[str]:
    """Of many lengths, some longer than the model reads."""
    return [document.fmt_content[: 7 * number + 1] for number, document in enumerate(documents)] + [
        " ".join(document.fmt_content for document in documents)
    ]


@pytest.fixture
def encoder(encoder_path: str) -> Encoder:
    return load_encoder(encoder_path)


def embed_queries(encoder: Encoder, texts: list[str], **options: Any) -> np.ndarray:
    return encoder.embed(encoder.tokenize_queries(texts), **options)


def embed_passages(encoder: Encoder, texts: list[str], **options: Any) -> np.ndarray:
    return encoder.embed(encoder.tokenize_passages(texts), **options)


# ---------------------------------------------------------------- sentence-transformers


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("prefixes", [("", ""), ("query: ", "passage: ")])
def test_a_saved_encoder_embeds_alike_in_sentence_transformers(
    prefixes: tuple[str, str],
    normalize: bool,
    pooling: str,
    encoder_path: str,
    tmp_path: Path,
    queries: list[str],
    passages: list[str],
) -> None:
    given = EncoderArguments(pooling_type=pooling, normalize=normalize, query_prefix=prefixes[0], passage_prefix=prefixes[1])
    ours = load_encoder(encoder_path, given)
    ours.save_pretrained(tmp_path)
    theirs = SentenceTransformer(str(tmp_path), device="cpu")
    again = load_encoder(str(tmp_path))
    assert again.settings == ours.settings
    for texts, embed, prompt in ((queries, embed_queries, "query"), (passages, embed_passages, "document")):
        expected = theirs.encode(texts, prompt_name=prompt)
        np.testing.assert_allclose(embed(ours, texts), expected, atol=1e-5)
        np.testing.assert_array_equal(embed(again, texts), embed(ours, texts))
    if prefixes[0]:
        assert np.abs(theirs.encode(queries) - embed_queries(ours, queries)).max() > 1e-3


@pytest.mark.parametrize("mode", ["mean", "cls"])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("prompts", [{}, {"query": "query: ", "document": "passage: "}])
def test_a_checkpoint_of_sentence_transformers_loads_with_its_pooling_and_prompts(
    prompts: dict[str, str],
    normalize: bool,
    mode: str,
    encoder_path: str,
    tmp_path: Path,
    queries: list[str],
    passages: list[str],
) -> None:
    modules = [Transformer(encoder_path, max_seq_length=32), Pooling(32, pooling_mode=mode)]
    theirs = SentenceTransformer(modules=modules + [Normalize()] * normalize, prompts=prompts, device="cpu")
    theirs.save_pretrained(str(tmp_path))
    ours = load_encoder(str(tmp_path))
    assert (ours.settings.pooling_type, ours.settings.normalize) == (mode, normalize)
    assert ours.settings.max_passage_length == 32
    name = {"query": "query", "document": "document"} if prompts else {"query": None, "document": None}
    np.testing.assert_allclose(
        embed_queries(ours, queries), theirs.encode(queries, prompt_name=name["query"]), atol=1e-5
    )
    np.testing.assert_allclose(
        embed_passages(ours, passages), theirs.encode(passages, prompt_name=name["document"]), atol=1e-5
    )


@pytest.mark.parametrize("mode", ["max", "lasttoken", "mean_sqrt_len_tokens", "weightedmean"])
def test_a_pooling_that_is_not_offered_is_refused_by_file(mode: str, encoder_path: str, tmp_path: Path) -> None:
    modules = [Transformer(encoder_path), Pooling(32, pooling_mode=mode)]
    SentenceTransformer(modules=modules, device="cpu").save_pretrained(str(tmp_path))
    with pytest.raises(UserError, match=r"1_Pooling/config\.json: pooling \w*(max|last|sqrt|weighted)\w* is not"):
        load_encoder(str(tmp_path))


def test_two_poolings_at_once_are_refused_by_file(encoder: Encoder, tmp_path: Path) -> None:
    encoder.save_pretrained(tmp_path)
    (tmp_path / "rqa_encoder.json").unlink()
    path = tmp_path / "1_Pooling" / "config.json"
    path.write_text(json.dumps({"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": True}))
    with pytest.raises(UserError, match=r"1_Pooling/config\.json: pooling mean_tokens\+max_tokens"):
        load_encoder(str(tmp_path))


def test_a_module_that_is_not_offered_is_refused_by_file(encoder_path: str, tmp_path: Path) -> None:
    modules = [Transformer(encoder_path), Pooling(32), Dense(32, 16)]
    SentenceTransformer(modules=modules, device="cpu").save_pretrained(str(tmp_path))
    with pytest.raises(UserError, match=r"modules\.json: module Dense is not supported"):
        load_encoder(str(tmp_path))


@pytest.mark.parametrize("name", ["modules.json", "1_Pooling/config.json", "sentence_bert_config.json"])
def test_a_damaged_file_of_a_checkpoint_is_named(name: str, encoder: Encoder, tmp_path: Path) -> None:
    encoder.save_pretrained(tmp_path)
    (tmp_path / "rqa_encoder.json").unlink()
    (tmp_path / name).write_text("{")
    with pytest.raises(UserError, match=name):
        load_encoder(str(tmp_path))


def test_arguments_override_the_checkpoint(encoder_path: str, tmp_path: Path) -> None:
    load_encoder(encoder_path, EncoderArguments(pooling_type="cls", normalize=False, query_prefix="q ", passage_prefix="p ", max_query_length=20, max_passage_length=30)).save_pretrained(tmp_path)
    assert load_encoder(str(tmp_path)).settings == EncoderSettings("cls", False, "q ", "p ", 20, 30)
    given = EncoderArguments(pooling_type="mean", normalize=True, query_prefix="", passage_prefix="", max_query_length=21, max_passage_length=31)
    assert load_encoder(str(tmp_path), given).settings == EncoderSettings("mean", True, "", "", 21, 31)


def test_a_plain_checkpoint_pools_by_the_mean_and_normalises(encoder: Encoder) -> None:
    assert encoder.settings == EncoderSettings("mean", True, "", "", 64, 64)


def test_a_saved_length_above_512_is_kept_where_the_model_reads_it(
    wordpiece: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    config = BertConfig(
        vocab_size=len(wordpiece),
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=1024,
    )
    BertModel(config).save_pretrained(tmp_path / "plain")
    wordpiece.save_pretrained(tmp_path / "plain")
    path = tmp_path / "plain" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": 1024}))
    encoder = load_encoder(str(tmp_path / "plain"), EncoderArguments(max_passage_length=700))
    assert (encoder.settings.max_query_length, encoder.settings.max_passage_length) == (512, 700)
    encoder.save_pretrained(tmp_path / "saved")
    assert load_encoder(str(tmp_path / "saved")).settings == encoder.settings


# ---------------------------------------------------------------- one by one


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("normalize", [True, False])
def test_packed_equals_padded_equals_one_by_one_by_hand(
    normalize: bool, pooling: str, encoder_path: str, passages: list[str]
) -> None:
    encoder = load_encoder(encoder_path, EncoderArguments(pooling_type=pooling, normalize=normalize))
    model = AutoModel.from_pretrained(encoder_path, attn_implementation="eager").eval().double()
    tokenizer = AutoTokenizer.from_pretrained(encoder_path)
    expected = []
    for text in passages:
        inputs = tokenizer(text, truncation=True, max_length=64, return_tensors="pt")
        with torch.no_grad():
            hidden = model(**inputs).last_hidden_state[0]
        vector = hidden.mean(0) if pooling == "mean" else hidden[0]
        expected.append((vector / vector.norm() if normalize else vector).numpy())
    assert encoder.collate is pack
    packed = embed_passages(encoder, passages)
    encoder.collate = partial(pad, pad_id=0)
    padded = embed_passages(encoder, passages)
    np.testing.assert_allclose(packed, np.stack(expected), atol=1e-5)
    np.testing.assert_allclose(padded, np.stack(expected), atol=1e-5)
    assert packed.dtype == np.float32


@pytest.mark.parametrize("budget", [1, 64, 200, 16384])
def test_neither_the_order_nor_the_size_of_batches_matters(budget: int, encoder: Encoder, passages: list[str]) -> None:
    expected = embed_passages(encoder, passages)
    order = random.Random(budget).sample(range(len(passages)), len(passages))
    shuffled = embed_passages(encoder, [passages[i] for i in order], max_batch_tokens=budget)
    np.testing.assert_allclose(shuffled, expected[order], atol=1e-6)


@pytest.mark.parametrize("padded", [False, True])
def test_no_forward_pass_computes_more_tokens_than_allowed(
    padded: bool, encoder: Encoder, passages: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if padded:
        encoder.collate = partial(pad, pad_id=0)
    sizes = []
    forward = Encoder.forward
    monkeypatch.setattr(
        Encoder, "forward", lambda self, batch: sizes.append(batch.inputs["input_ids"].numel()) or forward(self, batch)
    )
    embed_passages(encoder, passages, max_batch_tokens=150)
    assert len(sizes) > 1
    assert max(sizes) <= 150


def test_no_texts_are_no_embeddings(encoder: Encoder) -> None:
    assert embed_queries(encoder, []).shape == (0, encoder.dimension) == (0, 32)


def test_embedding_gives_no_gradient_and_forward_does(encoder: Encoder, passages: list[str]) -> None:
    encoder.train()
    embed_passages(encoder, passages[:3])
    assert all(parameter.grad is None for parameter in encoder.parameters())
    encoder(encoder.collate(encoder.tokenize_passages(passages[:3])))[:, 0].sum().backward()
    assert encoder.backbone.embeddings.word_embeddings.weight.grad.abs().sum() > 1e-3


@pytest.mark.parametrize("training", [True, False])
def test_embedding_is_without_dropout_and_restores_the_mode(
    training: bool, encoder_path: str, passages: list[str]
) -> None:
    encoder = load_encoder(encoder_path)
    assert encoder.backbone.config.hidden_dropout_prob > 0
    expected = embed_passages(encoder.eval(), passages)
    encoder.train(training)
    np.testing.assert_array_equal(embed_passages(encoder, passages), expected)
    assert all(module.training == training for module in encoder.modules())
    with torch.no_grad():
        direct = encoder(encoder.collate(encoder.tokenize_passages(passages))).numpy()
    assert (np.abs(direct - expected).max() > 1e-2) == training


def test_the_mode_is_restored_when_embedding_fails(encoder: Encoder) -> None:
    encoder.train()
    with pytest.raises(IndexError):
        encoder.embed([[10**6]])
    assert encoder.training


# ---------------------------------------------------------------- the fingerprint


def test_the_fingerprint_is_the_same_for_the_same_embeddings(
    encoder: Encoder, encoder_path: str, tmp_path: Path, passages: list[str]
) -> None:
    before = encoder.fingerprint()
    assert load_encoder(encoder_path).fingerprint() == before
    embed_passages(encoder, passages)
    embed_queries(encoder, ["What?"])
    encoder.train()
    assert encoder.fingerprint() == before
    encoder.tokenizer(["padded", "to one length"], padding=True, truncation=True, max_length=5)
    assert encoder.fingerprint() == before
    encoder.save_pretrained(tmp_path)
    assert load_encoder(str(tmp_path)).fingerprint() == before


@pytest.mark.parametrize("name", list(EncoderSettings.__dataclass_fields__))
def test_the_fingerprint_changes_with_every_setting(name: str, encoder: Encoder) -> None:
    value = getattr(encoder.settings, name)
    other = {"pooling_type": "cls", "normalize": False}.get(name, value + 1 if isinstance(value, int) else "x")
    before = encoder.fingerprint()
    encoder.settings = replace(encoder.settings, **{name: other})
    assert encoder.fingerprint() != before


def test_the_fingerprint_changes_with_any_one_weight(encoder: Encoder) -> None:
    before = encoder.fingerprint()
    for parameter in encoder.parameters():
        with torch.no_grad():
            old = parameter.flatten()[-1].item()
            parameter.view(-1)[-1] += 1e-3
            assert encoder.fingerprint() != before
            parameter.view(-1)[-1] = old
    assert encoder.fingerprint() == before


def test_the_fingerprint_changes_with_the_tokenizer(encoder: Encoder) -> None:
    before = encoder.fingerprint()
    encoder.tokenizer = AutoTokenizer.from_pretrained(encoder.tokenizer.name_or_path)
    assert encoder.fingerprint() == before
    encoder.tokenizer.add_tokens(["harbour of"])
    assert encoder.fingerprint() != before
