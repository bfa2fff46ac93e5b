"""What a run reads and where it writes."""

import json
import logging
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import PreTrainedModel

from rqa.data.documents import Document, read_documents
from rqa.data.examples import Example, read_examples
from rqa.evaluation.report import DETAILS, PREDICTIONS, SCORES
from rqa.models.loading import LoadingArguments
from rqa.models.lora import merged
from rqa.runtime import distributed
from rqa.runtime.cli import log_to_file
from rqa.runtime.files import write_json
from rqa.runtime.flags import given
from rqa.training.arguments import LoopArguments
from rqa.training.checkpoint import ARGUMENTS_FILE, promote
from rqa.training.state import continues

log = logging.getLogger(__name__)

ABOUT_THE_START = {"output_dir", "overwrite_output_dir", "resume_from_checkpoint"}


@dataclass
class DataArguments:
    """The model, the examples and the document database."""

    model_name_or_path: str = field(metadata={"help": "The model to train: a directory or a hub name."})
    train_file: str = field(metadata={"help": "Training examples, JSONL."})
    full_dataset_file_path: str = field(metadata={"help": "The document database: .jsonl, or LocalRQA's .pkl."})
    eval_file: str | None = field(default=None, metadata={"help": "Examples that choose the best model."})
    test_file: str | None = field(default=None, metadata={"help": "Examples for the final scores."})
    full_dataset_index_path: str | None = field(
        default=None, metadata={"help": "The index: built there if absent or stale; by default in memory."}
    )


@dataclass
class EvaluationDataArguments(LoadingArguments):
    """What to evaluate, on what."""

    embedding_model_name_or_path: str = field(
        metadata={"help": "The retriever's encoder: a directory or a hub name; bm25: BM25, without an encoder."}
    )
    document_path: str = field(metadata={"help": "The document database: .jsonl, or LocalRQA's .pkl."})
    eval_data_path: str = field(metadata={"help": "Examples, JSONL: with gold passages, and answers for a reader."})
    output_dir: str = field(metadata={"help": "Where scores, predictions and report go."})
    index_path: str | None = field(
        default=None, metadata={"help": "The index: built there if absent or stale; by default in memory."}
    )
    max_examples: int = field(default=0, metadata={"help": "Evaluate on so many questions, a fixed subset; 0: all."})


@dataclass(frozen=True)
class Inputs:
    """The document database and the examples of each split; empty where no file was given."""

    documents: list[Document]
    train: list[Example]
    eval: list[Example]
    test: list[Example]


def read_inputs(data: DataArguments, loop: LoopArguments, train_answers: bool, eval_answers: bool) -> Inputs:
    """Read every file of a run, before anything slow starts.

    Args:
        train_answers: Whether training examples must have answers.
        eval_answers: Whether those of the other files must.

    Raises:
        UserError: a file is missing or malformed.
    """
    held_out = [read_examples(path, eval_answers) if path else [] for path in (data.eval_file, data.test_file)]
    return Inputs(
        documents=read_documents(data.full_dataset_file_path),
        train=read_examples(data.train_file, train_answers),
        eval=subset(held_out[0], loop.eval_max_examples, loop.seed),
        test=held_out[1],
    )


def subset(examples: list[Example], size: int, seed: int) -> list[Example]:
    """A fixed seeded subset in file order; size 0: all."""
    if not 0 < size < len(examples):
        return examples
    return [examples[i] for i in sorted(random.Random(seed).sample(range(len(examples)), size))]


def open_output(loop: LoopArguments, all_arguments: Sequence[Any], checkpoint: Path | None = None) -> None:
    """Make the output directory, keep the arguments in it and log to it; say which differ from the checkpoint's."""
    output = Path(loop.output_dir)
    if distributed.is_main():
        output.mkdir(parents=True, exist_ok=True)
        if not checkpoint or not continues(checkpoint, loop):
            for name in (SCORES, DETAILS, PREDICTIONS):  # of a run that this one replaces
                (output / name).unlink(missing_ok=True)
        values = given(all_arguments)
        write_json(output / ARGUMENTS_FILE, values)
        log_to_file(str(output / "train.log"))
        if checkpoint:
            tell_changed_arguments(checkpoint, values)
    distributed.barrier()


def merge_adapters(loop: LoopArguments, kind: type[PreTrainedModel]) -> None:
    """If asked for, turn the adapters on top of the output directory into a plain model."""
    output = Path(loop.output_dir)
    if loop.merge_lora_on_save and distributed.is_main():
        with TemporaryDirectory(prefix=".model.", suffix=".tmp", dir=output) as directory:
            merged(output, kind).save_pretrained(directory)
            promote(Path(directory), output)
    distributed.barrier()


def tell_changed_arguments(checkpoint: Path, now: Mapping[str, Any]) -> None:
    """One line for the arguments that are not those which the checkpoint was made with."""
    try:
        then = json.loads((checkpoint / ARGUMENTS_FILE).read_text(encoding="utf-8"))
        names = [name for name in now if name in then and name not in ABOUT_THE_START and now[name] != then[name]]
    except (OSError, ValueError, TypeError):
        return
    if names:
        changes = ", ".join(f"--{name} {now[name]} (was {then[name]})" for name in names)
        log.warning("other arguments than those of %s: %s; the command line wins", checkpoint, changes)
