"""A training run, from files to scores: the part that all trainers share, where core and surroundings meet."""

import logging
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel, set_seed

from rqa.data import DocumentArguments, read_examples, subset
from rqa.documents import read_documents, with_known_gold
from rqa.evaluation.report import DETAILS, PREDICTIONS, REPORT, SCORES, write_report
from rqa.evaluation.results import Rows, Scores, write_results
from rqa.evaluation.retrieval import EvaluationArguments
from rqa.models.loading import merged
from rqa.runtime import distributed
from rqa.runtime.cli import log_to
from rqa.runtime.files import beside, claim, read_json, write_json, write_jsonl
from rqa.runtime.flags import flag
from rqa.training.arguments import LoopArguments
from rqa.training.checkpoint import ARGUMENTS_FILE, checkpoint_to_resume, promote
from rqa.training.journal import continues, metric_name
from rqa.training.loop import Batches, train
from rqa.training.memory import estimate

log = logging.getLogger(__name__)

MAY_CHANGE = {"output_dir", "overwrite_output_dir", "resume_from_checkpoint"}  # when a run is resumed
FEW_QUESTIONS = 30  # fewer are too few to choose a model


@dataclass(kw_only=True)
class TrainingArguments(DocumentArguments, LoopArguments, EvaluationArguments):
    """The model and the examples."""

    model_name_or_path: str = flag(help="Model to train: a directory or a hub name.")
    train_file: str = flag(help="Training examples, JSONL.")
    eval_file: str | None = flag(None, "Examples that choose the best model, JSONL; 30 questions or more are needed.")
    test_file: str | None = flag(None, "Examples for the final scores, JSONL.")
    warmup_ratio: float = flag(0.1, "Share of all steps in which the learning rate rises from 0 to its peak.")


class Run(ABC):
    """A started run: processes have joined, the seed is set, all files are read, the output directory is open.

    `answers`: whether training examples need answers. Those of eval and test files need them unless they only score a
    retriever.
    """

    model: PreTrainedModel  # the trained model, which may have adapters
    trains_retriever = False

    def __init__(self, flags: TrainingArguments, answers: bool) -> None:
        distributed.start(flags.deterministic)
        if flags.estimate_memory:
            if distributed.is_main():
                print(estimate(flags, self.trains_retriever))
            raise SystemExit
        flags.ignore("dataloader_num_workers", "a thread prepares batches a step ahead where it can")
        self.flags = flags
        self.output = Path(flags.output_dir)
        ranks = self.trains_retriever
        flags.metric_for_best_model = flags.metric_for_best_model or ("retr/mrr@10" if ranks else "loss")
        self.checkpoint = distributed.from_main(checkpoint_to_resume(flags) if distributed.is_main() else None)
        self.source = str(self.checkpoint or flags.model_name_or_path)
        set_seed(flags.seed)
        held_out = [read_examples(path, not ranks) if path else [] for path in (flags.eval_file, flags.test_file)]
        self.documents = read_documents(flags.document_path)
        held_out = [with_known_gold(examples, self.documents) for examples in held_out]
        self.train = with_known_gold(read_examples(flags.train_file, answers), self.documents)
        self.eval, self.test = subset(held_out[0], flags.eval_max_examples, flags.seed), held_out[1]
        few = 0 < len(self.eval) < FEW_QUESTIONS and flags.eval_strategy != "no"
        if few and flags.load_best_model_at_end is None:  # a loss may choose: it is a mean over many tokens
            flags.load_best_model_at_end = metric_name(flags) == "eval_loss"
        if distributed.is_main():
            self._open_output()
        distributed.barrier()
        if few:
            how = "choose the best model, but by chance" if flags.load_best_model_at_end else "cannot choose a model"
            log.warning("%s: %d questions %s; %d are needed", flags.eval_file, len(self.eval), how, FEW_QUESTIONS)

    @abstractmethod
    def score_eval(self, step: int) -> tuple[Scores, Rows]:
        """Scores by name on the eval file after `step` steps, and a row for each question."""

    @abstractmethod
    def score_test(self) -> tuple[Scores, Rows]:
        """Scores and rows of the best model on the test file; called once, after training."""

    def settle(self) -> None:  # noqa: B027 (most trainers need none)
        """Decide what depends on the best model, once that is in the output directory."""

    def publish(self, scores: Scores, rows: Rows) -> Scores:
        """Write the scores and rows of the test file. -> the scores, perhaps with more"""
        write_results(self.output, scores, rows)
        return scores

    def train_and_test(self, objective: nn.Module, batches: Batches, before_step: Any = None) -> Scores:
        """Train, then test the best model. -> scores on the test file; none if a signal ended the run"""

        def evaluate(step: int) -> Scores:
            scores, rows = self.score_eval(step)
            if self.flags.write_predictions and distributed.is_main():
                write_jsonl(self.output / f"step-{step}-eval-predictions.jsonl", rows)
            return {f"eval_{name}": value for name, value in scores.items()}

        evaluates = self.eval and self.flags.eval_strategy != "no"
        state = train(
            objective, batches, self.flags, before_step, evaluate if evaluates else None,
            evaluate_first=self.trains_retriever, checkpoint=self.checkpoint, eval_size=len(self.eval),
        )  # fmt: skip
        if state.interrupted or not self.test:
            write_report(self.output)
        if state.interrupted:
            return {}
        self.settle()
        scores, rows = self.score_test() if self.test else ({}, [])
        if self.flags.merge_lora_on_save and distributed.is_main():
            with beside(self.output / "model") as directory:
                merged(self.output, type(self.model)).save_pretrained(directory)
                promote(directory, self.output, whole=False)
        distributed.barrier()
        if self.test:
            scores = self.publish({f"test_{name}": value for name, value in scores.items()}, rows)
            log.info("test  %s", "  ".join(f"{name} {value:.4g}" for name, value in scores.items()))
        return scores

    def _open_output(self) -> None:
        """Make the output directory, save the flags and log there; warn of flags that differ from the checkpoint's."""
        now, saved = self.flags.to_json(), self.checkpoint / ARGUMENTS_FILE if self.checkpoint else None
        self.output.mkdir(parents=True, exist_ok=True)
        claim(self.output)
        if not self.checkpoint or not continues(self.checkpoint, self.flags):
            for name in (SCORES, DETAILS, PREDICTIONS, REPORT):  # of a run that this one replaces
                (self.output / name).unlink(missing_ok=True)
        write_json(self.output / ARGUMENTS_FILE, now)
        log_to(str(self.output / "train.log"))
        then = read_json(saved) if saved and saved.exists() else {}
        changed = [name for name in now if name in then and name not in MAY_CHANGE and now[name] != then[name]]
        if changes := ", ".join(f"--{name} {now[name]} (was {then[name]})" for name in changed):
            log.warning("flags differ from those of %s: %s; the command line wins", self.checkpoint, changes)
