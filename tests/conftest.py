"""A corpus of a few passages, models with a few thousand random weights, and executables run in this process."""

import copy
import json
import logging
import os
import runpy
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import torch
import pytest
import transformers
from hypothesis import HealthCheck, Phase, settings
from openai_server import OpenAIServer, serve
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from trainers import Flags, Run, Train, scores
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from rqa.data import Document, Example, write_examples
from rqa.documents import write_documents
from rqa.models.encoder import Encoder, load_encoder

CITIES = ("Arlen", "Brask", "Corvo", "Dunmore", "Elbeth", "Farrow", "Gildern", "Hask", "Istra", "Jorvik", "Kessel",
          "Lund")  # fmt: skip
TRADES = ("copper", "wool", "amber", "salt", "timber", "glass", "honey", "paper", "silver", "grain", "silk", "pepper")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# The files that take longest, longest first: with `--dist loadfile` no worker is left with one of them at the end.
LONGEST = ["test_processes", "test_retriever_training", "test_rounds", "test_executables", "test_quickstart",
           "test_distilled_training", "test_architecture"]  # fmt: skip

settings.register_profile(
    "default", max_examples=25, deadline=10_000, derandomize=True, database=None, phases=[Phase.generate, Phase.shrink],
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
settings.register_profile("thorough", settings.get_profile("default"), max_examples=1000)
settings.load_profile("default")  # `pytest --hypothesis-profile thorough` takes its time


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


@pytest.fixture(autouse=True, scope="session")
def _offline(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ |= {"HF_HUB_OFFLINE": "1", "RQA_CACHE": str(tmp_path_factory.mktemp("cache"))}
    os.environ["OMP_NUM_THREADS"] = "1"  # tiny matrices gain nothing from more, and other processes lose
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it, and so its children


@pytest.fixture(autouse=True)
def _fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same seed, a cache of its own, and log lines, which an executable keeps to itself."""
    torch.manual_seed(0)
    monkeypatch.setenv("RQA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(logging.getLogger("rqa"), "propagate", True)


@pytest.fixture
def run_line(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Run an executable of bin/ in this process on a command line; its exit status."""
    logger = logging.getLogger("rqa")
    for name in ("handlers", "level", "propagate"):  # an executable sets them, and the next test is no executable
        monkeypatch.setattr(logger, name, getattr(logger, name))
    monkeypatch.setattr("rqa.evaluation.report.line_chart", lambda *_: "<svg/>")  # half the time of a small run

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
def run_executable(run_line: Callable[..., int]) -> Run:
    """The same, flags by name."""

    def run(name: str, flags: dict[str, object]) -> int:
        values = {flag: value if isinstance(value, list) else [value] for flag, value in flags.items()}
        return run_line(name, *(part for flag, parts in values.items() for part in (f"--{flag}", *parts)))

    return run


@pytest.fixture
def refused(run_line: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> Callable[..., None]:
    """An executable ends with status 2 and one line of error, which holds a message."""

    def run(message: str, name: str, *line: object) -> None:
        assert run_line(name, *line) == 2
        (error,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
        assert message in error

    return run


@pytest.fixture
def trainer_flags(files: dict[str, Path], lm_path: str, encoder_path: str, t5_path: str, tmp_path: Path) -> Flags:
    """Flags for four small steps of a trainer, and others by name; None leaves one out."""
    common = {**files, "output_dir": tmp_path / "out", "max_steps": 4, "logging_steps": 1}
    retriever = common | {"model_name_or_path": encoder_path, "per_device_train_batch_size": 4}
    judge = {"lm_model_path": lm_path, "num_docs": 4, "text_maxlength": 256, "refresh_step": 2}
    reader = common | {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 2}
    decoder = reader | {"model_name_or_path": lm_path, "max_new_tokens": 8, "max_seq_length": 256}
    fid = reader | {"max_encoder_seq_length": 64, "max_decoder_seq_length": 16}
    flags = {
        "train_sft": decoder,
        "train_swr": decoder | {"embedding_model": encoder_path},
        "train_fid": fid | {"model_name_or_path": f"bert::{encoder_path}", "embedding_model": encoder_path},
        "train_ctl": retriever,
        "train_dca": retriever | {"reader_model_path": t5_path, "n_context": 4, "max_encoder_seq_length": 64},
        "train_rpg": retriever | judge,
        "train_emdr": retriever | judge,
        "train_rerank": retriever | {"num_hard_negatives": 4},
    }
    return lambda name, **own: {flag: value for flag, value in (flags[name] | own).items() if value is not None}


@pytest.fixture
def train(trainer_flags: Flags, run_executable: Run) -> Train:
    """Run a trainer to its end on `trainer_flags`; its output directory."""

    def run(name: str, **own: object) -> Path:
        flags = trainer_flags(name, **own)
        assert run_executable(name, flags) == 0
        return Path(str(flags["output_dir"]))

    return run


@pytest.fixture
def evaluate(run_executable: Run, files: dict[str, Path], tmp_path: Path) -> Callable[..., dict[str, float]]:
    """Run `evaluate_rqa` on a reader and the test file; its scores."""

    def run(reader: Path, **own: object) -> dict[str, float]:
        named = {"document_path": files["full_dataset_file_path"], "eval_data_path": files["test_file"]}
        output = {"qa_model_name_or_path": reader, "output_dir": tmp_path / "evaluated"}
        assert run_executable("evaluate_rqa", named | output | own) == 0
        return scores(tmp_path / "evaluated")

    return run


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[OpenAIServer]:
    """An OpenAI-compatible server on loopback that is asked again without delay."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    monkeypatch.setattr("rqa.endpoint.client.PAUSE", 0.01)
    with serve() as ours:
        yield ours


@pytest.fixture(scope="session")
def documents() -> list[Document]:
    """Two passages a city: what it trades, and who founded it."""
    texts = []
    for number, (city, trade) in enumerate(zip(CITIES, TRADES, strict=True)):
        texts += [
            (city, f"The harbour of {city} is known for its trade in {trade}, sold on the market each spring."),
            (city, f"{city} was founded in the year {1100 + 7 * number} by settlers from {CITIES[number - 1]}."),
        ]
    return [Document(text, {"source": f"guide/{i}", "title": city}) for i, (city, text) in enumerate(texts)]


@pytest.fixture(scope="session")
def examples(documents: list[Document]) -> list[Example]:
    """One question a passage."""
    asked = []
    for number, (city, trade) in enumerate(zip(CITIES, TRADES, strict=True)):
        trades, founded = documents[2 * number : 2 * number + 2]
        asked.append(Example(f"What does {city} trade in?", (trades,), f"{city} trades in {trade}."))
        asked.append(Example(f"When was {city} founded?", (founded,), f"In the year {1100 + 7 * number}."))
    return asked


@pytest.fixture(scope="session")
def tokenizer(documents: list[Document], examples: list[Example]) -> PreTrainedTokenizerBase:
    """A byte-level BPE tokenizer with a chat template."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special, letters = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special, initial_alphabet=letters, show_progress=False)
    core.train_from_iterator(_texts(documents, examples), trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    fast.chat_template = CHAT_TEMPLATE
    return fast


@pytest.fixture(scope="session")
def wordpiece(documents: list[Document], examples: list[Example]) -> PreTrainedTokenizerBase:
    """A BERT-like tokenizer: [CLS] text [SEP]."""
    core = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    core.normalizer = normalizers.BertNormalizer()
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    texts = map(core.normalizer.normalize_str, _texts(documents, examples))
    words = Counter(word for text in texts for word, _ in core.pre_tokenizer.pre_tokenize_str(text))
    letters = sorted({*ascii_lowercase, *"".join(words)})
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    often = sorted(word for word, count in words.items() if count > 1 and len(word) > 1)
    pieces = [*special, *letters, *(f"##{letter}" for letter in letters), *often]  # WordPieceTrainer draws lots
    core.model = models.WordPiece({piece: number for number, piece in enumerate(pieces)}, unk_token="[UNK]")
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {f"{name.strip('[]').lower()}_token": name for name in special}
    return PreTrainedTokenizerFast(tokenizer_object=core, model_max_length=64, **names)


SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Save a model with random weights, and its tokenizer."""

    def save(name: str, seed: int, kind: type[PreTrainedModel], config: Any, tokenizer: Any) -> str:
        torch.manual_seed(seed)
        path = tmp_path_factory.mktemp(name)
        kind(config).save_pretrained(path)
        tokenizer.save_pretrained(path)
        return str(path)

    return save


@pytest.fixture(scope="session")
def lm_path(tokenizer: PreTrainedTokenizerBase, saved: Callable[..., str]) -> str:
    """A two-layer Llama with grouped queries, saved."""
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), **SMALL, num_key_value_heads=2, max_position_embeddings=512, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return saved("lm", 1, transformers.LlamaForCausalLM, config, tokenizer)


@pytest.fixture(scope="session")
def encoder_path(wordpiece: PreTrainedTokenizerBase, saved: Callable[..., str]) -> str:
    """A two-layer BERT, saved as a plain `transformers` checkpoint."""
    config = transformers.BertConfig(vocab_size=len(wordpiece), **SMALL, max_position_embeddings=64)
    return saved("encoder", 2, transformers.BertModel, config, wordpiece)


@pytest.fixture(scope="session")
def reranker_path(wordpiece: PreTrainedTokenizerBase, saved: Callable[..., str]) -> str:
    """A two-layer BERT with a head of one score, saved; its scores lie far apart."""
    config = transformers.BertConfig(
        vocab_size=len(wordpiece), **SMALL, max_position_embeddings=64, num_labels=1, initializer_range=0.3
    )
    return saved("reranker", 5, transformers.BertForSequenceClassification, config, wordpiece)


@pytest.fixture
def encoder(encoder_path: str) -> Encoder:
    """It, loaded: without dropout until it is trained."""
    return load_encoder(encoder_path)


@pytest.fixture(scope="session")
def t5_path(wordpiece: PreTrainedTokenizerBase, saved: Callable[..., str]) -> str:
    """A two-layer T5, whose tokenizer ends a text and does not begin it."""
    tokenizer = copy.deepcopy(wordpiece)
    ending = processors.TemplateProcessing(single="$A [SEP]", special_tokens=[("[SEP]", 3)])
    tokenizer.backend_tokenizer.post_processor = ending
    tokenizer.add_special_tokens({"eos_token": "[SEP]"})
    config = transformers.T5Config(
        vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4,
        feed_forward_proj="gated-gelu", pad_token_id=0, eos_token_id=3, decoder_start_token_id=0,
    )  # fmt: skip
    return saved("t5", 3, transformers.T5ForConditionalGeneration, config, tokenizer)


@pytest.fixture(scope="session")
def bart_path(wordpiece: PreTrainedTokenizerBase, saved: Callable[..., str]) -> str:
    """A two-layer BART, whose decoder starts from the end token."""
    tokenizer = copy.deepcopy(wordpiece)
    tokenizer.add_special_tokens({"eos_token": "[SEP]", "bos_token": "[CLS]"})
    config = transformers.BartConfig(
        vocab_size=len(tokenizer), d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=128,
        pad_token_id=0, bos_token_id=2, eos_token_id=3, decoder_start_token_id=3, forced_eos_token_id=None,
    )  # fmt: skip
    return saved("bart", 4, transformers.BartForConditionalGeneration, config, tokenizer)


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
