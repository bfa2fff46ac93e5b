"""What a training run reads and where it writes."""

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rqa.data.examples import Example, read_examples
from rqa.runtime import distributed
from rqa.runtime.cli import log_to_file
from rqa.runtime.files import write_json


@dataclass
class DataArguments:
    """Where everything comes from."""

    model_name_or_path: str = field(metadata={"help": "The model to train: a directory or a hub name."})
    train_file: str = field(metadata={"help": "Training examples, JSONL."})
    full_dataset_file_path: str = field(metadata={"help": "The document database: .jsonl, or LocalRQA's .pkl."})
    eval_file: str | None = field(default=None, metadata={"help": "Examples that choose the best model."})
    test_file: str | None = field(default=None, metadata={"help": "Examples for the final scores."})
    full_dataset_index_path: str | None = field(
        default=None, metadata={"help": "The index: built there if absent or stale; by default in memory."}
    )


def optional_examples(path: str | None, answers: bool = False) -> list[Example]:
    """The examples of a file that need not be given."""
    return read_examples(path, answers) if path else []


def subset(examples: list[Example], size: int, seed: int) -> list[Example]:
    """A fixed seeded subset in file order; size 0: all."""
    if not 0 < size < len(examples):
        return examples
    return [examples[i] for i in sorted(random.Random(seed).sample(range(len(examples)), size))]


def open_output(output_dir: str, all_arguments: Sequence[Any]) -> None:
    """Make the output directory, keep the arguments in it and log to it."""
    if distributed.is_main():
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        merged = {name: value for part in all_arguments for name, value in asdict(part).items()}
        write_json(Path(output_dir) / "all_args.json", merged)
        log_to_file(str(Path(output_dir) / "train.log"))
    distributed.barrier()
