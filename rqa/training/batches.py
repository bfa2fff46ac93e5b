"""Which examples an optimizer step sees: a pure function of seed and step, whatever the number of processes."""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch

from rqa.runtime import distributed
from rqa.training.arguments import LoopArguments


class Batches:
    """The training data by optimizer step: `batches[step]` is this process's list of micro-batches.

    The examples form one endless stream of permutations, the one of each epoch seeded by (seed, epoch). A step takes
    the next `step_size` of them, dealt out over processes and micro-batches, so that all steps are full and all
    processes run equally often. A resumed run needs its step and its position in the stream and nothing else to see
    the very same batches; with another number of processes or batch size it goes on where the stream was left.
    """

    def __init__(self, size: int, collate: Callable[[Sequence[int]], Any], arguments: LoopArguments) -> None:
        """
        Args:
            size: The number of examples.
            collate: Example indices -> one micro-batch, with `weight`, `num_tokens`, `indices` and `to(device)`.
            arguments: Batch size, accumulation, epochs or steps, and seed.
        """
        self.size = size
        self.collate = collate
        self.width = arguments.per_device_train_batch_size
        self.step_size = self.width * arguments.gradient_accumulation_steps * distributed.world_size()
        self.seed = arguments.seed
        self.max_steps = arguments.max_steps
        self.epochs = arguments.num_train_epochs
        self.start_at(0, 0)

    def start_at(self, step: int, position: int) -> None:
        """Go on after so many steps, which took so many examples from the stream."""
        self.first_step, self.first_position = step, position

    def __len__(self) -> int:
        if self.max_steps > 0:
            return self.max_steps
        return self.first_step + max(math.ceil((self.epochs * self.size - self.first_position) / self.step_size), 0)

    def position(self, step: int) -> int:
        """Examples that the steps before this one take from the stream."""
        return self.first_position + (step - self.first_step) * self.step_size

    def epoch(self, step: int) -> float:
        """Passes over the data after so many steps."""
        return self.position(step) / self.size

    def __getitem__(self, step: int) -> list[Any]:
        stream = range(self.position(step), self.position(step + 1))
        orders = {
            epoch: _order(self.size, self.seed, epoch) for epoch in {position // self.size for position in stream}
        }
        examples = [orders[position // self.size][position % self.size] for position in stream]
        mine = distributed.share(examples)
        return [self.collate(mine[start : start + self.width]) for start in range(0, len(mine), self.width)]


@lru_cache(2)
def _order(size: int, seed: int, epoch: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(size, generator=generator).tolist()
