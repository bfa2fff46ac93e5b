"""Attention over packed rows, registered with `transformers` as the attention implementation `rqa_packed`.

A packed row holds several sequences end to end, separated by the borders `cu_seq_lens_q`; each attends to itself only.
All other calls behave as `transformers`' own sdpa, and unsupported ones raise. Packed rows ignore attention dropout: no
fused kernel supports it, and materialised probabilities would take half of a training step's memory. Dropout of hidden
states is unaffected.
"""

import inspect
import math
from itertools import groupby
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from rqa.runtime.distributed import cpu_has_bf16

PACKED_ATTENTION = "rqa_packed"

# Instead of a packed row's T x T mask there is a placeholder: one byte, expanded to that shape. Its dtype tells whether
# the pattern has a window; sdpa would refuse both dtypes.
PACKED_MASK, WINDOWED_MASK = torch.uint8, torch.int8

# torch 2.11's kernel always accepts grouped heads; from 2.12 on they need this flag.
GROUPED_HEADS = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}

QUERY_ROWS = 256  # queries in a block of `_written_out`
FEWEST_WRITTEN_OUT, LONGEST_WRITTEN_OUT = 64, 1024  # tokens; the backward pass needs the probabilities in memory


def packed_attention(
    module: nn.Module,
    query: Tensor,  # [1, H, T, d]
    key: Tensor,  # [1, H_kv, T, d], where H_kv divides H
    value: Tensor,  # [1, H_kv, T, d]
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,  # a token sees others less than this many positions away
    cu_seq_lens_q: Tensor | None = None,  # where each sequence starts, then T. [B + 1]
    max_length_q: int | None = None,
    sequence_lengths: SimpleNamespace | None = None,  # `values`: lengths as numbers, without a device sync
    kept: list[tuple[Tensor, Tensor]] | None = None,  # receives this layer's keys and values, for a cache
    cached: Any = None,  # all layers' keys and values, [B, H_kv, L, d] each, and the column of the new ones
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend within each sequence of a packed row; pass other calls to sdpa. -> [1, T, H, d]"""
    if kept is not None:
        kept.append((key, value))
    if cached is not None:  # in place, unlike `transformers`' caches, which copy or count in each layer
        (keys, values), place = cached[0][module.layer_idx], cached[1]
        key = keys.index_copy_(2, place, key.to(keys.dtype))  # under autocast, rotary embeddings make keys float32
        value = values.index_copy_(2, place, value)
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    mask_dtype = None if attention_mask is None else attention_mask.dtype
    placeholder = mask_dtype in (PACKED_MASK, WINDOWED_MASK)
    if cu_seq_lens_q is None and placeholder and not causal:  # an encoder's row without borders is one sequence
        max_length_q = query.shape[2]
        cu_seq_lens_q = torch.tensor([0, max_length_q], dtype=torch.int32, device=query.device)
    if kwargs.get("s_aux") is not None:
        raise NotImplementedError("attention sinks (s_aux), which sdpa would ignore")
    one_sequence = cu_seq_lens_q is None or (attention_mask is not None and cu_seq_lens_q.numel() == 2)
    shared = attention_mask is not None and attention_mask.is_floating_point() and attention_mask.shape[1] == 1
    if query.shape[2] == 1 and one_sequence and shared:  # one mask for all heads
        return _next_token(query, key, value, attention_mask, scale), None
    if one_sequence and not placeholder:  # or a padded batch with a full mask
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
        )
    refused = {
        "position_ids that restart, without cu_seq_lens_q": cu_seq_lens_q is None,
        "a mask (from a cache? then call it with use_cache=False)": attention_mask is not None and not placeholder,
        "a pattern that only the mask defines": mask_dtype == WINDOWED_MASK and sliding_window is None,
        "several rows": query.shape[0] != 1,
        "keys that are not the queries' own": query.shape[2] != key.shape[2],
    } | {name: kwargs.get(name) is not None for name in ("softcap", "position_bias", "cache")}
    if any(refused.values()):
        raise NotImplementedError(f"packed attention with {next(name for name, found in refused.items() if found)}")

    if torch.is_autocast_enabled(query.device.type):  # rotary embeddings make queries and keys float32
        query, key, value = (x.to(torch.get_autocast_dtype(query.device.type)) for x in (query, key, value))
    window = sliding_window if sliding_window is not None and sliding_window < (max_length_q or math.inf) else None
    if _kernel_takes(query, value):
        reach = -1 if window is None else window - 1
        rows = (x[0].transpose(0, 1) for x in (query, key, value))  # [T, H, d] each
        borders = (cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q)
        output = varlen_attn(*rows, *borders, scale=scale, window_size=(reach, 0 if causal else reach), **GROUPED_HEADS)
        return output[None], None
    return _one_by_one(query, key, value, sequence_lengths or cu_seq_lens_q, scale, causal, window), None


def packed_mask(**call: Any) -> Tensor | None:
    """sdpa's mask, or the placeholder for one unpadded row, which may be packed. [1, 1, T, T]"""
    length, window = call["q_length"], call.get("local_size")
    one_row = call.get("attention_mask") is None and call["batch_size"] == 1 and length == call["kv_length"]
    if one_row and call.get("allow_is_bidirectional_skip", False) and window is None:
        return None  # for an encoder; `transformers` 5.17 would make a mask while compiling
    # `transformers` withdraws `allow_is_causal_skip` for restarting position ids, and for every encoder. Mask functions
    # of a model itself (`use_vmap`) are unknown, except that of Gemma 3 configured as an encoder.
    known = not call.get("use_vmap") or getattr(call.get("config"), "use_bidirectional_attention", False) is True
    if one_row and known and not call.get("allow_is_causal_skip", True):
        dtype = PACKED_MASK if window is None else WINDOWED_MASK
        return torch.zeros((), dtype=dtype, device=call.get("device", "cpu")).expand(1, 1, length, length)
    return sdpa_mask(**call)


def _kernel_takes(query: Tensor, value: Tensor) -> bool:
    """Whether CUDA's fused kernel supports this: 16 bits, Ampere or later, and the width of heads."""
    width = query.shape[-1]
    fits = query.element_size() == 2 and width % 8 == 0 and width <= 256 and width == value.shape[-1]
    return fits and query.is_cuda and torch.cuda.get_device_capability(query.device) >= (8, 0)


def _next_token(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Attend from one new token of each sequence; heads that share keys are rows of one product. -> [B, 1, H, d]

    transformers 5.17 would copy the keys for each such head. On CPUs with bfloat16 instructions (AVX512-BF16) sdpa
    takes twice as long as separate operations.
    """
    grouped = query.reshape(len(query), key.shape[1], -1, query.shape[-1])  # [B, H_kv, H / H_kv, d]
    if query.device.type == "cpu" and query.dtype == torch.bfloat16 and cpu_has_bf16():
        output = ((grouped * scale) @ key.mT + mask).softmax(-1) @ value
    else:
        output = scaled_dot_product_attention(grouped, key, value, attn_mask=mask, scale=scale)
    return output.reshape(len(query), 1, query.shape[1], -1)


@torch.compiler.disable  # a graph break, instead of a compilation for each set of lengths
def _one_by_one(
    query: Tensor, key: Tensor, value: Tensor, sequences: Any, scale: float, causal: bool, window: int | None
) -> Tensor:
    """Attend in one sequence after the other; adjacent ones of equal length are batched. -> [1, T, H, d]

    `sequences`: their lengths in a namespace, or their borders in a tensor, which costs a device sync.
    On CPUs with bfloat16 instructions (AVX512-BF16) sdpa takes 1.5 times (864 tokens, causal) to 3 times (190 tokens,
    full) as long as `_written_out`, but half as long for fewer than 64 tokens. Elsewhere, and in float32, sdpa is not
    slower and stores no probabilities.
    """
    slow_kernel = query.device.type == "cpu" and query.dtype == torch.bfloat16 and cpu_has_bf16()
    lengths = sequences.diff().tolist() if isinstance(sequences, Tensor) else sequences.values
    grouped = query.shape[1] != key.shape[1]

    def attend(*qkv: Tensor) -> Tensor:  # [count, H, length, d] each -> [count, length, H, d]
        count, _, length, _ = qkv[0].shape
        slower = slow_kernel and count * length >= FEWEST_WRITTEN_OUT and length <= LONGEST_WRITTEN_OUT
        if window is not None or slower:
            return _written_out(*qkv, scale, causal, window).transpose(1, 2)
        output = scaled_dot_product_attention(*qkv, is_causal=causal, scale=scale, enable_gqa=grouped)
        return output.transpose(1, 2)

    if len(lengths) == 1:  # a question
        return attend(query, key, value)
    runs = [(length, len(list(run))) for length, run in groupby(lengths)]
    rows = [length * count for length, count in runs]
    parts = (x[0].split(rows, dim=1) for x in (query, key, value))
    outputs = []
    for (length, count), *part in zip(runs, *parts, strict=True):
        outputs.append(attend(*(x.unflatten(1, (count, length)).transpose(0, 1) for x in part)).flatten(0, 1))
    return torch.cat(outputs)[None]


def _written_out(query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool, window: int | None) -> Tensor:
    """softmax(query @ key.T) @ value in blocks of queries, each with the keys in its reach. -> [B, H, L, d]"""
    if key.shape[1] != query.shape[1]:
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))  # [B, H, L, d]
    length = query.shape[2]
    if not causal and window is None and length <= QUERY_ROWS:  # fast path for short sequences such as questions
        return ((query * scale) @ key.mT).softmax(-1) @ value
    reach = window or length
    position = torch.arange(length, device=query.device)
    outputs = []
    for start in range(0, length, QUERY_ROWS):
        end = min(start + QUERY_ROWS, length)
        seen = slice(max(0, start - reach + 1), end if causal else min(length, end + reach - 1))
        scores = (query[:, :, start:end] * scale) @ key[:, :, seen].mT  # [B, H, R, K]
        if causal or window is not None:
            distance = position[start:end, None] - position[seen]  # [R, K]
            hidden = (distance.abs() >= reach) | (distance < 0 if causal else False)
            scores = scores.masked_fill(hidden, -torch.inf)
        outputs.append(scores.softmax(-1) @ value[:, :, seen])
    return torch.cat(outputs, dim=2)


AttentionInterface.register(PACKED_ATTENTION, packed_attention)
AttentionMaskInterface.register(PACKED_ATTENTION, packed_mask)
