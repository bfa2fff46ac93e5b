"""Attention over packed rows, registered with `transformers` as an attention implementation.

A packed row holds several sequences end to end; `cu_seq_lens_q` says where they begin, and each attends to itself
alone. Any other call goes to `transformers`' own sdpa.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

PACKED_ATTENTION = "rqa_packed"
UNSUPPORTED = ("softcap", "s_aux", "position_bias", "cache")


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    if cu_seq_lens_q is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
        )
    asked = [name for name in UNSUPPORTED if kwargs.get(name) is not None]
    if sliding_window is not None and sliding_window < kwargs["max_length_q"]:
        asked.append("sliding_window")
    if asked or attention_mask is not None or query.shape[0] != 1 or query.shape[2] != key.shape[2]:
        raise NotImplementedError(f"a packed row with {', '.join(asked) or 'a mask, a batch or a cache'}")
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    lengths = cu_seq_lens_q.diff().tolist()
    outputs = [
        scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scaling, is_causal=causal, enable_gqa=True)
        for q, k, v in zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True)
    ]
    return torch.cat(outputs, 2).transpose(1, 2), None


def packed_mask(*args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
    one_row = attention_mask is None and kwargs["batch_size"] == 1 and kwargs["q_length"] == kwargs["kv_length"]
    if one_row and not kwargs.get("allow_is_causal_skip", True):
        return None
    return sdpa_mask(*args, attention_mask=attention_mask, **kwargs)


AttentionInterface.register(PACKED_ATTENTION, packed_attention)
AttentionMaskInterface.register(PACKED_ATTENTION, packed_mask)
