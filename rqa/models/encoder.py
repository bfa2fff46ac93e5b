"""The retriever's encoder: backbone, pooling, normalisation, prefixes; sentence-transformers' layout on disk."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoModel, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file

from rqa.models.loading import (
    choose_collate,
    evaluating,
    hidden_states,
    load_model,
    load_tokenizer,
    model_fingerprint,
)
from rqa.packing import Collate, TokenBatch, pack, token_budget_batches
from rqa.runtime.errors import UserError
from rqa.runtime.files import fingerprint
from rqa.runtime.parallelize import in_step

POOLING_KEYS = {"mean": "pooling_mode_mean_tokens", "cls": "pooling_mode_cls_token"}
MAX_BATCH_TOKENS = 16384


@dataclass
class EncoderArguments:
    """How texts become vectors. What is not given is taken from the checkpoint."""

    pooling_type: str | None = field(
        default=None, metadata={"help": "By default the checkpoint's, else mean.", "choices": ["mean", "cls"]}
    )
    normalize: bool | None = field(
        default=None, metadata={"help": "L2-normalise embeddings; by default the checkpoint's, else true."}
    )
    query_prefix: str | None = field(default=None, metadata={"help": 'Text before a question, such as "query: ".'})
    passage_prefix: str | None = field(default=None, metadata={"help": 'Text before a passage, such as "passage: ".'})
    max_query_length: int | None = field(default=None, metadata={"help": "Tokens of a question."})
    max_passage_length: int | None = field(default=None, metadata={"help": "Tokens of a passage."})


@dataclass(frozen=True)
class EncoderSettings:
    """What, beside the weights, decides an embedding."""

    pooling_type: str = "mean"
    normalize: bool = True
    query_prefix: str = ""
    passage_prefix: str = ""
    max_query_length: int = 512
    max_passage_length: int = 512


class Encoder(nn.Module):
    """Token ids in, one embedding a sequence out; similarity is the inner product of embeddings."""

    def __init__(
        self, backbone: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: EncoderSettings
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.tokenizer = tokenizer
        self.settings = settings

    @cached_property
    def collate(self) -> Collate:
        """How batches are built; found out at the first use, when the model is where it will run."""
        return choose_collate(self.backbone, self.tokenizer.pad_token_id)

    @property
    def dimension(self) -> int:
        """D, the embedding's width."""
        return self.backbone.config.hidden_size

    def tokenize_queries(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of prefixed questions, special tokens included. [N] -> [N]"""
        return self._tokenize(texts, self.settings.query_prefix, self.settings.max_query_length)

    def tokenize_passages(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of prefixed passages, special tokens included. [N] -> [N]"""
        return self._tokenize(texts, self.settings.passage_prefix, self.settings.max_passage_length)

    def _tokenize(self, texts: Sequence[str], prefix: str, max_length: int) -> list[list[int]]:
        if not texts:
            return []
        return self.tokenizer([prefix + text for text in texts], truncation=True, max_length=max_length)["input_ids"]

    def forward(self, batch: TokenBatch) -> Tensor:
        """Embeddings of a batch, in float32. -> [B, D]"""
        hidden = hidden_states(self.backbone, batch)  # [rows, D]
        pooled = hidden[batch.starts].float() if self.settings.pooling_type == "cls" else _mean(hidden, batch)
        return nn.functional.normalize(pooled, dim=-1) if self.settings.normalize else pooled

    @torch.no_grad()
    def embed(
        self, sequences: Sequence[Sequence[int]], max_batch_tokens: int = MAX_BATCH_TOKENS, desc: str | None = None
    ) -> np.ndarray:
        """Embeddings without gradient, longest sequences first. [N] -> float32 [N, D]

        Args:
            sequences: Token ids, from `tokenize_queries` or `tokenize_passages`.
            max_batch_tokens: Tokens of one forward pass.
            desc: The progress bar's name; no bar without it.
        """
        embeddings = np.empty((len(sequences), self.dimension), dtype=np.float32)
        device = self.backbone.device
        with (
            evaluating(self),
            tqdm(total=len(sequences), desc=desc, unit="text", disable=desc is None, leave=False) as bar,
        ):
            lengths = [len(sequence) for sequence in sequences]
            batches = token_budget_batches(lengths, max_batch_tokens, padded=self.collate is not pack)
            for indices in in_step(self, batches, filler=[]):
                batch = self.collate([sequences[index] for index in indices] or [[0]]).to(device)
                embeddings[indices] = self(batch).cpu().numpy()
                bar.update(len(indices))
        return embeddings

    def fingerprint(self) -> str:
        """A hash of weights, tokenizer and settings: equal when every embedding would be."""
        settings = json.dumps(asdict(self.settings), sort_keys=True)
        return fingerprint(settings, model_fingerprint(self.backbone, self.tokenizer))

    def save_pretrained(self, directory: str | Path) -> None:
        """Save in the layout that `sentence_transformers.SentenceTransformer` loads."""
        directory = Path(directory)
        self.backbone.save_pretrained(directory)
        self.tokenizer.save_pretrained(directory)
        settings = self.settings
        modules = [("", "Transformer"), ("1_Pooling", "Pooling")] + [("2_Normalize", "Normalize")] * settings.normalize
        files: dict[str, Any] = {
            "modules.json": [
                {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{kind}"}
                for index, (path, kind) in enumerate(modules)
            ],
            "sentence_bert_config.json": {"max_seq_length": settings.max_passage_length, "do_lower_case": False},
            "config_sentence_transformers.json": {
                "prompts": {"query": settings.query_prefix, "document": settings.passage_prefix},
                "default_prompt_name": None,
                "similarity_fn_name": "cosine" if settings.normalize else "dot",
            },
            "1_Pooling/config.json": {
                "word_embedding_dimension": self.dimension,
                **{key: settings.pooling_type == name for name, key in POOLING_KEYS.items()},
            },
            "rqa_encoder.json": asdict(settings),
        }
        for name, value in files.items():
            (directory / name).parent.mkdir(exist_ok=True)
            (directory / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
        (directory / "2_Normalize").mkdir(exist_ok=True)


def load_encoder(path: str, arguments: EncoderArguments | None = None, **options: Any) -> Encoder:
    """Load a `transformers` or `sentence-transformers` checkpoint with its pooling, prefixes and lengths.

    Args:
        path: A directory, or a hub name.
        arguments: Settings that override the checkpoint's.
        options: Those of `load_model`.

    Raises:
        UserError: the checkpoint cannot be read, or pools in a way that is not offered.
    """
    tokenizer = load_tokenizer(path, trust_remote_code=options.get("trust_remote_code", False))
    backbone = load_model(AutoModel, path, **options)
    stored = dict(_stored_settings(path))
    given = {name: value for name, value in asdict(arguments or EncoderArguments()).items() if value is not None}
    limit = min(tokenizer.model_max_length, getattr(backbone.config, "max_position_embeddings", None) or 512)
    lengths = {name: min(stored.get(name, 512), limit) for name in ("max_query_length", "max_passage_length")}
    for name in lengths:
        if given.get(name, limit) > limit:
            raise UserError(f"--{name} {given[name]}: {path} takes at most {limit} tokens")
    return Encoder(backbone, tokenizer, EncoderSettings(**(stored | lengths | given)))


def _stored_settings(path: str) -> Iterator[tuple[str, Any]]:
    """The settings that a checkpoint's own files state."""
    known = {field.name for field in fields(EncoderSettings)}
    if ours := _read_json(path, "rqa_encoder.json"):
        yield from ((name, value) for name, value in ours.items() if name in known)
        return
    listed = _read_json(path, "modules.json")
    if not listed:
        return
    modules = {module["type"].rpartition(".")[2]: module["path"] for module in listed}
    if unknown := set(modules) - {"Transformer", "Pooling", "Normalize"}:
        raise UserError(f"{path}/modules.json: module {sorted(unknown)[0]} is not supported")
    yield "normalize", "Normalize" in modules
    if "Pooling" in modules:
        yield "pooling_type", _stored_pooling(path, f"{modules['Pooling']}/config.json")
    config = _read_json(path, "sentence_bert_config.json")
    if config.get("max_seq_length"):
        yield "max_query_length", config["max_seq_length"]
        yield "max_passage_length", config["max_seq_length"]
    prompts = _read_json(path, "config_sentence_transformers.json").get("prompts") or {}
    yield "query_prefix", prompts.get("query") or ""
    yield "passage_prefix", prompts.get("document") or prompts.get("passage") or ""


def _stored_pooling(path: str, name: str) -> str:
    config = _read_json(path, name)
    modes = [key.removeprefix("pooling_mode_") for key, value in config.items()
             if key.startswith("pooling_mode_") and value is True]  # fmt: skip
    if isinstance(config.get("pooling_mode"), str):
        modes = [config["pooling_mode"]]
    names = {"mean_tokens": "mean", "cls_token": "cls", "mean": "mean", "cls": "cls"}
    if len(modes) != 1 or modes[0] not in names:
        raise UserError(
            f"{path}/{name}: pooling {'+'.join(modes) or 'none'} is not supported; choose --pooling_type mean or cls"
        )
    return names[modes[0]]


def _read_json(path: str, name: str) -> Any:
    """A JSON file of a directory or of a hub repository; empty if there is none."""
    try:
        file = cached_file(path, name, _raise_exceptions_for_missing_entries=False)
        return json.loads(Path(file).read_text(encoding="utf-8")) if file else {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path}/{name}: cannot be read ({error})") from None


def _mean(hidden: Tensor, batch: TokenBatch) -> Tensor:
    """The mean over each sequence's real tokens, in float32. [rows, D] -> [B, D]"""
    lengths = batch.lengths
    owners = torch.arange(len(lengths), device=hidden.device).repeat_interleave(lengths)  # [tokens]
    if len(owners) != len(hidden):
        offsets = torch.arange(len(owners), device=hidden.device) - (lengths.cumsum(0) - lengths)[owners]
        hidden = hidden[batch.starts[owners] + offsets]
    sums = hidden.new_zeros(len(lengths), hidden.shape[1], dtype=torch.float32)
    return sums.index_add(0, owners, hidden.float()) / lengths[:, None]
