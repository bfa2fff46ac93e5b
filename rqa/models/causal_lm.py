"""Decoder language models: logits of answers alone, and batched generation."""

import inspect
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, StaticCache

from rqa.data.documents import Document
from rqa.data.examples import Example
from rqa.models.generation import WARM_UP_TOKENS, Answer, GenerationArguments, answer_in_batches
from rqa.models.loading import evaluating, load_model
from rqa.packing import AnswerBatch, pad
from rqa.prompts import DoesNotFit, Prompter
from rqa.runtime.parallelize import is_sharded

log = logging.getLogger(__name__)


def load_causal_lm(path: str, **options: Any) -> PreTrainedModel:
    """A decoder from a directory or hub name; options are those of `load_model`."""
    return load_model(AutoModelForCausalLM, path, **options)


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


class CausalLMReader:
    """Answers questions over passages with a decoder.

    Attributes:
        model: The decoder; may be in training, its mode is restored.
        max_batch_tokens: Prompt and answer tokens of one generation batch, padding included.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        prompter: Prompter,
        arguments: GenerationArguments | None = None,
        max_batch_tokens: int = 16384,
    ) -> None:
        self.model = model
        self.prompter = prompter
        self.arguments = arguments or GenerationArguments()
        self.max_batch_tokens = max_batch_tokens

    def answer(
        self, examples: Sequence[Example], passages: Sequence[Sequence[Document]], progress: bool = True
    ) -> list[Answer]:
        """One answer for each question, from prompts of similar length together. [Q] -> [Q]

        A question that does not fit by itself is reported and answered by nothing.
        """
        prompts = [self._prompt(*pair) for pair in zip(examples, passages, strict=True)]
        lengths = [len(prompt) + self.prompter.arguments.max_new_tokens for prompt in prompts]
        return answer_in_batches(
            self.model,
            prompts,
            lengths,
            self.max_batch_tokens,
            self.generate,
            self.prompter.decode,
            self.prompter.stop_ids,
            progress,
        )

    def warm_up(self, example: Example, passages: Sequence[Document]) -> None:
        """Begin an answer, so that what only a first batch costs is in no latency."""
        if prompt := self._prompt(example, passages):
            self.generate([prompt], WARM_UP_TOKENS)

    def _prompt(self, example: Example, passages: Sequence[Document]) -> list[int]:
        try:
            return self.prompter.encode(example, passages).ids
        except DoesNotFit as error:
            log.warning("%s; it is left unanswered", error)
            return []

    @torch.no_grad()
    def generate(self, prompts: Sequence[Sequence[int]], max_new_tokens: int | None = None) -> list[list[int]]:
        """Continuations of one batch of prompts, up to the stop token. [B] -> [B]

        Args:
            max_new_tokens: Of each; by default as many as an answer may have.
        """
        stop = self.prompter.stop_ids
        # Right-padding the reversed prompts and reversing again pads on the left.
        reversed_batch = pad([prompt[::-1] for prompt in prompts], stop[0]).to(self.model.device)
        inputs = {name: value.flip(1) for name, value in reversed_batch.inputs.items()}  # [B, L]
        most = max_new_tokens or self.prompter.arguments.max_new_tokens
        config = self.arguments.config(most, stop, disable_compile=True)
        cache = None
        if self.model._can_compile_fullgraph:  # keys written in place; otherwise all of them are copied for each token
            cache = StaticCache(self.model.config, max_cache_len=inputs["input_ids"].shape[1] + most)
        with evaluating(self.model):
            synced = is_sharded(self.model)  # then a process that is done steps on until all are
            output = self.model.generate(
                **inputs, generation_config=config, synced_gpus=synced, past_key_values=cache
            )  # [B, L + new]
        new = output[:, inputs["input_ids"].shape[1] :].tolist()
        return [ids[: next((i for i, token in enumerate(ids) if token in stop), len(ids))] for ids in new]
