"""A corpus of a few passages, and models with a few thousand random weights."""

import copy
import json
import logging
import os
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from rqa.data import Document, Example, write_documents, write_examples

if TYPE_CHECKING:
    from openai_server import OpenAIServer

CITIES = (
    "Arlen",
    "Brask",
    "Corvo",
    "Dunmore",
    "Elbeth",
    "Farrow",
    "Gildern",
    "Hask",
    "Istra",
    "Jorvik",
    "Kessel",
    "Lund",
)
TRADES = ("copper", "wool", "amber", "salt", "timber", "glass", "honey", "paper", "silver", "grain", "silk", "pepper")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(autouse=True, scope="session")
def _offline(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(1)  # tiny matrices gain nothing from more, and threads of parallel processes get in the way
    os.environ["RQA_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def run_line(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Run an executable of bin/ in this process on a command line; its exit status."""
    logger = logging.getLogger("rqa")
    for name in ("handlers", "level", "propagate"):  # an executable sets them, and the next test is no executable
        monkeypatch.setattr(logger, name, getattr(logger, name))

    def run(name: str, *line: object) -> int:
        path = str(Path(__file__).parents[1] / "bin" / name)
        monkeypatch.setattr(sys, "argv", [path, *map(str, line)])
        try:
            runpy.run_path(path, run_name="__main__")
        except SystemExit as end:
            return int(end.code or 0)
        return 0

    return run


@pytest.fixture
def run_executable(run_line: Callable[..., int]) -> Callable[[str, dict[str, object]], int]:
    """The same, flags by name."""

    def run(name: str, flags: dict[str, object]) -> int:
        values = {flag: value if isinstance(value, list) else [value] for flag, value in flags.items()}
        return run_line(name, *(part for flag, parts in values.items() for part in (f"--{flag}", *parts)))

    return run


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator["OpenAIServer"]:
    """An OpenAI-compatible server on loopback that is asked again without delay; nothing is kept from another test."""
    from openai_server import serve

    monkeypatch.setenv("RQA_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    monkeypatch.setattr("rqa.endpoint.client.PAUSE", 0.01)
    monkeypatch.setattr(logging.getLogger("rqa"), "propagate", True)  # an executable turns it off
    with serve() as ours:
        yield ours


@pytest.fixture(scope="session")
def documents() -> list[Document]:
    """Two passages a city: what it trades, and who founded it."""
    texts = []
    for number, (city, trade) in enumerate(zip(CITIES, TRADES, strict=True)):
        texts.append(
            (city, f"The harbour of {city} is known for its trade in {trade}, sold on the market each spring.")
        )
        texts.append(
            (city, f"{city} was founded in the year {1100 + 7 * number} by settlers from {CITIES[number - 1]}.")
        )
    return [Document(text, {"source": f"guide/{i}", "title": city}) for i, (city, text) in enumerate(texts)]


@pytest.fixture(scope="session")
def examples(documents: list[Document]) -> list[Example]:
    """One question a passage."""
    asked = []
    for number, (city, trade) in enumerate(zip(CITIES, TRADES, strict=True)):
        gold = documents[2 * number : 2 * number + 2]
        asked.append(Example(f"What does {city} trade in?", (gold[0],), f"{city} trades in {trade}."))
        asked.append(Example(f"When was {city} founded?", (gold[1],), f"In the year {1100 + 7 * number}."))
    return asked


@pytest.fixture(scope="session")
def tokenizer(documents: list[Document], examples: list[Example]) -> PreTrainedTokenizerBase:
    """A byte-level BPE tokenizer with a chat template."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator(
        _texts(documents, examples),
        trainers.BpeTrainer(
            vocab_size=600,
            special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    fast.chat_template = CHAT_TEMPLATE
    return fast


@pytest.fixture(scope="session")
def wordpiece(documents: list[Document], examples: list[Example]) -> PreTrainedTokenizerBase:
    """A BERT-like tokenizer: [CLS] text [SEP]."""
    core = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    core.normalizer = normalizers.BertNormalizer()
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    core.train_from_iterator(
        _texts(documents, examples),
        trainers.WordPieceTrainer(vocab_size=400, special_tokens=special, show_progress=False),
    )
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=64,
    )


@pytest.fixture(scope="session")
def lm_path(tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A two-layer Llama with grouped queries, saved."""
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    path = tmp_path_factory.mktemp("lm")
    LlamaForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="session")
def encoder_path(wordpiece: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A two-layer BERT, saved as a plain `transformers` checkpoint."""
    torch.manual_seed(2)
    config = BertConfig(
        vocab_size=len(wordpiece),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
    )
    path = tmp_path_factory.mktemp("encoder")
    BertModel(config).save_pretrained(path)
    wordpiece.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="session")
def t5_path(wordpiece: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A two-layer T5, whose tokenizer ends a text and does not begin it."""
    torch.manual_seed(3)
    tokenizer = copy.deepcopy(wordpiece)
    ending = processors.TemplateProcessing(single="$A [SEP]", special_tokens=[("[SEP]", 3)])
    tokenizer.backend_tokenizer.post_processor = ending
    tokenizer.add_special_tokens({"eos_token": "[SEP]"})
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        pad_token_id=0,
        eos_token_id=3,
        decoder_start_token_id=0,
    )
    path = tmp_path_factory.mktemp("t5")
    T5ForConditionalGeneration(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="session")
def bart_path(wordpiece: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A two-layer BART, whose decoder starts from the end token."""
    torch.manual_seed(4)
    tokenizer = copy.deepcopy(wordpiece)
    tokenizer.add_special_tokens({"eos_token": "[SEP]", "bos_token": "[CLS]"})
    config = BartConfig(
        vocab_size=len(tokenizer),
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_position_embeddings=128,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
        decoder_start_token_id=3,
        forced_eos_token_id=None,
    )
    path = tmp_path_factory.mktemp("bart")
    BartForConditionalGeneration(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="session")
def data(documents: list[Document], examples: list[Example], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """documents.jsonl, and train, eval and test files of examples."""
    path = tmp_path_factory.mktemp("data")
    write_documents(path / "documents.jsonl", documents)
    for name, part in (("train", examples[:16]), ("eval", examples[16:20]), ("test", examples[20:])):
        write_examples(path / f"{name}_w_qa.jsonl", part)
    return path


@pytest.fixture
def files(data: Path) -> dict[str, Path]:
    """The flags of a trainer that name them."""
    splits = {f"{name}_file": data / f"{name}_w_qa.jsonl" for name in ("train", "eval", "test")}
    return {**splits, "full_dataset_file_path": data / "documents.jsonl"}


def _texts(documents: list[Document], examples: list[Example]) -> Iterator[str]:
    yield from (document.fmt_content for document in documents)
    yield from (f"{example.question} {example.gold_answer}" for example in examples)
    yield json.dumps("Use the passages to answer the question. USER: ASSISTANT:")
