"""The retriever's encoder: backbone, pooling, projection, prefixes; saved as `sentence-transformers` saves it."""

import copy
import json
import logging
import math
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import numpy as np
from torch import Tensor, nn
from tokenizers import normalizers
from transformers import AutoModel, PreTrainedModel, PreTrainedTokenizerBase

from rqa.models import layout, loading
from rqa.models.layout import LENGTHS, PASSAGE_ENCODER, POOLING, EncoderSettings
from rqa.models.loading import LoadingArguments, choose_collate, evaluating, hidden_states, load_model, load_tokenizer
from rqa.packing import TokenBatch, pack, token_budget_batches
from rqa.runtime.errors import UserError
from rqa.runtime.files import fingerprint
from rqa.runtime.flags import flag
from rqa.runtime.parallelize import in_step
from rqa.runtime.text import as_text

log = logging.getLogger(__name__)

MAX_BATCH_TOKENS = {"cpu": 16384, "cuda": 131072}  # of `embed`
ENCODINGS_AT_ONCE = 1000  # whose encodings are held: 15 KiB a text and more, beside its ids
IDENTITY = "torch.nn.modules.linear.Identity"  # no activation
TOKENIZING = threading.Lock()  # a tokenizer's truncation is its state: threads take turns


@dataclass(kw_only=True)
class EncoderArguments(LoadingArguments):
    """How texts become vectors. What is not given is taken from the checkpoint."""

    pooling_type: str | None = flag(
        None, "Pooling. Default: the checkpoint's, or mean.", sorted(POOLING.values()), rare=True
    )
    normalize: bool | None = flag(None, "Whether vectors get length 1. Default: the checkpoint's, or true.", rare=True)
    query_prefix: str | None = flag(None, 'Text before a question, such as "query: ". Default: the checkpoint\'s.')
    passage_prefix: str | None = flag(None, 'Text before a passage, such as "passage: ". Default: the checkpoint\'s.')
    query_instruction: str | None = flag(
        None,
        "Task, put before a question as 'Instruct: TASK\\nQuery: ', or a template with {query} at its end.",
        rare=True,
    )
    truncate_dim: int | None = flag(None, "Dimensions of embeddings that are kept, the first ones. Default: all.")
    max_query_length: int | None = flag(None, "Tokens of a question, at most. Default: the checkpoint's.", rare=True)
    max_passage_length: int | None = flag(
        None,
        "Tokens of a passage, at most. Default: the checkpoint's; training without --index_path chooses it.",
        rare=True,
    )
    max_batch_tokens: int | None = flag(
        None, "Tokens encoded at once without gradient. Default: 16384 on a CPU, 131072 on CUDA.", rare=True
    )

    def check(self) -> None:
        self.check_bounds(*LENGTHS, at_least=3)
        self.check_bounds("max_batch_tokens", "truncate_dim", at_least=1)
        if (task := self.query_instruction) and self.query_prefix is not None:
            raise UserError("--query_instruction: becomes the query prefix; leave out --query_prefix")
        if task and "{query}" in task.removesuffix("{query}"):
            raise UserError(f"--query_instruction {task!r}: {{query}} must be at the end, once")

    def prefix(self, stored: str) -> str | None:
        """The text before a question; an instruction takes the place of the one that the checkpoint states."""
        if not (task := self.query_instruction):
            return self.query_prefix
        if task.endswith("{query}"):
            return task.removesuffix("{query}").replace("\\n", "\n")
        space = "" if stored.startswith("Instruct: ") and stored.endswith("\nQuery:") else " "  # Qwen3's has none
        return f"Instruct: {task}\nQuery:{space}"


class Encoder(nn.Module):
    """Token ids in, one embedding a sequence out; similarity is the inner product of embeddings."""

    def __init__(
        self,
        backbone: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        settings: EncoderSettings,
        projection: nn.Sequential | None = None,  # `layout.chain`, behind pooling; None: there are no layers
        passage_encoder: "Encoder | None" = None,  # frozen; None: this one encodes questions and passages
        precision: torch.dtype | None = None,  # what products will run in; None: what the backbone was loaded in
        max_batch_tokens: int | None = None,  # of `embed`; None: the device decides
    ) -> None:
        super().__init__()
        self.backbone, self.projection = backbone, layout.chain([]) if projection is None else projection
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

    def cutting(self, most: int) -> "Encoder":
        """The same encoder, but that passages have at most so many tokens, and that nobody is told what is cut."""
        other = copy.copy(self)
        other.settings = replace(self.settings, max_passage_length=most)
        other._counts = {"passage": [0, 0, sys.maxsize]}
        return other

    def train(self, mode: bool = True) -> "Encoder":
        """Set the mode of what is trained; what is frozen has no dropout."""
        super().train(mode)
        if self.passage_encoder:
            self.passage_encoder.eval()
        return self

    @property
    def dimension(self) -> int:
        """D, the embedding's width."""
        return min(self.settings.truncate_dim or self.width, self.width)

    @property
    def width(self) -> int:
        """The embedding's width before it is cut to `truncate_dim`."""
        return layout.width_behind(self.projection, self.backbone.config.hidden_size)

    def project(self, dimension: int) -> None:
        """Compare embeddings behind a linear map and LayerNorm (Izacard & Grave 2020) from now on, unless they are."""
        if self.passage_encoder:
            raise UserError("--projection true: passages have an encoder of their own, which stays as it is")
        if not (self.projection and self.projection[-1].kind == "LayerNorm"):
            linear = layout.Layer("Dense", in_features=self.width, out_features=dimension, activation_function=IDENTITY)
            added = [*self.projection, linear, layout.Layer("LayerNorm", dimension=dimension)]
            self.projection = layout.chain(added).to(self.backbone.device)
        elif self.width != dimension:
            raise UserError(f"--indexing_dimension {dimension}: the model's projection has {self.width} dimensions")

    def tokenize_queries(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of prefixed questions, special tokens included. [N] -> [N]"""
        return self._tokenize("query", texts, self.settings.query_prefix, self.settings.max_query_length)

    def tokenize_passages(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of prefixed passages, special tokens included. [N] -> [N]"""
        return self._tokenize("passage", texts, self.settings.passage_prefix, self.settings.max_passage_length)

    def _tokenize(self, kind: str, texts: Sequence[str], prefix: str, most: int) -> list[list[int]]:
        def encode(part: Sequence[str]) -> tuple[list[list[int]], int]:
            found = self.tokenizer([prefix + self._as_text(text) for text in part], truncation=True, max_length=most)
            ids, parts = found["input_ids"], found.encodings  # slow tokenizers do not tell what they left out
            if prefix and not self.settings.include_prompt:
                own = self.tokenizer(prefix, truncation=True, max_length=most)["input_ids"]
                # As many tokens as the prefix has by itself are marked by their complement: -1 - id.
                hidden = len(own) - (own[-1] in self.tokenizer.all_special_ids)
                ids = [[~token for token in row[:hidden]] + row[hidden:] for row in ids]
            return ids, sum(len(row) >= most and bool(not parts or parts[i].overflowing) for i, row in enumerate(ids))

        told = f"texts are longer than --max_{kind}_length {most}; their ends are not encoded"
        return in_parts(encode, texts, self._counts.setdefault(kind, [0, 0, 0]), told)

    def forward(self, batch: TokenBatch) -> Tensor:
        """Embeddings of a batch, in float32. -> [B, D]"""
        ids, seen = batch.inputs["input_ids"], None
        if not self.settings.include_prompt:
            seen = ids.flatten()[batch.rows] >= 0  # [T]
            batch = replace(batch, inputs=batch.inputs | {"input_ids": torch.where(ids < 0, ~ids, ids)})
        pooled = pool(self.settings.pooling_type, hidden_states(self.backbone, batch), batch, seen)
        pooled = self.projection(pooled).float()[:, : self.dimension]
        return nn.functional.normalize(pooled, dim=-1) if self.settings.normalize else pooled

    def embed(
        self, sequences: Sequence[Sequence[int]], advance: Callable[[int], object] = lambda count: None
    ) -> np.ndarray:
        """Embeddings of token ids without gradient, longest first; `advance` hears how many are done. -> [N, D]"""
        padded, shape = self.collate is not pack, (self.dimension,)
        return computed(self, sequences, "embedding", padded, shape, self.max_batch_tokens, advance)

    def fingerprint(self) -> str:
        """A hash of weights, tokenizer and settings: equal when every embedding would be."""
        sides = [self, self.passage_encoder] if self.passage_encoder else [self]
        models = [model for side in sides for model in (side.backbone, side.projection) if model]
        settings = json.dumps([asdict(self.settings), layout.configs(self.projection)], sort_keys=True)
        return fingerprint(settings, *(loading.model_fingerprint(model, self.tokenizer) for model in models))

    def save_pretrained(self, directory: str | Path) -> None:
        """Save in the layout that `sentence_transformers.SentenceTransformer` loads."""
        directory = Path(directory)
        self.backbone.save_pretrained(directory)
        self.tokenizer.save_pretrained(directory)
        layout.write_layout(directory, self)
        if self.passage_encoder:  # then `encode_query` and `encode_document` use one encoder each
            self.passage_encoder.save_pretrained(directory / PASSAGE_ENCODER)


def in_parts(encode: Callable[[Any], tuple[list[list[int]], int]], texts: Any, counts: list[int], told: str) -> Any:
    """Token ids of texts, by what encodes a part of them and counts those that it cut; threads take turns. -> [N]

    How many were cut is told, and again when ten times as many were seen; `counts`: seen, cut, and seen when told.
    """
    rows: list[list[int]] = []
    for start in range(0, len(texts), ENCODINGS_AT_ONCE):
        with TOKENIZING:
            ids, cut = encode(texts[start : start + ENCODINGS_AT_ONCE])
        rows += ids
        counts[:2] = counts[0] + len(ids), counts[1] + cut
    if counts[1] and counts[0] >= 10 * counts[2]:
        counts[2] = counts[0]
        log.warning("%d of the first %d %s", counts[1], counts[0], told)
    return rows


@torch.no_grad()
def computed(
    module: Any, sequences: Sequence[Sequence[int]], what: str, padded: bool, shape: tuple[int, ...] = (),
    most: int | None = None, advance: Callable[[int], object] = lambda count: None,
) -> np.ndarray:  # fmt: skip
    """What a module makes of token ids, longest first; `what` is an error's word for it. -> float32 [N, *shape]"""
    rows = np.empty((len(sequences), *shape), dtype=np.float32)
    device = next(module.parameters()).device
    batches = token_budget_batches(list(map(len, sequences)), most or MAX_BATCH_TOKENS[device.type], padded)

    def begun() -> Iterator[Any]:
        for indices in in_step(module, batches, filler=[]):
            batch = module.collate([sequences[index] for index in indices] or [[0]])
            found = module(batch.to(device)).to("cpu", non_blocking=True)  # from CUDA into pinned memory
            event = torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None
            yield indices, found, event
        yield None

    with evaluating(module):
        for (indices, found, event), _ in pairwise(begun()):  # while the GPU computes the next
            if event:
                event.synchronize()
            rows[indices] = found[: len(indices)].numpy()
            for index in indices:
                if not np.isfinite(rows[index]).all():
                    text = module.tokenizer.decode([max(id, ~id) for id in sequences[index]], skip_special_tokens=True)
                    raise loading.not_finite(module, what, text)
            advance(len(indices))
    return rows


def pool(kind: str, hidden: Tensor, batch: TokenBatch, seen: Tensor | None = None) -> Tensor:
    """One vector a sequence, in float32; `seen` [T] tells which tokens count (None: all). [rows, H] -> [B, H]"""
    B, owners, states = len(batch.lengths), batch.owners, batch.real(hidden)  # [T], [T, H]
    if kind == "lasttoken":
        return hidden[batch.starts + batch.lengths - 1].float()
    if kind == "cls":
        unseen = 0 if seen is None else batch.lengths.new_zeros(B).index_add(0, owners, (~seen).long())
        return hidden[batch.starts + unseen % batch.lengths].float()  # the first one if none is seen
    # Tokens further behind count more in a weighted mean: by their place in the whole sequence, from 1.
    weights = batch.rows - batch.starts[owners] + 1 if kind == "weightedmean" else torch.ones_like(owners)  # [T]
    if seen is not None:
        states, owners, weights = states[seen], owners[seen], weights[seen]
    states, sums = states.float(), states.new_zeros(B, states.shape[1], dtype=torch.float32)
    if kind == "max":
        return (sums - torch.inf).scatter_reduce(0, owners[:, None].expand_as(states), states, "amax")
    if kind == "weightedmean":
        states = states * weights[:, None]
    total = weights.new_zeros(B).index_add(0, owners, weights).clamp(min=1)
    return sums.index_add(0, owners, states) / total[:, None]


def positions_of(backbone: PreTrainedModel) -> float:
    """The most tokens that a backbone reads, as far as its tables and its configuration tell; else infinite."""
    stated = max(getattr(backbone.config, "max_position_embeddings", None) or 0, 0) or math.inf  # XLNet's is -1
    return min(loading.learned_positions(backbone), stated)


def load_encoder(
    path: str,
    flags: EncoderArguments = EncoderArguments(dtype="float32"),
    dtype: torch.dtype | None = None,  # None: that of frozen models
    main_only: bool = False,
) -> Encoder:
    """Load a `transformers` or `sentence-transformers` checkpoint, in eval mode; flags that are given override it."""
    tokenizer = load_tokenizer(path, flags.trust_remote_code)
    backbone = load_model(AutoModel, path, flags, dtype, main_only)
    positions = positions_of(backbone)
    limit = min(tokenizer.model_max_length, 512 if positions == math.inf else int(positions))
    stored = layout.read_layout(path, limit, flags)
    names = vars(EncoderSettings()).keys()
    given = {name: value for name in names if (value := getattr(flags, name, None)) is not None}
    if (prefix := flags.prefix(stored.get("query_prefix", ""))) is not None:
        given["query_prefix"] = prefix
    limit = int(max(limit, min(positions, max(stored[name] for name in LENGTHS))))  # the tokenizer's does not bind
    for name in LENGTHS:
        if given.get(name, limit) > limit:
            raise UserError(f"--{name} {given[name]}: {path} takes at most {limit} tokens")
    chosen = stored | {name: min(stored[name], limit) for name in LENGTHS} | given
    settings = EncoderSettings(**{name: chosen[name] for name in names & chosen.keys()})
    if (pooling := settings.pooling_type) not in POOLING.values():
        file = f"{path}/{stored.get('pooling_file', layout.SETTINGS_FILE)}"
        known = ", ".join(POOLING.values())
        raise UserError(f"{file}: pooling {pooling} is not supported; choose --pooling_type (one of {known})")
    for kind in ("query", "passage"):
        most, prefix = getattr(settings, f"max_{kind}_length"), getattr(settings, f"{kind}_prefix")
        if prefix and len(tokenizer(prefix)["input_ids"]) >= most:
            raise UserError(f"--{kind}_prefix {prefix!r:.50}: fills all {most} tokens of --max_{kind}_length")
    if stored.get("do_lower_case") and (core := tokenizer.backend_tokenizer):
        core.normalizer = normalizers.Sequence([normalizers.Lowercase(), *filter(None, [core.normalizer])])

    def encoder(backbone: PreTrainedModel, folder: str = "", passages: Encoder | None = None) -> Encoder:
        layers = layout.read_layers(path, folder, stored["layers"], backbone.config.hidden_size).to(backbone.device)
        last = dtype and flags.precision, flags.max_batch_tokens
        made = Encoder(backbone, tokenizer, settings, layers, passages, *last).eval()
        if (size := flags.truncate_dim or 0) > made.width:
            raise UserError(f"--truncate_dim {size}: the embeddings of {path} have {made.width} dimensions")
        return made

    if not stored.get("two_encoders"):
        return encoder(backbone)
    of_passages = load_model(AutoModel, path, flags, dtype, main_only, subfolder=PASSAGE_ENCODER)
    return encoder(backbone, passages=encoder(of_passages, PASSAGE_ENCODER))
