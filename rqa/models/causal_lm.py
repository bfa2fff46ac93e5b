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
    width = inputs["input_ids"].shape[1]
    columns, rows = batch.positions % width, batch.positions // width  # [N], [N]
    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        return model(**inputs, use_cache=False).logits[rows, columns]
    if inputs["input_ids"].shape[0] == 1:
        return model(**inputs, use_cache=False, logits_to_keep=columns).logits[0]
    kept, columns = columns.unique(return_inverse=True)
    return model(**inputs, use_cache=False, logits_to_keep=kept).logits[rows, columns]
