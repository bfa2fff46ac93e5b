"""The flags of a run of six steps."""

from pathlib import Path

import pytest

from rqa.training.arguments import LoopArguments


@pytest.fixture
def flags(tmp_path: Path) -> LoopArguments:
    return LoopArguments(output_dir=str(tmp_path / "run"), max_steps=6, per_device_train_batch_size=4,
                         learning_rate=0.05, logging_steps=2, save_steps=2, save_total_limit=9,
                         metric_for_best_model="loss")  # fmt: skip
