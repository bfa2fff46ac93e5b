"""The retriever's encoder: backbone, pooling, normalisation, prefixes."""

import copy
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import numpy as np
from torch import Tensor, nn
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from transformers import AutoModel, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file

from rqa.models.loading import (
    LoadingArguments,
    choose_collate,
    evaluating,
    hidden_states,
    load_model,
    load_tokenizer,
    model_fingerprint,
)
from rqa.packing import Collate, TokenBatch, pack, token_budget_batches
from rqa.runtime.errors import UserError, one_line
from rqa.runtime.files import fingerprint
from rqa.runtime.flags import flag
from rqa.runtime.parallelize import in_step

DENSE, LAYER_NORM = "2_Dense", "3_LayerNorm"


class Projection(nn.Module):
    """Linear map and LayerNorm (Izacard & Grave 2020, whose retriever ends so). [B, H] -> [B, D]"""

    def __init__(self, width: int, dimension: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, dimension)
        self.norm = nn.LayerNorm(dimension)

    def forward(self, pooled: Tensor) -> Tensor:
        return self.norm(self.linear(pooled))

    def save_pretrained(self, directory: Path) -> None:
        """Save as the modules `Dense` and `LayerNorm` of `sentence-transformers`."""
        dimension, width = self.linear.weight.shape
        dense = {
            "in_features": width,
            "out_features": dimension,
            "bias": True,
            "activation_function": "torch.nn.modules.linear.Identity",
        }
        parts: tuple[tuple[str, str, nn.Module, dict[str, Any]], ...] = (
            (DENSE, "linear", self.linear, dense),
            (LAYER_NORM, "norm", self.norm, {"dimension": dimension}),
        )
        for folder, name, part, config in parts:
            (directory / folder).mkdir(parents=True, exist_ok=True)
            weights = part.state_dict(prefix=f"{name}.")
            save_file(
                {key: value.contiguous() for key, value in weights.items()}, directory / folder / "model.safetensors"
            )
            (directory / folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def load_projection(path: str, width: int, dimension: int, subfolder: str = "") -> Projection:
    """What `save_pretrained` wrote, from a directory or a hub repository.

    Raises:
        UserError: its weights are missing or have other shapes.
    """
    projection = Projection(width, dimension)
    weights: dict[str, torch.Tensor] = {}
    try:
        for folder in (DENSE, LAYER_NORM):
            weights |= load_file(cached_file(path, str(Path(subfolder, folder, "model.safetensors"))))
        projection.load_state_dict(weights)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise UserError(f"model {path}: the projection cannot be loaded: {one_line(error)}") from None
    return projection


POOLING_KEYS = {"mean": "pooling_mode_mean_tokens", "cls": "pooling_mode_cls_token"}
SETTINGS_FILE = "rqa_encoder.json"
PASSAGE_ENCODER = "passage_encoder"
ENCODER_MODULES = {"Transformer": "", "Pooling": "1_Pooling"}
PROJECTION_MODULES = {"Dense": DENSE, "LayerNorm": LAYER_NORM}
NORMALIZE = "2_Normalize"


@dataclass(frozen=True)
class EncoderSettings:
    """What, beside the weights, decides an embedding."""

    pooling_type: str = "mean"
    normalize: bool = True
    query_prefix: str = ""
    passage_prefix: str = ""
    max_query_length: int = 512
    max_passage_length: int = 512
    projection: int = 0  # the projection's width; 0: there is none


def write_layout(directory: Path, settings: EncoderSettings, dimension: int, two_encoders: bool = False) -> None:
    """Write all but backbone and tokenizer.

    Args:
        dimension: The pooled embedding's width, before any projection.
        two_encoders: Whether passages have an encoder of their own, in the folder `PASSAGE_ENCODER`.
            `sentence-transformers` then routes `encode_query` and `encode_document` to one each.
    """
    encoder = ENCODER_MODULES | (PROJECTION_MODULES if settings.projection else {})
    paths = ({"Router": ""} if two_encoders else encoder) | ({"Normalize": NORMALIZE} if settings.normalize else {})
    files: dict[str, Any] = {
        "modules.json": [
            {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for index, (kind, path) in enumerate(paths.items())
        ],
        "sentence_bert_config.json": {"max_seq_length": settings.max_passage_length, "do_lower_case": False},
        "config_sentence_transformers.json": {
            "prompts": {"query": settings.query_prefix, "document": settings.passage_prefix},
            "default_prompt_name": None,
            "similarity_fn_name": "cosine" if settings.normalize else "dot",
        },
        "1_Pooling/config.json": {
            "word_embedding_dimension": dimension,
            **{key: settings.pooling_type == name for name, key in POOLING_KEYS.items()},
        },
        SETTINGS_FILE: asdict(settings) | {"two_encoders": two_encoders},
    }
    if two_encoders:
        files["router_config.json"] = _router(encoder)
    for name, value in files.items():
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    (directory / NORMALIZE).mkdir(exist_ok=True)


def _router(modules: dict[str, str]) -> dict[str, Any]:
    routes = {
        route: {f"{folder}{path}".rstrip("/") or ".": kind for kind, path in modules.items()}
        for route, folder in (("query", ""), ("document", f"{PASSAGE_ENCODER}/"))
    }
    types = {path: f"sentence_transformers.models.{kind}" for route in routes.values() for path, kind in route.items()}
    structure = {route: list(paths) for route, paths in routes.items()}
    return {"types": types, "structure": structure, "parameters": {"default_route": "query"}}


def has_two_encoders(path: str) -> bool:
    """Whether the checkpoint holds a passage encoder of its own. Its settings decide, not a folder left behind."""
    return bool(_read_json(path, SETTINGS_FILE).get("two_encoders"))


def stored_settings(path: str) -> Iterator[tuple[str, Any]]:
    """The settings that a checkpoint's own files state.

    Raises:
        UserError: they name a module or a way of pooling that is not offered.
    """
    known = {item.name for item in fields(EncoderSettings)}
    if ours := _read_json(path, SETTINGS_FILE):
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


MAX_BATCH_TOKENS = 16384


@dataclass(kw_only=True)
class EncoderArguments(LoadingArguments):
    """How texts become vectors. What is not given is taken from the checkpoint."""

    pooling_type: str | None = flag(
        None, "Pooling of token states. Default: the checkpoint's, or mean.", ["mean", "cls"]
    )
    normalize: bool | None = flag(
        None, "Whether embeddings are divided by their L2 norm. Default: as in the checkpoint, or true."
    )
    query_prefix: str | None = flag(None, 'Text before a question, such as "query: ". Default: the checkpoint\'s.')
    passage_prefix: str | None = flag(None, 'Text before a passage, such as "passage: ". Default: the checkpoint\'s.')
    max_query_length: int | None = flag(
        None, "Tokens of a question at most; the rest is cut. Default: the checkpoint's."
    )
    max_passage_length: int | None = flag(
        None, "Tokens of a passage at most; the rest is cut. Default: the checkpoint's."
    )

    def check(self) -> None:
        self.check_bounds("max_query_length", "max_passage_length", at_least=3)


class Encoder(nn.Module):
    """Token ids in, one embedding a sequence out; similarity is the inner product of embeddings.

    Attributes:
        passage_encoder: A frozen encoder of passages; None where this one encodes questions and passages.
        projection: From the pooled embedding to the one that is compared; None where that is the same.
    """

    def __init__(
        self,
        backbone: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        settings: EncoderSettings,
        passage_encoder: "Encoder | None" = None,
        projection: Projection | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.tokenizer = tokenizer
        self.settings = settings
        self.projection = projection
        self.passage_encoder = passage_encoder and passage_encoder.requires_grad_(False).eval()

    @property
    def passage_side(self) -> "Encoder":
        """Whatever encodes passages, in the loss as in the index."""
        return self.passage_encoder or self

    def freeze_passages(self) -> None:
        """From now on passages are encoded by a frozen copy of what the encoder is now; none if there is one."""
        if not self.passage_encoder:
            self.passage_encoder = copy.deepcopy(self).requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "Encoder":
        """Set the mode of what is trained: what is frozen has no dropout."""
        super().train(mode)
        if self.passage_encoder:
            self.passage_encoder.eval()
        return self

    @cached_property
    def collate(self) -> Collate:
        """How batches are built; found out at the first use, when the model is where it will run."""
        return choose_collate(self.backbone, self.tokenizer.pad_token_id)

    @property
    def dimension(self) -> int:
        """D, the embedding's width."""
        return self.settings.projection or self.backbone.config.hidden_size

    def project(self, dimension: int) -> None:
        """Compare embeddings behind a new projection from now on, unless there is one already.

        Raises:
            UserError: the one that there is has another dimension, or passages are encoded by another encoder.
        """
        if self.passage_encoder:
            raise UserError(
                "--projection true: the model's passages have an encoder of their own, which stays as it is"
            )
        if not self.projection:
            self.projection = Projection(self.dimension, dimension).to(self.backbone.device)
            self.settings = replace(self.settings, projection=dimension)
        elif self.dimension != dimension:
            raise UserError(f"--indexing_dimension {dimension}: the model's projection has {self.dimension} dimensions")

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
        if self.projection:
            pooled = self.projection(pooled).float()
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
        sides = [self, *([self.passage_encoder] if self.passage_encoder else [])]
        models = [model for side in sides for model in (side.backbone, side.projection) if model]
        return fingerprint(settings, *(model_fingerprint(model, self.tokenizer) for model in models))

    def save_pretrained(self, directory: str | Path) -> None:
        """Save in the layout that `sentence_transformers.SentenceTransformer` loads.

        With a passage encoder the encoder of questions stands on top, and that of passages in `passage_encoder/`.
        """
        directory = Path(directory)
        self.backbone.save_pretrained(directory)
        self.tokenizer.save_pretrained(directory)
        write_layout(
            directory, self.settings, self.backbone.config.hidden_size, two_encoders=self.passage_encoder is not None
        )
        if self.projection:
            self.projection.save_pretrained(directory)
        if self.passage_encoder:
            self.passage_encoder.save_pretrained(directory / PASSAGE_ENCODER)


def load_encoder(path: str, flags: EncoderArguments = EncoderArguments(), main_only: bool = False) -> Encoder:
    """Load a `transformers` or `sentence-transformers` checkpoint with its pooling, prefixes and lengths, in eval mode.

    Args:
        path: A directory, or a hub name.
        flags: Settings that are given override the checkpoint's.
        main_only: As in `load_model`.
    """
    tokenizer = load_tokenizer(path, flags.trust_remote_code)
    backbone = load_model(AutoModel, path, flags, main_only=main_only)
    stored = dict(stored_settings(path))
    names = [item.name for item in fields(EncoderSettings) if item.name != "projection"]
    given = {name: getattr(flags, name) for name in names if getattr(flags, name) is not None}
    limit = min(tokenizer.model_max_length, getattr(backbone.config, "max_position_embeddings", None) or 512)
    lengths = {name: min(stored.get(name, 512), limit) for name in ("max_query_length", "max_passage_length")}
    for name in lengths:
        if given.get(name, limit) > limit:
            raise UserError(f"--{name} {given[name]}: {path} takes at most {limit} tokens")
    settings = EncoderSettings(**(stored | lengths | given))
    passages = None
    if has_two_encoders(path):
        model = load_model(AutoModel, path, flags, main_only=main_only, subfolder=PASSAGE_ENCODER)
        passages = Encoder(model, tokenizer, settings, projection=_projection(path, model, settings, PASSAGE_ENCODER))
    return Encoder(backbone, tokenizer, settings, passages, _projection(path, backbone, settings)).eval()


def _projection(path: str, backbone: PreTrainedModel, settings: EncoderSettings, folder: str = "") -> Projection | None:
    if not settings.projection:
        return None
    projection = load_projection(path, backbone.config.hidden_size, settings.projection, folder)
    return projection.to(backbone.device)


def _mean(hidden: Tensor, batch: TokenBatch) -> Tensor:
    """The mean over each sequence's real tokens, in float32. [rows, D] -> [B, D]"""
    lengths = batch.lengths
    owners = torch.arange(len(lengths), device=hidden.device).repeat_interleave(lengths)  # [tokens]
    if len(owners) != len(hidden):
        hidden = hidden[batch.rows]
    sums = hidden.new_zeros(len(lengths), hidden.shape[1], dtype=torch.float32)
    return sums.index_add(0, owners, hidden.float()) / lengths[:, None]
