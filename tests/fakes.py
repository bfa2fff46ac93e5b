"""An objective small enough to compute by hand, a run of it as a recipe makes one, edited files, and a full disk."""

import json
import math
import resource
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from safetensors.torch import load_file, save_file

from rqa.objectives.encoding import Chunks
from rqa.training.arguments import LoopArguments
from rqa.training.checkpoint import checkpoint_to_resume
from rqa.training.loop import Batches, train


@dataclass
class Batch:
    """Rows with unequal weights, like answers of unequal length."""

    rows: Tensor  # [n, 4]
    weights: Tensor  # [n]
    indices: tuple[int, ...]

    @property
    def weight(self) -> float:
        return float(self.weights.sum())

    @property
    def num_tokens(self) -> int:
        return len(self.rows)

    def to(self, device: torch.device) -> "Batch":
        return self


class Regression(nn.Module):
    """A linear layer behind dropout: the loss sum is the weighted squared error."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.linear = nn.Linear(4, 1)
        self.dropout = nn.Dropout(dropout)
        self.seen: list[int] = []

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        self.seen += batch.indices
        error = self.linear(self.dropout(batch.rows)).squeeze(-1) - batch.rows.sum(-1)
        return (batch.weights * error**2).sum(), {"answer": 42.0}

    def save_pretrained(self, directory: str | Path) -> None:
        save_file(dict(self.state_dict()), Path(directory) / "w.safetensors")


def make_batches(flags: LoopArguments, size: int = 16, poison: int | None = None) -> Batches:
    rows = torch.randn(size, 4, generator=torch.Generator().manual_seed(5))
    weights = torch.arange(1.0, size + 1)
    if poison is not None:
        rows[poison] = math.inf
    return Batches(size, lambda indices: Batch(rows[list(indices)], weights[list(indices)], tuple(indices)), flags)


def run(
    flags: LoopArguments, objective: Regression | None = None, ahead: bool = False, **options: object
) -> Regression:
    """Resume if asked, then train; the trained objective has the run's state."""
    Path(flags.output_dir).mkdir(parents=True, exist_ok=True)
    objective = objective or Regression(dropout=0.2)
    torch.manual_seed(flags.seed)
    if checkpoint := checkpoint_to_resume(flags):
        objective.load_state_dict(load_file(checkpoint / "w.safetensors"))
    batches = make_batches(flags)
    batches.ahead = ahead
    objective.state = train(objective, batches, flags, checkpoint=checkpoint, **options)
    return objective


def same_weights(ours: Regression, theirs: Regression) -> bool:
    return all(torch.equal(weight, theirs.state_dict()[name]) for name, weight in ours.state_dict().items())


def weight_in(directory: Path) -> Tensor:
    return load_file(directory / "w.safetensors")["linear.weight"]


def texts_in(chunks: Chunks) -> list[list[int]]:
    """The token ids of each text."""
    flat = [(part.inputs["input_ids"].flatten()[part.rows], part.lengths.tolist()) for part in chunks.parts]
    texts = [text.tolist() for ids, lengths in flat for text in ids.split(lengths)]
    return [texts[place] for place in chunks.places.tolist()]


class Lengths:
    """A teacher that can be computed by hand: the shorter a document, the better."""

    hit_rate = 0.25

    def __call__(self, pairs: Sequence[Any]) -> list[float]:
        return [-len(pair.document.page_content) / 10 for pair in pairs]


@torch.no_grad()
def change_weights(module: nn.Module) -> None:
    """As a training step might, only more."""
    for parameter in filter(lambda parameter: parameter.requires_grad, module.parameters()):
        parameter.add_(torch.randn_like(parameter) * 0.1)


def gradients(objective: nn.Module, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a batch, and its gradient in each parameter that it reaches."""
    objective.zero_grad()
    loss, statistics = objective(batch)
    assert all(map(math.isfinite, statistics.values()))
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in objective.named_parameters() if p.grad is not None}


def edit(file: Path, **values: object) -> None:
    """Change values in a JSON file."""
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """No file may grow beyond `size` bytes: the kernel refuses the write, as it does on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
