"""The retriever's encoder: backbone, pooling, projection, prefixes; saved as `sentence-transformers` saves it."""

import copy
import json
import logging
import math
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import numpy as np
from torch import Tensor, nn
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import normalizers
from transformers import AutoModel, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file

from rqa.models import loading
from rqa.models.loading import LoadingArguments, choose_collate, evaluating, hidden_states, load_model, load_tokenizer
from rqa.packing import TokenBatch, pack, token_budget_batches
from rqa.runtime.errors import UserError, one_line
from rqa.runtime.files import fingerprint, read_json
from rqa.runtime.flags import flag
from rqa.runtime.parallelize import in_step
from rqa.runtime.text import as_text

log = logging.getLogger(__name__)

MAX_BATCH_TOKENS = {"cpu": 16384, "cuda": 131072}  # of `embed`
ENCODINGS_AT_ONCE = 1000  # whose encodings are held: 15 KiB a text and more, beside its ids
TOKENIZING = threading.Lock()  # a tokenizer's truncation is its state: threads take turns
SETTINGS_FILE = "rqa_encoder.json"
PASSAGE_ENCODER = "passage_encoder"  # the folder of a passage encoder of its own
POOLING, DENSE, LAYER_NORM, NORMALIZE = "1_Pooling", "2_Dense", "3_LayerNorm", "2_Normalize"
TYPES = "sentence_transformers.models."
POOLING_NAMES = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}
MODULES = ["Transformer", "Pooling", "Normalize"]
KINDS = {str: "a string", bool: "true or false", int: "a whole number (a length: at least 3)", dict: "an object"}
GENERAL_FILE = "config_sentence_transformers.json"
LENGTHS = ("max_query_length", "max_passage_length")


@dataclass(kw_only=True)
class EncoderArguments(LoadingArguments):
    """How texts become vectors. What is not given is taken from the checkpoint."""

    pooling_type: str | None = flag(None, "Pooling. Default: the checkpoint's, or mean.", ["mean", "cls"], rare=True)
    normalize: bool | None = flag(None, "Whether vectors get length 1. Default: the checkpoint's, or true.", rare=True)
    query_prefix: str | None = flag(None, 'Text before a question, such as "query: ". Default: the checkpoint\'s.')
    passage_prefix: str | None = flag(None, 'Text before a passage, such as "passage: ". Default: the checkpoint\'s.')
    max_query_length: int | None = flag(None, "Tokens of a question, at most. Default: the checkpoint's.", rare=True)
    max_passage_length: int | None = flag(None, "Tokens of a passage, at most. Default: the checkpoint's.", rare=True)
    max_batch_tokens: int | None = flag(
        None, "Tokens encoded at once without gradient. Default: 16384 on a CPU, 131072 on CUDA.", rare=True
    )

    def check(self) -> None:
        self.check_bounds(*LENGTHS, at_least=3)
        self.check_bounds("max_batch_tokens", at_least=1)


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


def new_projection(width: int, dimension: int) -> nn.Sequential:
    """Linear map and LayerNorm (Izacard & Grave 2020, whose retriever ends so). [B, H] -> [B, D]"""
    return nn.Sequential(OrderedDict(linear=nn.Linear(width, dimension), norm=nn.LayerNorm(dimension)))


class Encoder(nn.Module):
    """Token ids in, one embedding a sequence out; similarity is the inner product of embeddings."""

    def __init__(
        self,
        backbone: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        settings: EncoderSettings,
        projection: nn.Sequential | None = None,  # of the pooled embedding; None: that one is compared
        passage_encoder: "Encoder | None" = None,  # frozen; None: this one encodes questions and passages
        precision: torch.dtype | None = None,  # what products will run in; None: what the backbone was loaded in
        max_batch_tokens: int | None = None,  # of `embed`; None: the device decides
    ) -> None:
        super().__init__()
        self.backbone, self.projection = backbone, projection
        self.tokenizer, self.settings = tokenizer, settings
        self.passage_encoder = passage_encoder and passage_encoder.requires_grad_(False).eval()
        self.max_batch_tokens = max_batch_tokens
        self.collate = choose_collate(backbone, precision)
        self._as_text = as_text(tokenizer)
        self._counts: dict[str, list[int]] = {}  # queries and passages: seen, cut, and seen when that was told

    @property
    def passage_side(self) -> "Encoder":
        """Whatever encodes passages, in the loss as in the index."""
        return self.passage_encoder or self

    def freeze_passages(self) -> None:
        """From now on passages are encoded by a frozen copy of what the encoder is now, unless they are already."""
        if not self.passage_encoder:
            self.passage_encoder = copy.deepcopy(self).requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "Encoder":
        """Set the mode of what is trained; what is frozen has no dropout."""
        super().train(mode)
        if self.passage_encoder:
            self.passage_encoder.eval()
        return self

    @property
    def dimension(self) -> int:
        """D, the embedding's width."""
        return self.settings.projection or self.backbone.config.hidden_size

    def project(self, dimension: int) -> None:
        """Compare embeddings behind a new projection from now on, unless there is one of this dimension already."""
        if self.passage_encoder:
            raise UserError("--projection true: passages have an encoder of their own, which stays as it is")
        if not self.projection:
            self.projection = new_projection(self.dimension, dimension).to(self.backbone.device)
            self.settings = replace(self.settings, projection=dimension)
        elif self.dimension != dimension:
            raise UserError(f"--indexing_dimension {dimension}: the model's projection has {self.dimension} dimensions")

    def tokenize_queries(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of prefixed questions, special tokens included. [N] -> [N]"""
        return self._tokenize("query", texts, self.settings.query_prefix, self.settings.max_query_length)

    def tokenize_passages(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of prefixed passages, special tokens included. [N] -> [N]"""
        return self._tokenize("passage", texts, self.settings.passage_prefix, self.settings.max_passage_length)

    def _tokenize(self, kind: str, texts: Sequence[str], prefix: str, most: int) -> list[list[int]]:
        rows: list[list[int]] = []
        counts = self._counts.setdefault(kind, [0, 0, 0])
        for start in range(0, len(texts), ENCODINGS_AT_ONCE):
            with TOKENIZING:
                asked = [prefix + self._as_text(text) for text in texts[start : start + ENCODINGS_AT_ONCE]]
                found = self.tokenizer(asked, truncation=True, max_length=most)
            ids, parts = found["input_ids"], found.encodings  # slow tokenizers do not tell what they left out
            counts[0] += len(ids)
            counts[1] += sum(len(row) >= most and bool(not parts or parts[i].overflowing) for i, row in enumerate(ids))
            rows += ids
        if counts[1] and counts[0] >= 10 * counts[2]:
            counts[2] = counts[0]
            told = f"{counts[1]} of the first {counts[0]} texts"
            log.warning("%s are longer than --max_%s_length %d; their ends are not encoded", told, kind, most)
        return rows

    def forward(self, batch: TokenBatch) -> Tensor:
        """Embeddings of a batch, in float32. -> [B, D]"""
        hidden = hidden_states(self.backbone, batch)  # [rows, D]
        if self.settings.pooling_type == "cls":
            pooled = hidden[batch.starts].float()
        else:  # the mean over each sequence's real tokens
            sums = hidden.new_zeros(len(batch.lengths), hidden.shape[1], dtype=torch.float32)
            pooled = sums.index_add(0, batch.owners, batch.real(hidden).float()) / batch.lengths[:, None]
        if self.projection:
            pooled = self.projection(pooled).float()
        return nn.functional.normalize(pooled, dim=-1) if self.settings.normalize else pooled

    @torch.no_grad()
    def embed(
        self, sequences: Sequence[Sequence[int]], advance: Callable[[int], object] = lambda count: None
    ) -> np.ndarray:
        """Embeddings of token ids without gradient, longest first; `advance` hears how many are done. -> [N, D]"""
        embeddings = np.empty((len(sequences), self.dimension), dtype=np.float32)
        device, lengths = self.backbone.device, list(map(len, sequences))
        most = self.max_batch_tokens or MAX_BATCH_TOKENS[device.type]
        batches = token_budget_batches(lengths, most, padded=self.collate is not pack)

        def begun() -> Iterator[Any]:
            for indices in in_step(self, batches, filler=[]):
                batch = self.collate([sequences[index] for index in indices] or [[0]])
                found = self(batch.to(device)).to("cpu", non_blocking=True)  # from CUDA into pinned memory
                computed = torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None
                yield indices, found, computed
            yield None

        with evaluating(self):
            for (indices, found, computed), _ in pairwise(begun()):  # while the GPU computes the next
                if computed:
                    computed.synchronize()
                embeddings[indices] = found.numpy()
                if not (finite := found.isfinite().all(1)[: len(indices)]).all():
                    bad = sequences[indices[int(finite.int().argmin())]]
                    text = self.tokenizer.decode(bad, skip_special_tokens=True)
                    raise loading.not_finite(self.backbone, "embedding", text)
                advance(len(indices))
        return embeddings

    def fingerprint(self) -> str:
        """A hash of weights, tokenizer and settings: equal when every embedding would be."""
        sides = [self, self.passage_encoder] if self.passage_encoder else [self]
        models = [model for side in sides for model in (side.backbone, side.projection) if model]
        settings = json.dumps(asdict(self.settings), sort_keys=True)
        return fingerprint(settings, *(loading.model_fingerprint(model, self.tokenizer) for model in models))

    def save_pretrained(self, directory: str | Path) -> None:
        """Save in the layout that `sentence_transformers.SentenceTransformer` loads."""
        directory = Path(directory)
        self.backbone.save_pretrained(directory)
        self.tokenizer.save_pretrained(directory)
        (directory / NORMALIZE).mkdir(exist_ok=True)
        for name, value in _layout(self).items():
            (directory / name).parent.mkdir(exist_ok=True)
            (directory / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
        for folder, name in ((DENSE, "linear"), (LAYER_NORM, "norm")) if self.projection else ():
            weights = getattr(self.projection, name).state_dict(prefix=f"{name}.")
            save_file(weights, directory / folder / "model.safetensors")
        if self.passage_encoder:  # then `encode_query` and `encode_document` use one encoder each
            self.passage_encoder.save_pretrained(directory / PASSAGE_ENCODER)


def load_encoder(
    path: str,
    flags: EncoderArguments = EncoderArguments(dtype="float32"),
    dtype: torch.dtype | None = None,  # None: that of frozen models
    main_only: bool = False,
) -> Encoder:
    """Load a `transformers` or `sentence-transformers` checkpoint, in eval mode; flags that are given override it."""
    tokenizer = load_tokenizer(path, flags.trust_remote_code)
    backbone = load_model(AutoModel, path, flags, dtype, main_only)
    stated = max(getattr(backbone.config, "max_position_embeddings", None) or 0, 0) or math.inf  # XLNet's is -1
    positions = min(loading.learned_positions(backbone), stated)
    limit = min(tokenizer.model_max_length, 512 if positions == math.inf else int(positions))
    stored, names = _stored_settings(path, flags, limit), vars(EncoderSettings()).keys()
    given = {name: getattr(flags, name) for name in names - {"projection"} if getattr(flags, name) is not None}
    limit = int(max(limit, min(positions, max(stored[name] for name in LENGTHS))))  # the tokenizer's does not bind
    for name in LENGTHS:
        if given.get(name, limit) > limit:
            raise UserError(f"--{name} {given[name]}: {path} takes at most {limit} tokens")
    chosen = stored | {name: min(stored[name], limit) for name in LENGTHS} | given
    settings = EncoderSettings(**{name: chosen[name] for name in names & chosen.keys()})
    if (pooling := settings.pooling_type) not in POOLING_NAMES.values():
        file = f"{path}/{stored.get('pooling_file', SETTINGS_FILE)}"
        raise UserError(f"{file}: pooling {pooling} is not supported; choose --pooling_type mean or cls")
    if stored.get("do_lower_case") and (core := tokenizer.backend_tokenizer):
        core.normalizer = normalizers.Sequence([normalizers.Lowercase(), *filter(None, [core.normalizer])])
    last = dtype and flags.precision, flags.max_batch_tokens
    passages = None
    if stored.get("two_encoders"):
        model = load_model(AutoModel, path, flags, dtype, main_only, subfolder=PASSAGE_ENCODER)
        projection = _load_projection(path, PASSAGE_ENCODER, model, settings.projection)
        passages = Encoder(model, tokenizer, settings, projection, None, *last)
    projection = _load_projection(path, "", backbone, settings.projection)
    return Encoder(backbone, tokenizer, settings, projection, passages, *last).eval()


def _load_projection(path: str, folder: str, backbone: PreTrainedModel, dimension: int) -> nn.Sequential | None:
    if not dimension:
        return None
    weights: dict[str, Tensor] = {}
    try:
        with torch.device("meta"):  # memory is taken for what the file holds, not for what a setting says
            projection = new_projection(backbone.config.hidden_size, dimension)
        for part in (DENSE, LAYER_NORM):
            weights |= load_file(cached_file(path, str(Path(folder, part, "model.safetensors"))))
        projection.load_state_dict(weights, assign=True)
    except (OSError, RuntimeError, TypeError, SafetensorError) as error:
        raise UserError(f"model {path}: the projection cannot be loaded: {one_line(error)}") from None
    return projection.to(backbone.device, torch.float32)


def _layout(encoder: Encoder) -> dict[str, Any]:
    """The JSON files, by name, from which `sentence-transformers` builds the same encoder."""
    settings, width = encoder.settings, encoder.backbone.config.hidden_size
    modules = {"": "Transformer", POOLING: "Pooling"}
    files: dict[str, Any] = {}
    if settings.projection:
        modules |= {DENSE: "Dense", LAYER_NORM: "LayerNorm"}
        identity = {"bias": True, "activation_function": "torch.nn.modules.linear.Identity"}
        files[f"{DENSE}/config.json"] = {"in_features": width, "out_features": settings.projection} | identity
        files[f"{LAYER_NORM}/config.json"] = {"dimension": settings.projection}
    top = modules
    if encoder.passage_encoder:
        top = {"": "Router"}
        queries = {path or ".": TYPES + name for path, name in modules.items()}
        passages = {f"{PASSAGE_ENCODER}/{path}".rstrip("/"): TYPES + name for path, name in modules.items()}
        routes, options = {"query": list(queries), "document": list(passages)}, {"default_route": "query"}
        files["router_config.json"] = {"types": queries | passages, "structure": routes, "parameters": options}
    top = top | ({NORMALIZE: "Normalize"} if settings.normalize else {})
    listed = [{"idx": i, "name": str(i), "path": path, "type": TYPES + top[path]} for i, path in enumerate(top)]
    pooling = {key: settings.pooling_type == name for key, name in POOLING_NAMES.items()}
    prompts = {"query": settings.query_prefix, "document": settings.passage_prefix}
    similarity = {"default_prompt_name": None, "similarity_fn_name": "cosine" if settings.normalize else "dot"}
    return files | {
        "modules.json": listed,
        "sentence_bert_config.json": {"max_seq_length": settings.max_passage_length, "do_lower_case": False},
        GENERAL_FILE: {"prompts": prompts, **similarity},
        f"{POOLING}/config.json": {"word_embedding_dimension": width, **pooling},
        SETTINGS_FILE: asdict(settings) | {"two_encoders": encoder.passage_encoder is not None},
    }


def _stored_settings(path: str, flags: EncoderArguments, limit: int) -> dict[str, Any]:
    """The settings that a checkpoint's own files state, and whether passages have an encoder of their own.

    They mean what sentence-transformers' `encode_query`, `encode_document` and `similarity` make of them, or are
    refused. Similarity is cosine unless another is stated, with or without a Normalize module; texts are cut at `limit`
    tokens unless a length is stated.
    """
    if ours := _read_json(path, SETTINGS_FILE):  # it decides, not a folder left behind
        defaults = vars(EncoderSettings()) | {"two_encoders": False}
        return {name: _stated(f"{path}/{SETTINGS_FILE}", ours, name, value) for name, value in defaults.items()}
    file, modules = f"{path}/modules.json", _read_json(path, "modules.json", list)
    if not modules:
        return dict.fromkeys(LENGTHS, min(limit, 512))
    types, folders = ([_stated(file, module, name, "") for module in modules] for name in ("type", "path"))
    names = [re.sub(r"^sentence_transformers\.(.*\.)?", "", name) for name in types]
    if names not in (MODULES, MODULES[:2]) or folders[0] or not re.fullmatch(r"\w[\w.-]*", folders[1]):
        wanted = f"{', '.join(MODULES)} in this order, the first with path '', the second in a folder beside it"
        raise UserError(f"{file}: modules {', '.join(names)} are not supported; only {wanted}")
    file, pooling_file = f"{path}/{GENERAL_FILE}", f"{folders[1]}/config.json"
    general = partial(_stated, file, stated := _read_json(path, GENERAL_FILE))
    prompts, similarity = general("prompts", {}), general("similarity_fn_name", "cosine")
    if similarity not in ("cosine", "dot") and flags.normalize is None:
        raise UserError(f"{file}: similarity_fn_name {similarity} is not supported; choose --normalize true (cosine)")
    if stated.get("truncate_dim") is not None:
        raise UserError(f"{file}: truncate_dim is not supported; remove it to compare whole embeddings")
    prompt = {name: _stated(file, prompts, name, "") for name in ("query", "document", "passage", "corpus")}
    other = "" if "document" in prompts else prompt["passage"] or prompt["corpus"]
    if other and flags.passage_prefix is None:
        raise UserError(f"{file}: the prompts lack 'document'; choose --passage_prefix {other!r}")
    if not (pooling := _read_json(path, pooling_file)):
        raise UserError(f"{path}/{pooling_file}: is missing or empty; copy it from the original model")
    pools = partial(_stated, f"{path}/{pooling_file}", pooling)
    if not pools("include_prompt", True):
        raise UserError(f"{path}/{pooling_file}: include_prompt false is not supported; set it to true")
    old = [key for key in pooling if key.startswith("pooling_mode_") and pools(key, False)]
    modes = pooling.get("pooling_mode") or [POOLING_NAMES.get(key, key.removeprefix("pooling_mode_")) for key in old]
    kinds = ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")  # all but one are old
    found = next(filter(None, (_read_json(path, f"sentence_{kind}_config.json") for kind in kinds)), {})
    reading = partial(_stated, file := f"{path}/sentence_bert_config.json", found)
    if (task := reading("transformer_task", "feature-extraction")) != "feature-extraction":
        raise UserError(f"{file}: transformer_task {task} is not supported; only feature-extraction")
    length = reading("max_seq_length", limit)
    return {
        "pooling_type": "+".join(map(str, modes if isinstance(modes, list) else [modes])) or "mean",
        "pooling_file": pooling_file, "normalize": similarity != "dot" or names == MODULES,
        "query_prefix": prompt["query"], "passage_prefix": prompt["document"],
        "max_query_length": reading("query_length", length), "max_passage_length": reading("document_length", length),
        "do_lower_case": reading("do_lower_case", False),
    }  # fmt: skip


def _stated(file: str, settings: Any, name: str, default: Any) -> Any:
    """What a file states of a setting, which must be of its default's type; the default where it states nothing."""
    value = settings.get(name) if isinstance(settings, dict) else settings
    if value is None:
        return default
    if type(value) is not type(default) or ("length" in name and value < 3):
        raise UserError(f"{file}: {name} must be {KINDS[type(default)]}, found {value!r:.50}")
    return value


def _read_json(path: str, name: str, kind: type = dict) -> Any:
    """A JSON file of a directory or of a hub repository; empty if there is none."""
    try:
        file = cached_file(path, name, _raise_exceptions_for_missing_entries=False)  # private: else it raises OSError
        return read_json(file, kind) if file else kind()
    except (OSError, ValueError) as error:
        raise UserError(f"{path}/{name}: cannot be read ({error})") from None
