"""The cross-encoder: question and passage read together, one score a pair; saved as `CrossEncoder` saves it."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import numpy as np
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from rqa.models import loading
from rqa.models.encoder import MAX_BATCH_TOKENS
from rqa.models.loading import LoadingArguments, choose_collate, evaluating, hidden_states, load_model, load_tokenizer
from rqa.packing import TokenBatch, pack, token_budget_batches
from rqa.runtime.errors import UserError
from rqa.runtime.files import fingerprint
from rqa.runtime.flags import flag
from rqa.runtime.parallelize import WholePass, in_step
from rqa.runtime.text import as_text

Pair = tuple[str, str]  # a question, and the text of a passage


@dataclass(kw_only=True)
class RerankerArguments(LoadingArguments):
    """How a cross-encoder reads pairs."""

    max_pair_length: int | None = flag(
        None, "Tokens of question and passage together, at most. Default: the checkpoint's.", rare=True
    )

    def check(self) -> None:
        self.check_bounds("max_pair_length", at_least=8)


class Reranker(WholePass):
    """Token ids of pairs in, one score a pair out; the greater, the better the passage answers the question."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_length: int,
        precision: torch.dtype | None = None,  # what products will run in; None: what the model was loaded in
    ) -> None:  # fmt: skip
        super().__init__()
        self.model, self.tokenizer, self.max_length = model, tokenizer, max_length
        self._collate = choose_collate(model, precision)
        self._as_text = as_text(tokenizer)

    def tokenize(self, pairs: Sequence[Pair]) -> list[list[int]]:
        """Token ids of each pair, special tokens included; of a pair that is too long the passage is cut. [N] -> [N]"""
        questions, passages = ([self._as_text(text) for text in side] for side in zip(*pairs, strict=True))
        found = self.tokenizer(questions, passages, truncation="only_second", max_length=self.max_length)
        return found["input_ids"]

    def collate(self, sequences: Sequence[Sequence[int]]) -> TokenBatch:
        """One batch of pairs, packed if the model allows it. [N] -> N sequences"""
        batch = self._collate(sequences)
        if "token_type_ids" not in self.tokenizer.model_input_names:
            return batch
        ids = batch.inputs["input_ids"]
        ends = (ids == self.tokenizer.sep_token_id).flatten()[batch.rows].long()  # [T]
        before = ends.cumsum(0) - ends
        kinds = torch.zeros_like(ids).flatten()
        first = torch.nn.functional.pad(batch.lengths.cumsum(0), (1, 0))[:-1]  # of each sequence, among real tokens
        kinds[batch.rows] = (before - before[first][batch.owners]).clamp(max=1)  # 1 behind the first end
        return replace(batch, inputs=batch.inputs | {"token_type_ids": kinds.view_as(ids)})

    def forward(self, batch: TokenBatch) -> Tensor:
        """What `CrossEncoder.predict` gives before its activation, in float32. -> [N]"""
        if hasattr(self.model, "score"):  # a decoder, which has read all of a pair at its end
            ends = batch.starts + batch.lengths - 1
            return self.model.score(hidden_states(self.model, batch)[ends])[:, 0].float()

        def first_states(base: nn.Module, _: Any, output: Any) -> Any:
            """The head sees each pair's first state as a sequence of its own, however they are batched."""
            output.last_hidden_state = output.last_hidden_state.flatten(0, 1)[batch.starts][:, None]  # [N, 1, D]
            if pooler := getattr(base, "pooler", None):
                output.pooler_output = pooler(output.last_hidden_state)
            return output

        handle = self.model.base_model.register_forward_hook(first_states)
        try:
            return self.model(**batch.inputs).logits[:, 0].float()
        finally:
            handle.remove()

    @torch.no_grad()
    def score(self, pairs: Sequence[Pair]) -> np.ndarray:
        """Scores without gradient, longest pairs first. -> float32 [N]"""
        scores = np.empty(len(pairs), dtype=np.float32)
        sequences = self.tokenize(pairs) if pairs else []
        device = self.model.device
        padded, most = self._collate is not pack, MAX_BATCH_TOKENS[device.type]
        batches = token_budget_batches(list(map(len, sequences)), most, padded)
        with evaluating(self):
            for indices in in_step(self, batches, filler=[]):
                batch = self.collate([sequences[index] for index in indices] or [[0]])
                scores[indices] = self(batch.to(device)).float().cpu().numpy()[: len(indices)]
        if not (finite := np.isfinite(scores)).all():
            raise loading.not_finite(self.model, "score", " ".join(pairs[int(finite.argmin())]))
        return scores

    def fingerprint(self) -> str:
        """A hash of all that decides a score."""
        return fingerprint(loading.model_fingerprint(self.model, self.tokenizer), str(self.max_length))

    def save_pretrained(self, directory: str | Path) -> None:
        """Save in the layout that `sentence_transformers.CrossEncoder` loads; `predict` gives our scores there."""
        self.model.save_pretrained(directory)
        self.tokenizer.save_pretrained(directory)
        settings = {"activation_fn": "torch.nn.modules.linear.Identity", "model_type": "CrossEncoder", "prompts": {}}
        text = json.dumps(settings, indent=2) + "\n"
        Path(directory, "config_sentence_transformers.json").write_text(text, encoding="utf-8")


def load_reranker(
    path: str,
    flags: RerankerArguments = RerankerArguments(dtype="float32"),
    dtype: torch.dtype | None = None,  # None: that of frozen models
    main_only: bool = False,
    new_head: bool = False,  # whether a checkpoint without a head gets one, to be trained
) -> Reranker:
    """Load a reranker in the layout of `transformers` or of `sentence_transformers.CrossEncoder`, in eval mode."""
    tokenizer = load_tokenizer(path, flags.trust_remote_code)
    config = loading.load_config(path, flags.trust_remote_code)
    has_head = any(name.endswith("ForSequenceClassification") for name in config.architectures or [])
    if not has_head and not new_head:
        raise UserError(f"model {path}: is no reranker; train one from it with bin/train_rerank")
    new_layers = "" if has_head else r"^(classifier|score|pre_classifier|pooler)\b"
    kind, options = AutoModelForSequenceClassification, {} if has_head else {"num_labels": 1}
    model = load_model(kind, path, flags, dtype, main_only, new_layers, **options)
    if model.config.num_labels != 1:
        raise UserError(f"model {path}: gives {model.config.num_labels} scores a pair; a reranker gives one")
    positions = min(loading.learned_positions(model), getattr(model.config, "max_position_embeddings", None) or 512)
    length = int(min(tokenizer.model_max_length, positions))
    asked = flags.max_pair_length or length
    if asked > length:
        raise UserError(f"--max_pair_length {asked}: {path} takes at most {length} tokens")
    return Reranker(model, tokenizer, asked, dtype and flags.precision).eval()
