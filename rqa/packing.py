"""Token batches: sequences packed end to end in one row, without padding.

`transformers` runs a model on a packed row with `position_ids` that restart at 0 and the sequences' borders
(`cu_seq_lens_*`). Models that cannot be packed get padded batches. All that a step needs to know about a batch is
computed here, on the CPU, since reading values from a GPU would stall Python.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from types import SimpleNamespace
from typing import Any, Self

import torch
import numpy as np
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from transformers import PreTrainedModel

from rqa.prompts import TokenSequence


class Batch:
    """Base of frozen dataclasses that move to a device with all their tensors and nested batches."""

    def to(self, device: torch.device) -> Self:
        def moved(value: Any) -> Any:
            if isinstance(value, Batch):
                return value.to(device)
            if isinstance(value, Tensor) and value.device.type == "cpu" and device.type == "cuda":
                value = value.pin_memory()  # else the copy would wait for the device
            return value.to(device, non_blocking=True) if isinstance(value, Tensor) else value

        return replace(self, **tree_map(moved, vars(self)))

    @property
    def num_tokens(self) -> int:
        """Number of real tokens in all nested batches, the unit of throughput."""
        return sum(part.num_tokens for part in tree_leaves(vars(self)) if isinstance(part, Batch))


@dataclass(frozen=True)
class TokenBatch(Batch):
    """B sequences as a model's keyword arguments, and the places of their T tokens in its output, flattened to rows."""

    inputs: dict[str, Any]  # input_ids [1, T] and the borders (packed), or input_ids [B, L] and a mask (padded)
    starts: Tensor  # the row of each sequence's first token. [B]
    lengths: Tensor  # real tokens of each sequence. [B]
    rows: Tensor  # the rows of real tokens, one sequence after the other. [T]
    owners: Tensor  # the sequence of each of these tokens. [T]

    @property
    def num_tokens(self) -> int:
        return len(self.rows)

    def real(self, output: Tensor) -> Tensor:
        """The output rows of real tokens. [rows, D] -> [T, D]"""
        return output if len(output) == len(self.rows) else output[self.rows]


Collate = Callable[[Sequence[Sequence[int]]], TokenBatch]


def pack(sequences: Sequence[Sequence[int]]) -> TokenBatch:
    """Pack sequences into one row. [B] lists -> input_ids [1, T]"""
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    borders = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))  # [B + 1]
    owners = torch.arange(len(lengths)).repeat_interleave(lengths)  # [T]
    rows = torch.arange(len(owners))
    inputs: dict[str, Any] = {"input_ids": _joined(sequences)[None], "position_ids": (rows - borders[owners])[None]}
    for side in ("q", "k"):  # queries and keys have the same borders
        inputs |= {f"cu_seq_lens_{side}": borders.to(torch.int32), f"max_length_{side}": int(lengths.max())}
    inputs["sequence_lengths"] = SimpleNamespace(values=lengths.tolist())  # opaque to torch.compile
    return TokenBatch(inputs, borders[:-1], lengths, rows, owners)


def pad(sequences: Sequence[Sequence[int]]) -> TokenBatch:
    """Pad sequences on the right with token 0, which is masked. [B] lists -> input_ids [B, L]"""
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    longest = int(lengths.max())
    mask = torch.arange(longest) < lengths[:, None]  # [B, L]
    input_ids = torch.zeros(mask.shape, dtype=torch.long)
    input_ids[mask] = _joined(sequences)
    starts, rows = torch.arange(len(sequences)) * longest, mask.flatten().nonzero()[:, 0]
    return TokenBatch({"input_ids": input_ids, "attention_mask": mask.long()}, starts, lengths, rows, rows // longest)


def _joined(sequences: Sequence[Sequence[int]]) -> Tensor:
    """All token ids, one sequence after the other; `torch.tensor` of a list takes seven times as long. [T]"""
    return torch.from_numpy(np.fromiter(chain.from_iterable(sequences), np.int64))


@dataclass(frozen=True)
class AnswerBatch(Batch):
    """Prompts with answers, and the positions of the answers' logits."""

    tokens: TokenBatch
    positions: Tensor  # rows of the flattened output that predict an answer token. [N]
    targets: Tensor  # the answer tokens. [N]
    owners: Tensor  # the sequence of each answer token. [N]
    columns: Tensor  # the distinct columns of `positions` in input_ids. [C]
    column_of: Tensor  # the index in `columns` of each position. [N]
    indices: tuple[int, ...] = ()  # the examples' numbers in their file, for messages

    @property
    def weight(self) -> int:
        """Number of target tokens; the loss sum is divided by the total over micro-batches and processes."""
        return self.targets.numel()


def answer_batch(sequences: Sequence[TokenSequence], collate: Collate, indices: Sequence[int] = ()) -> AnswerBatch:
    """Collate prompts with answers; the logits of an answer token are one position before it."""
    tokens = collate([sequence.ids for sequence in sequences])
    placed = zip(sequences, tokens.starts, strict=True)
    positions = torch.cat([torch.arange(s.answer_start - 1, len(s.ids) - 1) + start for s, start in placed])
    columns, column_of = (positions % tokens.inputs["input_ids"].shape[1]).unique(return_inverse=True)
    answers = [sequence.ids[sequence.answer_start :] for sequence in sequences]
    owners = torch.arange(len(answers)).repeat_interleave(torch.tensor(list(map(len, answers))))
    return AnswerBatch(tokens, positions, _joined(answers), owners, columns, column_of, tuple(indices))


def answer_logits(model: PreTrainedModel, batch: AnswerBatch) -> Tensor:
    """A decoder's logits of the answer tokens; the output layer runs on no other positions. -> [N, V]"""
    inputs = batch.tokens.inputs
    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        return model(**inputs, use_cache=False).logits.flatten(0, 1)[batch.positions]
    logits = model(**inputs, use_cache=False, logits_to_keep=batch.columns).logits  # [B, C, V], or [1, N, V]
    rows = batch.positions // inputs["input_ids"].shape[1]  # [N]
    return logits[0] if len(logits) == 1 else logits[rows, batch.column_of]


def token_budget_batches(
    lengths: Sequence[int], max_tokens: int, padded: bool = False, least_full: float = 0.0
) -> list[list[int]]:
    """Batches of sequence indices, longest first, each of at most `max_tokens` tokens or of one sequence.

    With the longest first, an out-of-memory error comes at once, and batches have similar lengths. In a padded batch
    each sequence costs as much as the longest one, and is at least `least_full` times as long.
    """
    batches: list[list[int]] = []
    longest, room = 0, -1  # of the current batch
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        cost = longest if padded else lengths[index]
        if cost > room or lengths[index] < least_full * longest:
            batches.append([])
            longest = cost = lengths[index]
            room = max(max_tokens, cost)
        batches[-1].append(index)
        room -= cost
    return batches
