"""Token batches: sequences laid end to end in one row, with no padding computed.

`transformers` runs a model on a packed row when it is given `position_ids` that restart at 0 and the sequences'
borders (`cu_seq_lens_*`). Models that cannot be packed get the same batch padded; either way a token is found in the
flattened output through `TokenBatch.starts`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, Self

import torch
from torch import Tensor

from rqa.prompts import TokenSequence

IGNORED = -100  # the label of a position without loss


class Batch:
    """A frozen dataclass that moves to a device with all its tensors and batches."""

    def to(self, device: torch.device) -> Self:
        def moved(value: Any) -> Any:
            if isinstance(value, dict):
                return {name: moved(part) for name, part in value.items()}
            if isinstance(value, tuple):
                return tuple(map(moved, value))
            if isinstance(value, Batch):
                return value.to(device)
            return value.to(device, non_blocking=True) if isinstance(value, Tensor) else value

        return replace(self, **moved(vars(self)))


@dataclass(frozen=True)
class TokenBatch(Batch):
    """B sequences as a model's keyword arguments."""

    inputs: dict[str, Any]  # input_ids [1, T] and the borders (packed), or input_ids [B, L] and a mask (padded)
    starts: Tensor  # the row of each sequence's first token in the output flattened to [rows, width]. [B]
    lengths: Tensor  # real tokens of each sequence. [B]

    @property
    def rows(self) -> Tensor:
        """The rows of the flattened output that belong to real tokens, one sequence after the other. [T]"""
        owners = torch.arange(len(self.lengths), device=self.lengths.device).repeat_interleave(self.lengths)  # [T]
        first = self.starts - (self.lengths.cumsum(0) - self.lengths)
        return first[owners] + torch.arange(len(owners), device=owners.device)


Collate = Callable[[Sequence[Sequence[int]]], TokenBatch]


def pack(sequences: Sequence[Sequence[int]]) -> TokenBatch:
    """Lay sequences end to end in one row. [B] lists -> input_ids [1, T]"""
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    borders = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))  # [B + 1]
    ids = torch.tensor([token for sequence in sequences for token in sequence])  # [T]
    positions = torch.arange(len(ids)) - borders[:-1].repeat_interleave(lengths)  # [T]
    inputs: dict[str, Any] = {"input_ids": ids[None], "position_ids": positions[None]}
    for side in ("q", "k"):  # queries and keys have the same borders
        inputs |= {f"cu_seq_lens_{side}": borders.to(torch.int32), f"max_length_{side}": int(lengths.max())}
    inputs["sequence_lengths"] = SimpleNamespace(values=lengths.tolist())  # what compiled code need not look into
    return TokenBatch(inputs, borders[:-1], lengths)


def pad(sequences: Sequence[Sequence[int]], pad_id: int = 0) -> TokenBatch:
    """Pad sequences on the right. [B] lists -> input_ids [B, L]"""
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    longest = int(lengths.max())
    mask = torch.arange(longest) < lengths[:, None]  # [B, L]
    input_ids = torch.full(mask.shape, pad_id)
    input_ids[mask] = torch.tensor([token for sequence in sequences for token in sequence])
    starts = torch.arange(len(sequences)) * longest
    return TokenBatch({"input_ids": input_ids, "attention_mask": mask.long()}, starts, lengths)


@dataclass(frozen=True)
class AnswerBatch(Batch):
    """Prompts with answers, and where the answers' logits are."""

    tokens: TokenBatch
    positions: Tensor  # rows of the flattened output that predict an answer token. [N]
    targets: Tensor  # the answer tokens. [N]
    owners: Tensor  # the sequence that each answer token belongs to. [N]
    indices: tuple[int, ...] = ()  # the examples' numbers in their file, for messages

    @property
    def weight(self) -> int:
        """Target tokens: what the loss sum is divided by, over all micro-batches and processes."""
        return self.targets.numel()

    @property
    def num_tokens(self) -> int:
        """Real tokens, the unit of throughput."""
        return int(self.tokens.lengths.sum())


def answer_batch(sequences: Sequence[TokenSequence], collate: Collate, indices: Sequence[int] = ()) -> AnswerBatch:
    """Collate prompts with answers; the logits wanted stand one before each answer token."""
    tokens = collate([sequence.ids for sequence in sequences])
    placed = zip(sequences, tokens.starts, strict=True)
    positions = [torch.arange(each.answer_start - 1, len(each.ids) - 1) + start for each, start in placed]
    answers = [sequence.ids[sequence.answer_start :] for sequence in sequences]
    targets = torch.tensor([token for answer in answers for token in answer])
    owners = torch.arange(len(answers)).repeat_interleave(torch.tensor(list(map(len, answers))))
    return AnswerBatch(tokens, torch.cat(positions), targets, owners, tuple(indices))


def token_budget_batches(
    lengths: Sequence[int], max_tokens: int, padded: bool = False, least_full: float = 0.0
) -> list[list[int]]:
    """Indices of sequences, longest first, in batches of at most `max_tokens` tokens (one sequence at least).

    Longest first makes an out-of-memory error come at once, and neighbours of similar length. In a padded batch each
    sequence costs as much as the longest one; none is shorter than that times `least_full`.
    """
    batches: list[list[int]] = []
    longest, room = 0, -1  # of the last batch
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        cost = longest if padded else lengths[index]
        if cost > room or lengths[index] < least_full * longest:
            batches.append([])
            longest = cost = lengths[index]
            room = max(max_tokens, cost)
        batches[-1].append(index)
        room -= cost
    return batches
