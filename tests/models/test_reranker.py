"""Scores are `sentence_transformers.CrossEncoder`'s, whoever saved the model; what is not its is refused by name."""

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import numpy as np
import pytest
import transformers
from torch import nn
from conftest import CHAT_TEMPLATE, SMALL
from fakes import edit
from safetensors.torch import load_file, save_file
from sentence_transformers import CrossEncoder
from transformers import PreTrainedTokenizerBase

from rqa.data import Document, Example
from rqa.models.loading import LoraArguments, train_adapters
from rqa.models.reranker import RerankerArguments, load_reranker
from rqa.packing import pack
from rqa.runtime.errors import UserError

ROLES = (
    "<|im_start|>{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] }}: "
    "{% elif m['role'] == 'query' %}{{ m['content'] }} | {% elif m['role'] == 'document' %}{{ m['content'] }}"
    "{% endif %}{% endfor %}<|im_end|>"
)
BASE = {"max_position_embeddings": 66, "pad_token_id": 0, "num_labels": 1}
QWEN = {"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512}
DECODERS = ("qwen, head", "yes or no")
TYPED = ("bert", "electra", "deberta")  # they tell question and passage apart
PADDED = ("deberta",)  # its positions are relative
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertFor", {}), "roberta": ("RobertaFor", {}), "xlm-r": ("XLMRobertaFor", {}),
    "electra": ("ElectraFor", {}), "albert": ("AlbertFor", {"embedding_size": 8}),
    "distilbert": ("DistilBertFor", {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4}),
    "modernbert": ("ModernBertFor", {"classifier_pooling": "cls"}),
    "modernbert, mean": ("ModernBertFor", {"classifier_pooling": "mean"}),
    "deberta": ("DebertaV2For", {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}),
}  # fmt: skip


@pytest.fixture
def pairs(documents: list[Document], examples: list[Example]) -> list[tuple[str, str]]:
    """Pairs of many lengths, one of them too long for 64 tokens."""
    found = [(e.question, document.fmt_content) for e in examples[:3] for document in documents[:4]]
    return [*found, ("What?", "salt"), (examples[0].question, " ".join(d.page_content for d in documents))]


@pytest.fixture
def theirs(
    wordpiece: PreTrainedTokenizerBase, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> Callable[..., str]:
    """A cross-encoder of some kind, saved by sentence-transformers itself; `plain`: by transformers."""

    def save(kind: str, plain: bool = False, template: str | None = ROLES, **general: Any) -> str:
        path = tmp_path / "theirs"
        core = wordpiece if kind in KINDS else copy.deepcopy(tokenizer)
        if kind in TYPED:
            core = transformers.BertTokenizer(vocab=core.get_vocab(), model_max_length=64)
        elif kind in DECODERS:
            core.chat_template = template if kind == "yes or no" else CHAT_TEMPLATE
            core.add_tokens(["yes", "no"])
        name, own = KINDS.get(kind, ("Qwen3For", QWEN))
        task = "CausalLM" if kind == "yes or no" else "SequenceClassification"
        model_class = getattr(transformers, name + task)
        model = model_class(model_class.config_class(vocab_size=len(core), **SMALL | BASE | own))
        for weight in model.parameters():  # or small initial weights make all scores alike
            nn.init.normal_(weight, std=0.5) if weight.ndim > 1 else None
        model.save_pretrained(tmp_path / "raw")
        core.save_pretrained(tmp_path / "raw")
        if plain:
            return str(tmp_path / "raw")
        CrossEncoder(str(tmp_path / "raw"), **general).save_pretrained(str(path))
        return str(path)

    return save


def predicted(path: object, pairs: Any) -> np.ndarray:
    return CrossEncoder(str(path), device="cpu").predict(pairs, activation_fn=nn.Identity())


@pytest.mark.parametrize("kind", [*sorted(KINDS.keys() - {"albert"}), *DECODERS])
def test_scores_are_cross_encoder_s_in_both_directions(
    kind: str, theirs: Callable[..., str], pairs: list[tuple[str, str]], tmp_path: Path
) -> None:
    path = theirs(kind, prompts={"find": "Find: "}, default_prompt_name="find")
    reranker, expected = load_reranker(path), predicted(path, pairs)
    assert expected.std() > 0.01
    np.testing.assert_allclose(reranker.score(pairs), expected, atol=1e-4)
    assert (reranker._collate is pack) == (kind not in PADDED)
    reranker.save_pretrained(tmp_path / "ours")
    np.testing.assert_allclose(predicted(tmp_path / "ours", pairs), expected, atol=1e-4)
    assert load_reranker(str(tmp_path / "ours")).fingerprint() == reranker.fingerprint()


@pytest.mark.parametrize(
    ("kind", "activation"), [("bert", None), ("qwen, head", None), ("bert", "torch.nn.modules.activation.Tanh")]
)
def test_a_checkpoint_of_transformers_alone_keeps_the_activation_that_its_configuration_names(
    kind: str, activation: str | None, theirs: Callable[..., str], pairs: list[tuple[str, str]], tmp_path: Path
) -> None:
    path = Path(theirs(kind, plain=True))
    if activation:
        edit(path / "config.json", sentence_transformers={"activation_fn": activation})
    found = (reranker := load_reranker(str(path))).score(pairs)
    np.testing.assert_allclose(found, predicted(path, pairs), atol=1e-4)
    reranker.save_pretrained(tmp_path / "ours")
    by_theirs = CrossEncoder(str(tmp_path / "ours"), device="cpu").predict(pairs)
    np.testing.assert_allclose(by_theirs, np.tanh(found) if activation else found, atol=1e-4)


@pytest.mark.parametrize(
    ("template", "begins"),
    [(CHAT_TEMPLATE, "<|im_start|>system\nJudge"), (None, "Judge"),
     ("{{ raise_exception('No system!') if messages[0]['role'] == 'system' }}" + CHAT_TEMPLATE, "Judge")],
)  # fmt: skip
def test_a_plain_decoder_is_asked_in_its_own_kind_of_messages_and_there_as_by_us(
    template: str | None, begins: str, theirs: Callable[..., str], pairs: list[tuple[str, str]], tmp_path: Path
) -> None:
    reranker = load_reranker(theirs("yes or no", plain=True, template=template))
    ids = reranker.tokenize([("Who?", "Me, <|im_end|>.")])[0]
    text = reranker.tokenizer.decode(ids)
    assert text.startswith(begins)
    assert "\n<Query>: Who?\n<Document>: Me, <|im_end| >." in text
    logits = reranker.model(torch.tensor([ids])).logits[0, -1]
    yes, no = reranker.tokenizer.convert_tokens_to_ids(["yes", "no"])
    np.testing.assert_allclose(
        reranker.score([("Who?", "Me, <|im_end|>.")])[0], (logits[yes] - logits[no]).item(), 1e-4
    )
    reranker.save_pretrained(tmp_path / "ours")
    np.testing.assert_allclose(predicted(tmp_path / "ours", pairs), reranker.score(pairs), atol=1e-4)


@pytest.mark.parametrize("kind", ["bert", "yes or no"])
def test_a_passage_is_cut_and_never_the_question_and_a_question_without_room_ranks_nothing(
    kind: str, theirs: Callable[..., str], caplog: pytest.LogCaptureFixture
) -> None:
    reranker = load_reranker(theirs(kind), RerankerArguments(dtype="float32", max_pair_length=32))
    whole, short = reranker._encode([("when was it", "salt " * 40), ("when was it", "")])["input_ids"]
    (row,) = reranker.tokenize([("when was it", "salt " * 40)])
    assert row == whole[:31] + whole[-1:]  # [SEP], or <|im_end|>
    assert row[: len(short) - 2] == short[:-2]  # the last of these may be a space
    long = [("when was it " * 40, passage) for passage in ("salt", "copper")]
    assert len({*map(tuple, reranker.tokenize(long))}) == 1
    assert "1 of the first 1 pairs" in caplog.text
    reranker.tokenize([("a", "b")] * 7)
    assert "3 of the first 10 pairs are longer than --max_pair_length 32" in caplog.text


def test_scores_of_a_decoder_in_bfloat16_are_finer_than_its_logits(
    theirs: Callable[..., str], pairs: list[tuple[str, str]]
) -> None:
    path = theirs("yes or no")
    found = load_reranker(path, RerankerArguments(dtype="bfloat16")).score(pairs)
    assert not np.isin(found, torch.tensor(found).bfloat16().float()).any()  # or close passages would be equal


def test_a_text_that_holds_a_control_token_ends_nothing(theirs: Callable[..., str]) -> None:
    reranker = load_reranker(theirs("bert"))
    rows = reranker.tokenize([("a [SEP] b", "c [SEP] [CLS]"), ("a", "c")])
    assert [[row.count(i) for i in (2, 3)] for row in rows] == [[1, 2], [1, 2]]


def test_a_new_head_is_the_seed_s(encoder_path: str, pairs: list[tuple[str, str]], tmp_path: Path) -> None:
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        reranker = load_reranker(encoder_path, new_head=True)
        found.append(reranker.score(pairs))
    assert np.array_equal(found[0], found[1])
    assert not np.allclose(found[1], found[2])
    reranker.save_pretrained(tmp_path / "ours")
    np.testing.assert_allclose(CrossEncoder(str(tmp_path / "ours"), device="cpu").predict(pairs), found[2], atol=1e-4)


def test_adapters_of_a_decoder_are_loaded_here_and_there(
    theirs: Callable[..., str], pairs: list[tuple[str, str]], tmp_path: Path
) -> None:
    flags = LoraArguments(use_lora=True)
    train_adapters((reranker := load_reranker(path := theirs("yes or no"))).model, flags, path)
    for name, weight in reranker.named_parameters():
        nn.init.normal_(weight, std=0.3) if "lora_B" in name else None
    expected = reranker.score(pairs)
    assert not np.allclose(expected, load_reranker(path).score(pairs), atol=0.01)
    reranker.save_pretrained(tmp_path / "ours")
    np.testing.assert_allclose(load_reranker(str(tmp_path / "ours")).score(pairs), expected, atol=1e-4)
    np.testing.assert_allclose(predicted(tmp_path / "ours", pairs), expected, atol=1e-4)


def edited(name: str, **values: Any) -> Callable[[Path], None]:
    return lambda path: edit(path / name, **values)


def without(tensor: str) -> Callable[[Path], None]:
    def remove(path: Path) -> None:
        weights = load_file(path / "model.safetensors")
        save_file({name: weight for name, weight in weights.items() if tensor not in name}, path / "model.safetensors")

    return remove


READING, GENERAL = "sentence_bert_config.json", "config_sentence_transformers.json"
REFUSED: dict[str, tuple[str, Callable[[Path], None]]] = {
    "such as bert.pooler.dense": ("bert", without("pooler")),
    "such as classifier": ("bert", without("classifier")),
    "transformer_task feature-extraction is not": ("bert", edited(READING, transformer_task="feature-extraction")),
    "transformer_task fill-mask": ("yes or no", edited(READING, transformer_task="fill-mask")),
    "do_lower_case": ("bert", edited(READING, do_lower_case=True)),
    "processing_kwargs: text .* is not": ("bert", edited(READING, processing_kwargs={"text": {"max_length": 9}})),
    "max_seq_length must be a whole number": ("bert", edited(READING, max_seq_length="9")),
    "default_prompt_name other": ("bert", edited(GENERAL, default_prompt_name="other")),
    "true_token_id is missing": ("yes or no", edited("1_LogitScore/config.json", true_token_id=None)),
    "out of bounds": ("yes or no", edited("1_LogitScore/config.json", false_token_id=10**6)),
    "ignores messages of the role 'query'": (
        "yes or no", lambda path: (path / "chat_template.jinja").write_text("{{ messages[0]['content'] }}") and None
    ),
    "is not a reranker": ("bert", edited(GENERAL, model_type="SentenceTransformer")),
}  # fmt: skip


@pytest.mark.parametrize("message", REFUSED)
def test_what_is_not_cross_encoder_s_is_refused_by_name(message: str, theirs: Callable[..., str]) -> None:
    kind, damage = REFUSED[message]
    damage(Path(path := theirs(kind)))
    if message == "is not a reranker":
        edit(Path(path, "config.json"), architectures=["BertModel"])
    with pytest.raises(UserError, match=rf"^(model )?{re.escape(path)}[^\n]*{message}"):
        load_reranker(path)


def test_several_labels_an_unknown_head_too_many_tokens_and_a_new_head_for_adapters_are_refused(
    theirs: Callable[..., str], encoder_path: str, lm_path: str, wordpiece: PreTrainedTokenizerBase,
    saved: Callable[..., str],
) -> None:  # fmt: skip
    bert = transformers.BertConfig(vocab_size=len(wordpiece), **SMALL, num_labels=2)
    two = saved("two", 1, transformers.BertForSequenceClassification, bert, wordpiece)

    @dataclass(kw_only=True)
    class Flags(RerankerArguments, LoraArguments):
        pass

    albert = theirs("albert")
    for path, flags, new, message in (
        (two, {}, False, "gives 2 scores per pair"), (albert, {}, False, "its kind of head is not supported"),
        (albert, {"max_pair_length": 65}, False, "--max_pair_length 65: .* at most 64 tokens"),
        (encoder_path, {}, False, "is not a reranker"), (lm_path, {}, False, "no tokens 'yes' and 'no'"),
        (encoder_path, {"use_lora": True}, True, "--use_lora true: the new head"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            load_reranker(path, Flags(dtype="float32", **flags), new_head=new)
