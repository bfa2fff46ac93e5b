"""Training an encoder: what every algorithm shares that trains a retriever."""

from collections.abc import Callable, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass
from typing import Any

from torch import nn

from rqa.data import Example
from rqa.endpoint.client import EndpointArguments, is_endpoint
from rqa.endpoint.roles import remote_scorer
from rqa.evaluation.results import write_results
from rqa.evaluation.retrieval import find_passages, mean_scores, retrieval_rows
from rqa.models.encoder import EncoderArguments, load_encoder
from rqa.models.loading import freeze_pooler, train_adapters
from rqa.objectives.rpg import LikelihoodArguments, language_model_teacher, local_scorer
from rqa.objectives.teacher import Teacher
from rqa.recipe.run import Rows, Run, Scores, TrainingArguments
from rqa.retrieval.index import IndexArguments
from rqa.retrieval.refresh import Refresher
from rqa.retrieval.retriever import Retriever
from rqa.runtime.errors import UserError
from rqa.runtime.parallelize import load_whole_weights
from rqa.training.loop import Batches


@dataclass(kw_only=True)
class RetrieverTraining(TrainingArguments, EncoderArguments, IndexArguments):
    """What runs that train an encoder read from the command line."""


class RetrieverRun(Run):
    """A run that trains an encoder, by whatever objective; `retriever` holds the very encoder that is trained."""

    flags: RetrieverTraining

    def __init__(self, flags: RetrieverTraining, answers: bool = False) -> None:
        """Files, then the encoder. `answers`: whether training examples must have answers."""
        super().__init__(flags, "retr/mrr@10", train_answers=answers, eval_answers=False)
        flags.ignore("per_device_eval_batch_size", "questions are encoded by tokens, not by number")
        self.encoder = load_encoder(self.source, flags)
        self.retriever = Retriever(self.encoder, self.documents, flags)
        train_adapters(self.encoder.backbone, flags)
        freeze_pooler(self.encoder.backbone)

    def finish(
        self, objective: nn.Module, collate: Callable[[Sequence[int]], Any], refresher: Refresher | None = None
    ) -> Scores:
        """Train, evaluate, test.

        Args:
            collate: Numbers of training examples -> one micro-batch.
            refresher: Keeps the live retriever's index fresh; None where nothing is retrieved in training.
        """
        flags = self.flags
        self._require_whole_encoder(refresher)
        if refresher and flags.index_path and not self.checkpoint:
            with flags.autocast():
                self.retriever.open(flags.index_path)  # of the weights before training; written at no other time
        judged = Retriever(self.encoder, self.documents, flags)  # so that to evaluate changes nothing in training

        def measure(examples: Sequence[Example], index_path: str | None = None) -> tuple[Scores, Rows]:
            with flags.autocast():
                if not (self.encoder.passage_encoder and len(judged.index)):  # frozen passages are encoded once
                    judged.open(index_path)
                found = find_passages(judged, examples, flags)
            rows = retrieval_rows(found, examples, flags.recall_at)
            return mean_scores(rows), rows

        def test() -> tuple[Scores, Rows]:
            if refresher:
                refresher.close()  # nothing is encoded beside the test
            best = load_encoder(flags.output_dir, flags, main_only=True)
            load_whole_weights(self.encoder, best.state_dict())
            return measure(self.test)

        def publish(scores: Scores, rows: Rows) -> Scores:
            write_results(flags.output_dir, scores, rows)
            return scores

        batches = Batches(len(self.train), collate, flags)
        with closing(refresher) if refresher else nullcontext():
            return self.run(
                objective,
                self.encoder.backbone,
                batches,
                lambda step: measure(self.eval, None if step else flags.index_path),
                test,
                publish,
                refresher,
                evaluate_first=True,
            )

    def _require_whole_encoder(self, refresher: Refresher | None) -> None:
        """Some ways to keep the index cheap need the whole encoder, and on every process."""
        frozen = self.encoder.passage_encoder is not None
        if frozen and self.flags.use_lora:
            raise UserError(
                "--train_query_encoder_only true: trains the whole encoder of questions; leave out --use_lora"
            )
        in_background = refresher is not None and refresher.flags.refresh_async
        flag = "refresh_async" if in_background else "train_query_encoder_only" if frozen else ""
        if flag and self.flags.fsdp != "no":
            raise UserError(f"--{flag} true: needs the whole encoder on every process; leave out --fsdp")


@dataclass(kw_only=True)
class TeacherArguments(LikelihoodArguments, EndpointArguments):
    """The language model that judges documents, and how it is asked where it stands behind a server."""

    def check(self) -> None:
        if self.lm_tokenizer and not is_endpoint(self.lm_model_path):
            raise UserError("--lm_tokenizer: a local model brings its own; give it with --lm_model_path openai::URL")


def open_teacher(flags: TeacherArguments) -> Teacher:
    """The mean log-likelihood of the answer given one document, by a local model or by a server's."""
    scorer, model = remote_scorer(flags) if is_endpoint(flags.lm_model_path) else local_scorer(flags)
    return language_model_teacher(scorer, model)
