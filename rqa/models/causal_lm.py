"""Decoder language models, and the logits of answers alone."""

import inspect

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from rqa.models.loading import FLOAT32, LoadingArguments, load_model
from rqa.packing import AnswerBatch


def load_causal_lm(
    path: str, flags: LoadingArguments = FLOAT32, dtype: torch.dtype | None = None, main_only: bool = False
) -> PreTrainedModel:
    """A decoder from a directory or hub name; the arguments are those of `load_model`."""
    return load_model(AutoModelForCausalLM, path, flags, dtype, main_only)


def answer_logits(model: PreTrainedModel, batch: AnswerBatch) -> Tensor:
    """Next-token logits at the answers' positions only; the output layer runs on no other token. -> [N, V]"""
    inputs = batch.tokens.inputs
    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        return model(**inputs, use_cache=False).logits.flatten(0, 1)[batch.positions]
    logits = model(**inputs, use_cache=False, logits_to_keep=batch.columns).logits  # [B, C, V], or [1, N, V]
    rows = batch.positions // inputs["input_ids"].shape[1]  # [N]
    return logits[0] if len(logits) == 1 else logits[rows, batch.column_of]
