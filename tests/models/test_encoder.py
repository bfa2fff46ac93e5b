"""The encoder against sentence-transformers, and against itself in other batches."""

import copy
import itertools
import json
import random
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import numpy as np
import pytest
import transformers
from conftest import SMALL
from fakes import change_weights
from sentence_transformers import SentenceTransformer
from transformers import AutoTokenizer, BertConfig, BertModel, PreTrainedTokenizerBase

from rqa.data import Document
from rqa.models.encoder import Encoder, EncoderArguments, EncoderSettings, load_encoder
from rqa.packing import pack, pad
from rqa.runtime.errors import UserError

try:
    from sentence_transformers.sentence_transformer.modules import Dense, LayerNorm, Normalize, Pooling, Transformer
except ImportError:
    from sentence_transformers.models import Dense, LayerNorm, Normalize, Pooling, Transformer

D = 12  # of a projection
PREFIXES = {"query_prefix": "query: ", "passage_prefix": "passage: "}
QUERIES = [*(f"What does {city} trade in?" for city in ("Arlen", "Brask", "Corvo")), "?", "What " * 100]


@pytest.fixture(scope="module")
def passages(documents: list[Document]) -> list[str]:
    """Of many lengths, some longer than the model reads."""
    texts = [document.fmt_content for document in documents]
    return [text[: 7 * number + 1] for number, text in enumerate(texts)] + [" ".join(texts)]


@pytest.fixture
def frozen(encoder_path: str) -> Encoder:
    """With passages frozen, and other weights for questions than those of passages."""
    encoder = load_encoder(encoder_path, EncoderArguments(dtype="float32", **PREFIXES))
    encoder.freeze_passages()
    change_weights(encoder)
    return encoder


def embed_queries(encoder: Encoder, texts: list[str]) -> np.ndarray:
    return encoder.embed(encoder.tokenize_queries(texts))


def embed_passages(encoder: Encoder, texts: list[str]) -> np.ndarray:
    return encoder.passage_side.embed(encoder.tokenize_passages(texts))


@pytest.mark.parametrize(
    "words",
    ["mean unit", "cls free prefixes", "cls unit projected", "mean free prefixes projected",
     "mean unit prefixes frozen", "cls free projected frozen"],
)  # fmt: skip
def test_a_saved_encoder_embeds_alike_here_and_in_sentence_transformers(
    words: str, encoder_path: str, tmp_path: Path, passages: list[str]
) -> None:
    settings = {"pooling_type": words.partition(" ")[0], "normalize": "unit" in words}
    settings |= PREFIXES if "prefixes" in words else {}
    ours = load_encoder(encoder_path, EncoderArguments(dtype="float32", **settings))
    if "projected" in words:
        ours.project(D)
        for parameter in ours.projection.parameters():
            torch.nn.init.normal_(parameter)
    if "frozen" in words:
        ours.freeze_passages()
        change_weights(ours)
        assert np.abs(embed_passages(ours, passages) - ours.embed(ours.tokenize_passages(passages))).max() > 1e-2
    ours.save_pretrained(tmp_path)
    again, theirs = load_encoder(str(tmp_path)), SentenceTransformer(str(tmp_path), device="cpu")
    assert again.settings == ours.settings
    assert again.fingerprint() == ours.fingerprint()
    sides = (QUERIES, embed_queries, theirs.encode_query), (passages, embed_passages, theirs.encode_document)
    for texts, embed, encode in sides:
        found = embed(ours, texts)
        assert found.shape == (len(texts), D if "projected" in words else 32)
        assert found.dtype == np.float32
        np.testing.assert_array_equal(embed(again, texts), found)
        np.testing.assert_allclose(encode(texts), found, atol=1e-5)
    if "prefixes" in words and "frozen" not in words:
        assert np.abs(theirs.encode(QUERIES) - embed_queries(ours, QUERIES)).max() > 1e-3


GROUPED = {"num_key_value_heads": 2, "head_dim": 8}
WINDOWED = GROUPED | {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}
KINDS: dict[str, tuple[str, dict[str, Any], bool]] = {  # model, how it is configured, whether it is packed
    "Qwen3": ("Qwen3", GROUPED, True), "Llama": ("Llama", GROUPED, True),
    "Mistral": ("Mistral", {"num_key_value_heads": 2, "sliding_window": 5}, True),
    "Gemma 3": ("Gemma3Text", WINDOWED, True),
    "EmbeddingGemma": ("Gemma3Text", WINDOWED | {"use_bidirectional_attention": True}, True),
    "BERT": ("Bert", {}, True),
    "ModernBERT": ("ModernBert", {"local_attention": 8, "cls_token_id": 2, "sep_token_id": 3}, True),
    "XLM-R": ("XLMRoberta", {"max_position_embeddings": 70, "pad_token_id": 1}, True),
    "MPNet": ("MPNet", {"max_position_embeddings": 70, "pad_token_id": 1}, False),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_models_of_every_kind_that_sentence_transformers_saves_embed_alike_here_and_what_is_saved_here_does_there(
    kind: str, encoder_path: str, t5_path: str, passages: list[str], saved: Any, tmp_path: Path
) -> None:
    name, options, packed = KINDS[kind]
    decodes = "num_key_value_heads" in options
    tokenizer = AutoTokenizer.from_pretrained(
        t5_path if decodes else encoder_path
    )  # one ends a text, one begins it, too
    sizes = SMALL | {"vocab_size": len(tokenizer), "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3} | options
    config = getattr(transformers, f"{name}Config")(**sizes)
    path = saved("plain", 0, getattr(transformers, f"{name}Model"), config, tokenizer)
    torch.manual_seed(1)
    layers = [Dense(32, 48, bias=False, activation_function=torch.nn.Identity()), LayerNorm(48), Dense(48, 24)]
    path = lay_out(tmp_path / "theirs", path, Pooling(32, "lasttoken" if decodes else "mean"), *layers, Normalize(),
                   general={"prompts": {"query": "Instruct: rank\nQuery:"}})  # fmt: skip
    theirs = SentenceTransformer(path, device="cpu")
    expected = [theirs.encode_query(QUERIES), theirs.encode_document(passages)]
    for again in (tmp_path / "ours", tmp_path / "last"):
        ours = load_encoder(path)
        assert (ours.collate is pack) == packed
        assert all(row[-1] == 3 for row in ours.tokenize_passages(passages))  # its end, also where the text is cut
        found = [embed_queries(ours, QUERIES), embed_passages(ours, passages)]
        for ours_, theirs_ in zip(found, expected, strict=True):
            np.testing.assert_allclose(ours_, theirs_, atol=1e-5)
        ours.save_pretrained(again)
        path, theirs = str(again), SentenceTransformer(str(again), device="cpu")
        np.testing.assert_allclose(theirs.encode_document(passages), expected[1], atol=1e-5)


def lay_out(path: Path, encoder_path: str, *modules: torch.nn.Module, **settings: dict[str, Any]) -> str:
    """Save with sentence-transformers, then change settings in its files; one that is None is taken out."""
    modules = modules or (Pooling(32),)
    SentenceTransformer(modules=[Transformer(encoder_path), *modules], device="cpu").save_pretrained(str(path))
    for name, values in settings.items():
        file = path / FILES.get(name, f"{name}.json")
        old = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps({key: v for key, v in (old | values).items() if v is not None}))
    return str(path)


FILES = {"general": "config_sentence_transformers.json", "reading": "sentence_bert_config.json",
         "pooling": "1_Pooling/config.json", "2_Dense": "2_Dense/config.json", "own": "rqa_encoder.json"}  # fmt: skip
POOLINGS = ("mean", "cls", "lasttoken", "max", "weightedmean")
OLD = {"pooling_mode": None, "pooling_mode_mean_tokens": False}
LAYOUTS: list[tuple[str, dict[str, Any]]] = [
    ("", {}), ("unit", {}), ("", {"general": {"similarity_fn_name": None}}),
    *((words, {"general": {"similarity_fn_name": "dot"}}) for words in ("", "unit")),
    *(("", {"general": {"prompts": prompts, "default_prompt_name": name}})
      for prompts, name in (({"query": "query: "}, "query"), ({"document": "passage: "}, None), ({"a": "a: "}, "a"),
                            ({"query": "query: ", "document": "", "passage": "passage: "}, None))),
    *(("", {"pooling": mode}) for mode in (*({"pooling_mode": mode} for mode in (*POOLINGS, ["cls"])), OLD, *(
        OLD | {f"pooling_mode_{mode}": True} for mode in ("cls_token", "weightedmean_tokens", "lasttoken")))),
    *(("", {"pooling": {"pooling_mode": mode, "include_prompt": False},
            "general": {"prompts": {"query": "What does it ", "document": "The harbour of A"}}}) for mode in POOLINGS),
    *((words, {"general": {"similarity_fn_name": similarity, "truncate_dim": size}})
      for words, similarity in itertools.product(("", "unit", "layers unit"), ("cosine", "dot")) for size in (5, 99)),
    ("layers", {}), ("layers", {"2_Dense": {"activation_function": None}}),
    ("", {"reading": {"max_seq_length": 9}}), ("", {"tokenizer_config": {"model_max_length": 9}}),
    ("", {"reading": {"max_seq_length": 40}, "tokenizer_config": {"model_max_length": 9}}),
    ("", {"reading": {"query_length": 5, "document_length": 40}, "tokenizer_config": {"model_max_length": 9}}),
    ("", {"reading": dict.fromkeys(("transformer_task", "modality_config", "module_output_name")),
          "sentence_roberta_config": {"max_seq_length": 11}}),
    *(("cased", {"reading": {"do_lower_case": lower}}) for lower in (True, False)),
]  # fmt: skip


@pytest.mark.parametrize(("words", "settings"), LAYOUTS, ids=str)
def test_a_checkpoint_of_sentence_transformers_scores_passages_as_its_own_similarity_does(
    words: str, settings: dict[str, Any], encoder_path: str, tmp_path: Path, passages: list[str]
) -> None:
    layers = [Dense(32, 6), LayerNorm(6), Normalize(), Dense(6, 7, False, torch.nn.GELU())] if "layers" in words else []
    path = lay_out(tmp_path, encoder_path, Pooling(32), *layers, *[Normalize()] * ("unit" in words), **settings)
    if words == "cased":
        file = tmp_path / "tokenizer.json"
        file.write_text(file.read_text().replace('"lowercase": true', '"lowercase": false'))
    theirs = SentenceTransformer(path, device="cpu")
    expected = theirs.similarity(theirs.encode_query(QUERIES), theirs.encode_document(passages)).numpy()
    for _ in range(2):  # what is saved here means the same, here and there
        ours = load_encoder(path)
        found = embed_queries(ours, QUERIES) @ embed_passages(ours, passages).T
        np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())
        ours.save_pretrained(path := str(tmp_path / "again"))


REFUSED: list[tuple[str, dict[str, Any], str, dict[str, Any]]] = [  # what is refused, and flags that replace it
    *(("general", {"similarity_fn_name": name}, f"similarity_fn_name {name}", {"normalize": True})
      for name in ("euclidean", "manhattan")),
    *(("general", {"truncate_dim": size}, "truncate_dim must be", {}) for size in (-1, "9")),
    ("general", {"prompts": {"query": 3}}, "query must be a string, found 3", {}),
    ("general", {"prompts": ["q: "]}, "prompts must be an object", {}),
    ("pooling", {"include_prompt": 0}, "include_prompt must be true or false", {}),
    ("pooling", OLD | {"pooling_mode_mean_tokens": "false"}, "mean_tokens must be true or false, found 'false'", {}),
    ("pooling", OLD | {"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": True},
     r"pooling mean\+max is not supported; choose --pooling_type", {"pooling_type": "mean"}),
    *(("pooling", {"pooling_mode": mode}, f"pooling {mode} is not", {"pooling_type": "cls"})
      for mode in ("none", "mean_sqrt_len_tokens")),
    ("reading", {"max_seq_length": "64"}, "max_seq_length must be a whole number", {}),
    ("reading", {"transformer_task": "fill-mask"}, "transformer_task fill-mask is not", {}),
    ("reading", {"max_seq_length": -1}, "at least 3.*found -1", {}),
    ("reading", {"modality_config": {"message": {}}}, "modality_config message .* is not", {}),
    ("reading", {"processing_kwargs": {"text": {}}}, "processing_kwargs .* is not", {}),
    *(("2_Dense", {name: value}, message, {}) for name, value, message in (
        ("use_residual", True, "use_residual True is not"), ("in_features", 31, "in_features 31: must be 32"),
        ("module_input_name", "token_embeddings", "module_input_name token_embeddings is not"),
        ("activation_function", "os.abort", "activation_function os.abort is not"))),
    ("own", {"pooling_type": "none"}, "pooling none is not", {"pooling_type": "cls"}),
    *(("own", {name: value}, f"{name} must be", {})
      for name, value in (("normalize", "false"), ("normalize", 0), ("max_query_length", 32.0), ("query_prefix", ["q"]),
                          ("max_passage_length", -5), ("two_encoders", "no"), ("projection", True))),
]  # fmt: skip


@pytest.mark.parametrize(("file", "settings", "message", "flags"), REFUSED, ids=str)
def test_a_setting_that_is_not_offered_or_of_another_type_is_refused_by_file_unless_a_flag_replaces_it(
    file: str, settings: dict[str, Any], message: str, flags: dict[str, Any], encoder_path: str, tmp_path: Path
) -> None:
    layers = [Dense(32, 6)] if file == "2_Dense" else []
    path = lay_out(tmp_path, encoder_path, Pooling(32), *layers, **{file: settings})
    with pytest.raises(UserError, match=f"{FILES[file]}: .*{message}"):
        load_encoder(path)
    if flags:
        settled = load_encoder(path, EncoderArguments(dtype="float32", **flags)).settings
        assert vars(settled).items() >= flags.items()


def test_damaged_settings_and_modules_that_are_not_offered_or_in_another_order_are_refused_by_file(
    encoder_path: str, tmp_path: Path
) -> None:
    path = lay_out(tmp_path, encoder_path, Pooling(32), Dense(32, 6))
    names = ("modules.json", *FILES.values())
    modules = json.loads((tmp_path / "modules.json").read_text())
    dense = json.loads(json.dumps(modules).replace(".Pooling", ".Dense"))
    elsewhere = [[modules[0], modules[1] | {"path": path}] for path in (None, "../1_Pooling")]
    wrong = [modules[::-1], modules[:1], modules * 2, dense, [3], [{"type": 3}], *elsewhere]
    for name, bad in itertools.product(names, ("{", "3", "\0", *map(json.dumps, wrong))):
        good = (tmp_path / name).read_text() if (tmp_path / name).exists() else "{}"
        (tmp_path / name).write_text(bad)
        with pytest.raises(UserError, match=name):
            load_encoder(path)
        (tmp_path / name).write_text(good)
    load_encoder(path)
    (tmp_path / "1_Pooling/config.json").unlink()
    with pytest.raises(UserError, match=r"1_Pooling/config\.json: is missing"):
        load_encoder(path)


def test_no_passage_and_no_question_becomes_a_control_token_and_clean_text_keeps_its_tokens(
    encoder: Encoder, passages: list[str]
) -> None:
    known, encoder.settings = encoder.tokenizer, EncoderSettings(query_prefix="[PAD] ")
    assert encoder.tokenize_passages(passages) == known(passages, truncation=True, max_length=512)["input_ids"]
    for tokenize, own in ((encoder.tokenize_passages, []), (encoder.tokenize_queries, [known.pad_token_id])):
        (row,) = tokenize([f"a{' b'.join(known.all_special_tokens)}"])
        control = [known.cls_token_id, *own, known.sep_token_id]
        assert [token for token in row if token in {*known.all_special_ids} - {known.unk_token_id}] == control


def test_texts_that_are_cut_are_told_with_counts_and_again_when_ten_times_as_many_were_seen(
    encoder: Encoder, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rqa.models.encoder.ENCODINGS_AT_ONCE", 2)
    encoder.settings = replace(encoder.settings, max_passage_length=6)
    encoder.tokenize_passages(["a b c d"])  # [CLS] and [SEP] beside them
    encoder.tokenize_queries(["a b c d e"])
    assert not caplog.messages
    for _ in range(20):
        encoder.tokenize_passages(["a b c d e", "a b c d", "a " * 99])
    first, second = caplog.messages
    assert first.startswith("2 of the first 4 texts are longer than --max_passage_length 6")
    assert second.startswith("26 of the first 40 texts")


def test_threads_take_turns_with_a_tokenizer_whose_truncation_is_a_state(
    encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread makes batches while another one evaluates."""
    encoder.settings = replace(encoder.settings, max_query_length=5)
    cut = encoder.tokenizer.set_truncation_and_padding
    monkeypatch.setattr(encoder.tokenizer, "set_truncation_and_padding", lambda **how: (cut(**how), time.sleep(0.01)))
    with ThreadPoolExecutor(2) as threads:
        asks = [encoder.tokenize_queries, encoder.tokenize_passages] * 8
        assert [len(row) for (row,) in threads.map(lambda ask: ask(["a b c d e f g"]), asks)] == [5, 9] * 8


def test_flags_override_the_checkpoint(encoder: Encoder, encoder_path: str, tmp_path: Path) -> None:
    assert encoder.settings == EncoderSettings("mean", True, "", "", 64, 64)
    names = list(EncoderSettings.__dataclass_fields__)[:6]
    saved, given = ("cls", False, "q ", "p ", 20, 30), ("mean", True, "", "", 21, 31)
    load_encoder(
        encoder_path, EncoderArguments(dtype="float32", **dict(zip(names, saved, strict=True)))
    ).save_pretrained(tmp_path)
    assert load_encoder(str(tmp_path)).settings == EncoderSettings(*saved)
    flags = EncoderArguments(dtype="float32", **dict(zip(names, given, strict=True)))
    assert load_encoder(str(tmp_path), flags).settings == EncoderSettings(*given)
    with pytest.raises(UserError, match=r"--max_query_length 65: .* takes at most 64 tokens"):
        load_encoder(encoder_path, EncoderArguments(dtype="float32", max_query_length=65))
    assert load_encoder(encoder_path, EncoderArguments(max_batch_tokens=7)).max_batch_tokens == 7


def test_a_saved_length_above_512_is_kept_where_the_model_reads_it(
    wordpiece: PreTrainedTokenizerBase, saved: Any, tmp_path: Path
) -> None:
    tokenizer = copy.deepcopy(wordpiece)
    tokenizer.model_max_length = 1024
    config = BertConfig(vocab_size=len(tokenizer), **SMALL, max_position_embeddings=1024)
    plain = saved("long", 0, BertModel, config, tokenizer)
    encoder = load_encoder(plain, EncoderArguments(dtype="float32", max_passage_length=700))
    assert (encoder.settings.max_query_length, encoder.settings.max_passage_length) == (512, 700)
    encoder.save_pretrained(tmp_path)
    assert load_encoder(str(tmp_path)).settings == encoder.settings


@pytest.mark.parametrize("padded", [False, True])
def test_neither_the_order_nor_the_size_of_batches_matters_and_none_is_larger_than_allowed(
    padded: bool, encoder: Encoder, passages: list[str]
) -> None:
    expected, sizes = embed_passages(encoder, passages), []
    encoder.collate = pad if padded else pack
    encoder.register_forward_pre_hook(lambda _, args: sizes.append(args[0].inputs["input_ids"].numel()))
    for budget in (1, 64, 150, 16384):
        order = random.Random(budget).sample(range(len(passages)), len(passages))
        sizes.clear()
        encoder.max_batch_tokens = budget
        shuffled = embed_passages(encoder, [passages[i] for i in order])
        np.testing.assert_allclose(shuffled, expected[order], atol=1e-6)
        assert max(sizes) <= max(budget, 64)
        assert (len(sizes) > 1) == (budget < 16384)
    assert embed_queries(encoder, []).shape == (0, encoder.dimension) == (0, 32)


@pytest.mark.parametrize("training", [True, False])
def test_embedding_has_no_dropout_and_no_gradient_and_restores_the_mode(
    training: bool, encoder: Encoder, passages: list[str]
) -> None:
    assert encoder.backbone.config.hidden_dropout_prob > 0
    expected = embed_passages(encoder.eval(), passages)
    encoder.train(training)
    np.testing.assert_array_equal(embed_passages(encoder, passages), expected)
    assert all(module.training == training for module in encoder.modules())
    direct = encoder(encoder.collate(encoder.tokenize_passages(passages)))
    assert (np.abs(direct.detach().numpy() - expected).max() > 1e-2) == training
    assert all(parameter.grad is None for parameter in encoder.parameters())
    direct[:, 0].sum().backward()  # embedding gives no gradient, forward does
    assert encoder.backbone.embeddings.word_embeddings.weight.grad.abs().sum() > 1e-3


def test_a_projection_is_made_once_and_a_missing_one_is_named(encoder: Encoder, tmp_path: Path) -> None:
    encoder.project(D)
    kept = encoder.projection
    encoder.project(D)
    assert encoder.projection is kept
    with pytest.raises(UserError, match="--indexing_dimension 8: the model's projection has 12 dimensions"):
        encoder.project(8)
    encoder.save_pretrained(tmp_path / "saved")
    (tmp_path / "saved/2_Dense/model.safetensors").unlink()
    with pytest.raises(UserError, match=r"saved/2_Dense/config.json: the layer cannot be loaded"):
        load_encoder(str(tmp_path / "saved"))
    file = tmp_path / "saved/2_Dense/config.json"
    file.write_text(file.read_text().replace(str(D), "9" * 12))
    with pytest.raises(UserError, match=r"saved/2_Dense/config.json: the layer cannot be loaded"):
        load_encoder(str(tmp_path / "saved"))
    encoder.freeze_passages()
    with pytest.raises(UserError, match="--projection true: cannot change a separate passage encoder"):
        encoder.project(D)


def test_passages_keep_the_initial_encoder_whose_folder_is_one_by_itself_and_is_not_loaded_when_another_run_left_it(
    frozen: Encoder, encoder_path: str, passages: list[str], tmp_path: Path
) -> None:
    initial = load_encoder(encoder_path, EncoderArguments(dtype="float32", **PREFIXES))
    np.testing.assert_array_equal(embed_passages(frozen, passages), embed_passages(initial, passages))
    kept = frozen.passage_encoder
    frozen.freeze_passages()  # once frozen, for ever
    assert frozen.passage_encoder is kept
    frozen.save_pretrained(tmp_path)
    alone = load_encoder(str(tmp_path / "passage_encoder"))
    assert not alone.passage_encoder
    assert alone.settings == frozen.settings
    np.testing.assert_array_equal(embed_queries(alone, passages), embed_queries(initial, passages))
    initial.save_pretrained(tmp_path)
    assert (tmp_path / "passage_encoder").is_dir()
    assert load_encoder(str(tmp_path)).passage_encoder is None
    assert SentenceTransformer(str(tmp_path), device="cpu").encode(["What?"]).shape == (1, 32)


def test_a_frozen_passage_encoder_has_neither_gradient_nor_dropout_in_any_mode(frozen: Encoder) -> None:
    """That it stays what it was through a run: test_retriever_training.py."""
    frozen.train()
    assert all(module.training for module in frozen.backbone.modules())
    assert not any(module.training for module in frozen.passage_side.modules())
    assert {name.partition(".")[0] for name, p in frozen.named_parameters() if p.requires_grad} == {"backbone"}
    frozen.eval()
    frozen.embed(frozen.tokenize_queries(QUERIES[:3]))
    assert not frozen.passage_side.training


def test_the_fingerprint_is_the_same_for_the_same_embeddings_and_changes_with_every_setting_weight_and_the_tokenizer(
    encoder: Encoder, encoder_path: str
) -> None:
    assert load_encoder(encoder_path).fingerprint() == load_encoder(encoder_path).fingerprint()
    encoder.project(D)
    before, found, settings = encoder.fingerprint(), [], encoder.settings
    embed_passages(encoder.train(), ["some text"])
    encoder.tokenizer(["padded", "to one length"], padding=True, truncation=True, max_length=5)
    assert encoder.fingerprint() == before
    for name, value in vars(settings).items():
        others = {"pooling_type": "cls", "normalize": False, "include_prompt": False}
        other = others.get(name, value + 1 if isinstance(value, int) else "x")
        encoder.settings = replace(settings, **{name: other})
        found.append(encoder.fingerprint())
    encoder.settings = settings
    for parameter in encoder.parameters():
        old = parameter.data.flatten()[-1].item()
        parameter.data.view(-1)[-1] += 0.1
        found.append(encoder.fingerprint())
        parameter.data.view(-1)[-1] = old
    assert encoder.fingerprint() == before
    encoder.freeze_passages()
    next(encoder.passage_encoder.parameters()).data[0, 0] += 1
    found.append(encoder.fingerprint())
    encoder.passage_encoder, encoder.tokenizer = None, AutoTokenizer.from_pretrained(encoder_path)
    assert encoder.fingerprint() == before
    encoder.tokenizer.add_tokens(["harbour of"])
    found.append(encoder.fingerprint())
    assert len({before, *found}) == 1 + len(found)


def test_an_instruction_becomes_the_text_before_a_question_in_the_checkpoint_s_own_form(
    encoder_path: str, tmp_path: Path
) -> None:
    path = lay_out(tmp_path, encoder_path, general={"prompts": {"query": "Instruct: a task\nof Qwen3\nQuery:"}})
    for at, asked, prefix in (
        (encoder_path, "find it", "Instruct: find it\nQuery: "), (path, "find it", "Instruct: find it\nQuery:"),
        (path, r"Find:\n{query}", "Find:\n"), (path, None, "Instruct: a task\nof Qwen3\nQuery:"),
    ):  # fmt: skip
        encoder = load_encoder(at, EncoderArguments(dtype="float32", query_instruction=asked))
        assert encoder.settings == EncoderSettings("mean", True, prefix, "", 64, 64)
    with pytest.raises(UserError, match=r"--truncate_dim 33: the embeddings of .* have 32 dimensions"):
        load_encoder(path, EncoderArguments(dtype="float32", truncate_dim=33))


def test_a_passage_prompt_without_that_of_documents_is_used_and_told(
    encoder_path: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = lay_out(tmp_path, encoder_path, general={"prompts": {"corpus": "c: ", "passage": "p: "}})
    assert load_encoder(path).settings.passage_prefix == "p: "
    assert "passages begin with the prompt 'p: ', which sentence-transformers" in caplog.text
    caplog.clear()
    assert load_encoder(path, EncoderArguments(dtype="float32", passage_prefix="")).settings.passage_prefix == ""
    assert not caplog.messages
