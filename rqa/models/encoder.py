"""The retriever's encoder: backbone, pooling, projection and prefixes, in the layout of `sentence-transformers`."""

import copy
import json
import logging
import math
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

MAX_BATCH_TOKENS = {"cpu": 16384, "cuda": 131072}  # default in `embed`
ENCODINGS_AT_ONCE = 1000  # texts tokenized at once; an encoding takes 15 KiB and more until its ids are extracted
IDENTITY = "torch.nn.modules.linear.Identity"  # no activation
TOKENIZING = threading.Lock()  # truncation is mutable state of a tokenizer


@dataclass(kw_only=True)
class EncoderArguments(LoadingArguments):
    """The encoder; defaults come from the checkpoint."""

    pooling_type: str | None = flag(
        None, "Pooling. Default: the checkpoint's, or mean.", sorted(POOLING.values()), rare=True
    )
    normalize: bool | None = flag(
        None, "Whether embeddings get length 1. Default: the checkpoint's, or true.", rare=True
    )
    query_prefix: str | None = flag(None, 'Text before a question, such as "query: ". Default: the checkpoint\'s.')
    passage_prefix: str | None = flag(None, 'Text before a passage, such as "passage: ". Default: the checkpoint\'s.')
    query_instruction: str | None = flag(
        None,
        "Task that makes the query prefix 'Instruct: TASK\\nQuery: ', or a template that ends with {query}.",
        rare=True,
    )
    truncate_dim: int | None = flag(None, "Number of leading dimensions of embeddings to keep. Default: all.")
    max_query_length: int | None = flag(None, "Tokens of a question, at most. Default: the checkpoint's.", rare=True)
    max_passage_length: int | None = flag(None, "Tokens of a passage, at most. Default: the checkpoint's.", rare=True)
    max_batch_tokens: int | None = flag(
        None, "Tokens encoded at once without gradient. Default: 16384 on a CPU, 131072 on CUDA.", rare=True
    )

    def check(self) -> None:
        self.check_bounds(*LENGTHS, at_least=3)
        self.check_bounds("max_batch_tokens", "truncate_dim", at_least=1)
        if (task := self.query_instruction) and self.query_prefix is not None:
            raise UserError("--query_instruction: replaces the query prefix; remove --query_prefix")
        if task and "{query}" in task.removesuffix("{query}"):
            raise UserError(f"--query_instruction {task!r}: {{query}} must be at the end, once")

    def prefix(self, stored: str) -> str | None:
        """The text before each question; a `query_instruction` replaces the checkpoint's."""
        if not (task := self.query_instruction):
            return self.query_prefix
        if task.endswith("{query}"):
            return task.removesuffix("{query}").replace("\\n", "\n")
        space = "" if stored.startswith("Instruct: ") and stored.endswith("\nQuery:") else " "  # Qwen3 has no space
        return f"Instruct: {task}\nQuery:{space}"


class Encoder(nn.Module):
    """Maps token ids to one embedding per sequence; similarity is the inner product of embeddings."""

    def __init__(
        self,
        backbone: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        settings: EncoderSettings,
        projection: nn.Sequential | None = None,  # `layout.chain`, after pooling; None: no layers
        passage_encoder: "Encoder | None" = None,  # frozen; None: this encoder serves questions and passages
        precision: torch.dtype | None = None,  # dtype of later matrix products; None: the backbone's
        max_batch_tokens: int | None = None,  # in `embed`; None: by device
    ) -> None:
        super().__init__()
        self.backbone, self.projection = backbone, layout.chain([]) if projection is None else projection
        self.tokenizer, self.settings = tokenizer, settings
        self.passage_encoder = passage_encoder and passage_encoder.requires_grad_(False).eval()
        self.max_batch_tokens = max_batch_tokens
        self.collate = choose_collate(backbone, precision)
        self._as_text = as_text(tokenizer)
        self._counts: dict[str, list[int]] = {}  # by kind: texts seen, texts cut, and texts seen at the last warning

    @property
    def passage_side(self) -> "Encoder":
        """The encoder of passages, for both loss and index."""
        return self.passage_encoder or self

    def freeze_passages(self) -> None:
        """Encode passages with a frozen copy of the present encoder from now on, unless they have one."""
        if not self.passage_encoder:
            self.passage_encoder = copy.deepcopy(self).requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "Encoder":
        """Set the mode of all but a frozen passage encoder, which stays in eval mode."""
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
        """The embedding's width before truncation to `truncate_dim`."""
        return layout.width_behind(self.projection, self.backbone.config.hidden_size)

    def project(self, dimension: int) -> None:
        """Add a linear map and LayerNorm (Izacard & Grave 2020), unless the encoder has them."""
        if self.passage_encoder:
            raise UserError("--projection true: cannot change a separate passage encoder; remove the flag")
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
            encoded = self.tokenizer([prefix + self._as_text(text) for text in part], truncation=True, max_length=most)
            ids, parts = encoded["input_ids"], encoded.encodings  # slow tokenizers have no `encodings`
            if prefix and not self.settings.include_prompt:
                own = self.tokenizer(prefix, truncation=True, max_length=most)["input_ids"]
                # The prefix's tokens, as many as it has by itself, are marked by their complement, -1 - id.
                hidden = len(own) - (own[-1] in self.tokenizer.all_special_ids)
                ids = [[~token for token in row[:hidden]] + row[hidden:] for row in ids]
            return ids, sum(len(row) >= most and bool(not parts or parts[i].overflowing) for i, row in enumerate(ids))

        warning = f"texts are longer than --max_{kind}_length {most}; their ends are not encoded"
        return in_parts(encode, texts, self._counts.setdefault(kind, [0, 0, 0]), warning)

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
        """Embeddings without gradient; `advance` is called with the size of each finished batch. -> [N, D]"""
        padded, shape = self.collate is not pack, (self.dimension,)
        return computed(self, sequences, "embedding", padded, shape, self.max_batch_tokens, advance)

    def fingerprint(self) -> str:
        """A hash of weights, tokenizer and settings, which determine all embeddings."""
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
        if self.passage_encoder:  # for `encode_document`; `encode_query` uses the other one
            self.passage_encoder.save_pretrained(directory / PASSAGE_ENCODER)


def in_parts(encode: Callable[[Any], tuple[list[list[int]], int]], texts: Any, counts: list[int], warning: str) -> Any:
    """Token ids of texts; `encode` maps a part of them to ids and the number of texts that it cut. -> [N]

    Warns of cut texts, and again after ten times as many texts. `counts` is updated: texts seen, texts cut, and texts
    seen at the last warning.
    """
    rows: list[list[int]] = []
    for start in range(0, len(texts), ENCODINGS_AT_ONCE):
        with TOKENIZING:
            ids, cut = encode(texts[start : start + ENCODINGS_AT_ONCE])
        rows += ids
        counts[:2] = counts[0] + len(ids), counts[1] + cut
    if counts[1] and counts[0] >= 10 * counts[2]:
        counts[2] = counts[0]
        log.warning("%d of the first %d %s", counts[1], counts[0], warning)
    return rows


@torch.no_grad()
def computed(
    module: Any, sequences: Sequence[Sequence[int]], what: str, padded: bool, shape: tuple[int, ...] = (),
    most: int | None = None, advance: Callable[[int], object] = lambda count: None,
) -> np.ndarray:  # fmt: skip
    """The module's outputs for token ids; `what` names an output in errors. -> float32 [N, *shape]"""
    rows = np.empty((len(sequences), *shape), dtype=np.float32)
    device = next(module.parameters()).device
    batches = token_budget_batches(list(map(len, sequences)), most or MAX_BATCH_TOKENS[device.type], padded)

    def begun() -> Iterator[Any]:
        for indices in in_step(module, batches, filler=[]):
            batch = module.collate([sequences[index] for index in indices] or [[0]])
            output = module(batch.to(device)).to("cpu", non_blocking=True)  # from CUDA into pinned memory
            event = torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None
            yield indices, output, event
        yield None

    with evaluating(module):
        for (indices, output, event), _ in pairwise(begun()):  # while the GPU computes the next batch
            if event:
                event.synchronize()
            rows[indices] = output[: len(indices)].numpy()
            for index in indices:
                if not np.isfinite(rows[index]).all():
                    text = module.tokenizer.decode([max(id, ~id) for id in sequences[index]], skip_special_tokens=True)
                    raise loading.not_finite(module, what, text)
            advance(len(indices))
    return rows


def pool(kind: str, hidden: Tensor, batch: TokenBatch, seen: Tensor | None = None) -> Tensor:
    """One float32 vector per sequence; `seen` [T] marks the tokens that count (None: all). [rows, H] -> [B, H]"""
    B, owners, states = len(batch.lengths), batch.owners, batch.real(hidden)  # [T], [T, H]
    if kind == "lasttoken":
        return hidden[batch.starts + batch.lengths - 1].float()
    if kind == "cls":
        unseen = 0 if seen is None else batch.lengths.new_zeros(B).index_add(0, owners, (~seen).long())
        return hidden[batch.starts + unseen % batch.lengths].float()  # the first one if none is seen
    # In a weighted mean a token's weight is its position in the whole sequence, from 1.
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


def load_encoder(
    path: str,
    flags: EncoderArguments = EncoderArguments(dtype="float32"),
    dtype: torch.dtype | None = None,  # None: as for frozen models
    main_only: bool = False,
) -> Encoder:
    """Load a `transformers` or `sentence-transformers` checkpoint in eval mode; flags override its settings."""
    tokenizer = load_tokenizer(path, flags.trust_remote_code)
    backbone = load_model(AutoModel, path, flags, dtype, main_only)
    positions = loading.positions_of(backbone)
    limit = min(tokenizer.model_max_length, 512 if positions == math.inf else int(positions))
    stored = layout.read_layout(path, limit, flags)
    names = vars(EncoderSettings()).keys()
    given = {name: value for name in names if (value := getattr(flags, name, None)) is not None}
    if (prefix := flags.prefix(stored.get("query_prefix", ""))) is not None:
        given["query_prefix"] = prefix
    limit = int(max(limit, min(positions, max(stored[name] for name in LENGTHS))))  # may exceed the tokenizer's
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
    if stored.get("do_lower_case"):
        core = getattr(tokenizer, "backend_tokenizer", None)
        if core is None:
            raise UserError(f"{path}: 'do_lower_case' needs a fast tokenizer; save one beside the model")
        core.normalizer = normalizers.Sequence([normalizers.Lowercase(), *filter(None, [core.normalizer])])

    def encoder(backbone: PreTrainedModel, folder: str = "", passages: Encoder | None = None) -> Encoder:
        layers = layout.read_layers(path, folder, stored["layers"], backbone.config.hidden_size).to(backbone.device)
        last = dtype and flags.precision, flags.max_batch_tokens
        result = Encoder(backbone, tokenizer, settings, layers, passages, *last).eval()
        if (size := flags.truncate_dim or 0) > result.width:
            raise UserError(f"--truncate_dim {size}: the embeddings of {path} have {result.width} dimensions")
        return result

    if not stored.get("two_encoders"):
        return encoder(backbone)
    passages = load_model(AutoModel, path, flags, dtype, main_only, subfolder=PASSAGE_ENCODER)
    return encoder(backbone, passages=encoder(passages, PASSAGE_ENCODER))
