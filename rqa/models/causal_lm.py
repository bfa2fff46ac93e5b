"""Decoder language models: logits of answers alone, and batched generation."""

import inspect
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, PreTrainedModel, StaticCache

from rqa.data import Document, Example
from rqa.models.attention import PACKED_ATTENTION
from rqa.models.loading import LoadingArguments, attention_of, evaluating, hidden_states, load_model, packing_is_exact
from rqa.models.reader import GenerationArguments, LocalReader
from rqa.packing import AnswerBatch, pack
from rqa.runtime.parallelize import is_sharded


def load_causal_lm(
    path: str, flags: LoadingArguments = LoadingArguments(), dtype: torch.dtype = torch.float32, main_only: bool = False
) -> PreTrainedModel:
    """A decoder from a directory or hub name; the arguments are those of `load_model`."""
    return load_model(AutoModelForCausalLM, path, flags, dtype, main_only)


def answer_logits(model: PreTrainedModel, batch: AnswerBatch) -> Tensor:
    """Next-token logits at the answers' positions only; the output layer runs on no other token. -> [N, V]"""
    inputs = batch.tokens.inputs
    width = inputs["input_ids"].shape[1]
    columns, rows = batch.positions % width, batch.positions // width  # [N], [N]
    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        return model(**inputs, use_cache=False).logits[rows, columns]
    if inputs["input_ids"].shape[0] == 1:
        return model(**inputs, use_cache=False, logits_to_keep=columns).logits[0]
    kept, columns = columns.unique(return_inverse=True)
    return model(**inputs, use_cache=False, logits_to_keep=kept).logits[rows, columns]


class InPlaceCache(StaticCache):
    """Keys and values written in place; `transformers` otherwise copies all of them for each token."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        # Rotary embeddings leave float32 beside autocast's values, and the cache has one dtype.
        return super().update(key_states.to(value_states.dtype), value_states, *args, **kwargs)


def new_cache(model: PreTrainedModel, length: int) -> StaticCache | None:
    """An empty cache for so many tokens of each sequence; None if the model needs a cache of its own kind."""
    fits = model._can_compile_fullgraph  # private: transformers says nowhere else which models take a StaticCache
    return InPlaceCache(model.config, max_cache_len=length) if fits else None


def read_prompts(model: PreTrainedModel, prompts: Sequence[Sequence[int]], cache: StaticCache) -> None:
    """Put keys and values of all but each prompt's last token into an empty cache, from one packed row.

    `generate` would read a padded batch, under a mask. It goes on from here, with prompts padded on the left.
    """
    batch = pack([prompt[:-1] for prompt in prompts]).to(model.device)
    kept: list[tuple[Tensor, Tensor]] = []
    hidden_states(model, batch, kept=kept)
    if len(kept) != len(cache.layers):  # layers share their keys: `generate` reads the prompts itself
        return
    lengths = batch.lengths.tolist()
    for layer, states in enumerate(kept):
        rows = [x[0].transpose(0, 1).split(lengths) for x in states]  # of keys and of values: [L_i, H_kv, d] each
        padded = (pad_sequence(list(x), batch_first=True, padding_side="left") for x in rows)  # [B, L, H_kv, d]
        cache.update(*(x.transpose(1, 2) for x in padded), layer)


class CausalLMReader(LocalReader):
    """Answers questions over passages with a decoder, from prompts of token ids."""

    def __init__(self, model: Any, prompter: Any, flags: GenerationArguments = GenerationArguments()) -> None:
        super().__init__(model, prompter, flags, filler=prompter.stop_ids)

    def encode(self, example: Example, passages: Sequence[Document]) -> list[int]:
        return self.prompter.encode(example, passages).ids

    def cost(self, prompt: list[int]) -> int:
        return len(prompt) + self.prompter.arguments.max_new_tokens

    @cached_property
    def _packs(self) -> bool:
        """Whether prompts are read as one packed row, without padding."""
        return attention_of(self.model) == PACKED_ATTENTION and packing_is_exact(self.model)

    @torch.no_grad()
    def generate(self, prompts: Sequence[list[int]], max_new_tokens: int | None = None) -> list[list[int]]:
        stop, most = self.prompter.stop_ids, max_new_tokens or self.prompter.arguments.max_new_tokens
        left = {"batch_first": True, "padding_side": "left"}
        ids = pad_sequence([torch.tensor(prompt) for prompt in prompts], padding_value=stop[0], **left)  # [B, L]
        mask = pad_sequence([torch.ones(len(prompt), dtype=torch.long) for prompt in prompts], **left)  # [B, L]
        config = self.flags.config(most, stop, disable_compile=True)
        synced = is_sharded(self.model)  # then a process that is done steps on until all are
        with evaluating(self.model):
            cache = new_cache(self.model, ids.shape[1] + most)
            plain = not synced and config.num_beams == 1 and min(map(len, prompts)) > 1
            if cache is not None and plain and self._packs:
                read_prompts(self.model, prompts, cache)
            inputs = {"input_ids": ids.to(self.model.device), "attention_mask": mask.to(self.model.device)}
            options = {"generation_config": config, "synced_gpus": synced, "past_key_values": cache}
            answers = self.model.generate(**inputs, **options)[:, ids.shape[1] :].tolist()  # [B, new]
        return [ids[: next((i for i, token in enumerate(ids) if token in stop), len(ids))] for ids in answers]
