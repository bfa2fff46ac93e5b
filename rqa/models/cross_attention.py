"""What a reader attends to: its decoder's cross-attention at the first position, seen through public interfaces.

An attention function registered as `rqa_recording` does what sdpa does. While somebody records, it also shows every
cross-attention's query, keys and values. Nothing of a model is patched.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from rqa.models.fusion import encode_passages, start_token
from rqa.packing import FusionBatch

RECORDING_ATTENTION = "rqa_recording"

Record = Callable[[Tensor, Tensor], None]
_record: ContextVar[Record | None] = ContextVar("record", default=None)


def recording_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention of one decoded position, written out and recorded; whatever nobody records goes to sdpa.

    Args:
        query: [B, H, 1, d]; key and value [B, H_kv, S, d], where H_kv divides H.
        attention_mask: True where a key is seen. [B, 1, 1, S]
    """
    record = _record.get()
    if record is None:
        kwargs |= {"scaling": scaling, "softcap": softcap}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))  # [B, H, S, d]
    scores = query.float() @ key.float().mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)  # [B, H, 1, S]
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, float("-inf"))
    record(scores[:, :, 0], value)
    return (scores.softmax(-1).to(value.dtype) @ value).transpose(1, 2), None


AttentionInterface.register(RECORDING_ATTENTION, recording_attention)
AttentionMaskInterface.register(RECORDING_ATTENTION, sdpa_mask)


def observe(model: PreTrainedModel) -> None:
    """Make the decoder's attention one that `passage_scores` sees."""
    model.get_decoder().set_attn_implementation(RECORDING_ATTENTION)


@torch.no_grad()
def passage_scores(model: PreTrainedModel, batch: FusionBatch, kind: str = "plain") -> Tensor:
    """How much the first decoded position attends to each passage (Izacard & Grave 2020, section 3.2). -> [B, K]

    The mean over layers, heads and the passage's real tokens, in float32; -inf where a question has fewer passages.

    Args:
        model: An encoder-decoder, observed.
        kind: `plain` takes the score before the softmax, with the model's own scale; `value_norm` the probability
            times the norm of the value (Izacard et al. 2022, Atlas, equation 3).
    """
    inputs = encode_passages(model, batch)
    first = torch.full((len(batch.owners), 1), start_token(model), device=batch.owners.device)
    layers: list[Tensor] = []

    def record(scores: Tensor, value: Tensor) -> None:
        if scores.shape[-1] != batch.owners.shape[1]:
            return  # the decoder's own, over one position
        tokens = scores.softmax(-1) * value.float().norm(dim=-1) if kind == "value_norm" else scores  # [B, H, S]
        layers.append(tokens.mean(1))

    with _recording(record):
        model(**inputs, decoder_input_ids=first, use_cache=False)
    assert layers, "no cross-attention was seen"
    tokens = torch.stack(layers).mean(0)  # [B, S]
    return mean_by_owner(tokens, batch.owners)


def mean_by_owner(values: Tensor, owners: Tensor) -> Tensor:
    """The mean of each passage's values; -inf for a passage that a question does not have. [B, S], [B, S] -> [B, K]"""
    column = owners + 1  # the padding's is dropped
    shape = (len(owners), int(column.max()) + 1)
    values = values.masked_fill(owners < 0, 0.0)  # padding scores -inf
    sums = values.new_zeros(shape).scatter_add(1, column, values)
    counts = values.new_zeros(shape).scatter_add(1, column, torch.ones_like(values))
    return (sums / counts).masked_fill(counts == 0, float("-inf"))[:, 1:]


@contextmanager
def _recording(record: Record) -> Iterator[None]:
    token = _record.set(record)
    try:
        yield
    finally:
        _record.reset(token)
