"""The flags of a run of six steps, and a CPU that has bf16 or has not."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rqa.runtime import distributed
from rqa.training.arguments import LoopArguments


@pytest.fixture
def flags(tmp_path: Path) -> LoopArguments:
    return LoopArguments(output_dir=str(tmp_path / "run"), max_steps=6, per_device_train_batch_size=4,
                         learning_rate=0.05, logging_steps=2, save_steps=2, save_total_limit=9,
                         metric_for_best_model="loss")  # fmt: skip


@pytest.fixture
def has_bf16(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[bool], None]]:
    def pretend(answer: bool) -> None:
        distributed.compute_dtype.cache_clear()
        monkeypatch.setattr(distributed, "cpu_has_bf16", lambda: answer)

    yield pretend
    distributed.compute_dtype.cache_clear()
