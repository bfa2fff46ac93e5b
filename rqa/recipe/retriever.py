"""Training an encoder: the part that all algorithms for retrievers share."""

from collections.abc import Callable, Sequence
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from rqa.data import Example
from rqa.endpoint.client import EndpointArguments, is_endpoint
from rqa.endpoint.scorer import remote_scorer
from rqa.evaluation.retrieval import evaluate_retrieval
from rqa.models.encoder import EncoderArguments, load_encoder
from rqa.models.loading import freeze_pooler, train_adapters
from rqa.models.reranker import RerankerArguments
from rqa.objectives.teacher import LanguageModelArguments, Teacher, is_reranker, local_scorer, reranker_scorer
from rqa.recipe.run import Rows, Run, Scores, TrainingArguments
from rqa.retrieval.index import IndexArguments
from rqa.retrieval.refresh import Refresher
from rqa.retrieval.retriever import Retriever
from rqa.runtime.errors import UserError
from rqa.runtime.files import fingerprint
from rqa.runtime.parallelize import load_whole_weights
from rqa.training.loop import Batches


@dataclass(kw_only=True)
class RetrieverTraining(TrainingArguments, EncoderArguments, IndexArguments):
    """Flags of runs that train an encoder."""

    def check(self) -> None:
        if self.filter:
            raise UserError("--filter: training searches all passages; use it in evaluation only")


class RetrieverRun(Run):
    """A run that trains an encoder with any objective; `retriever` searches with that same encoder object."""

    flags: RetrieverTraining
    trains_retriever = True

    def __init__(self, flags: RetrieverTraining, answers: bool = False) -> None:
        super().__init__(flags, answers)
        if len(self.documents) < 2:
            raise UserError(f"--document_path {flags.document_path}: has only one passage; training needs two or more")
        flags.ignore("per_device_eval_batch_size", "questions are batched by their number of tokens")
        self.encoder = load_encoder(self.source, flags, flags.trained_dtype)
        self.model = self.encoder.backbone
        self.retriever = Retriever(self.encoder, self.documents, flags)
        self.evaluated = Retriever(self.encoder, self.documents, flags)  # so that evaluation leaves training as it is
        self.refresher: Refresher | None = None
        train_adapters(self.model, flags, self.source)
        freeze_pooler(self.model)

    def finish(self, objective: nn.Module, collate: Callable[..., Any], refresher: Refresher | None = None) -> Scores:
        """Train, then test; without a refresher training retrieves nothing. -> scores on the test file"""
        self.refresher = refresher
        frozen = self.encoder.passage_encoder is not None
        if frozen and self.flags.use_lora:
            raise UserError("--use_lora true: a query encoder beside a frozen one is trained whole; remove it")
        in_background = refresher and refresher.flags.refresh_async
        for name, is_set in (("--refresh_async true", in_background), ("a frozen passage encoder", frozen)):
            if is_set and self.flags.fsdp != "no":
                raise UserError(f"--fsdp: {name} needs the whole encoder on every process; leave out --fsdp")
        if refresher and self.flags.index_path and not self.checkpoint:
            self.retriever.open(self.flags.index_path)  # index of the initial weights; training writes no other there
        with closing(refresher) if refresher else nullcontext():
            batches = Batches(len(self.train), collate, self.flags, ahead=getattr(collate, "ahead", False))
            return self.train_and_test(objective, batches, refresher)

    def score_eval(self, step: int) -> tuple[Scores, Rows]:
        scores = self._score(self.eval, None if step else self.flags.index_path)
        if self.refresher and not (step or len(self.retriever.index)):
            self.retriever.index = self.evaluated.index  # the weights are the same before step 0
        return scores

    def score_test(self) -> tuple[Scores, Rows]:
        if self.refresher:
            self.refresher.close()  # stops encoding in the background
        last = self.encoder.fingerprint()
        best = load_encoder(self.flags.output_dir, self.flags, main_only=True)
        load_whole_weights(self.encoder, best.state_dict())
        return self._score(self.test, None, indexed=self.encoder.fingerprint() == last)  # by the last evaluation

    def _score(self, examples: Sequence[Example], index_path: str | None, indexed: bool = False) -> tuple[Scores, Rows]:
        indexed |= self.encoder.passage_encoder is not None  # frozen passages are encoded once
        if not (indexed and len(self.evaluated.index)):
            self.evaluated.open(index_path)
        return evaluate_retrieval(self.evaluated, examples, self.flags)


@dataclass(kw_only=True)
class TeacherArguments(LanguageModelArguments, RerankerArguments, EndpointArguments):
    """Flags of the teacher that judges documents, with those of its server."""

    def check(self) -> None:
        if self.lm_tokenizer and not is_endpoint(self.lm_model_path or ""):
            raise UserError("--lm_tokenizer: a local model has its own; use it with --lm_model_path openai::URL only")


def open_teacher(flags: TeacherArguments) -> Teacher:
    """A teacher that scores with a reranker, or by the answer tokens' mean log-likelihood under a language model."""
    if is_reranker(flags.lm_model_path):
        return Teacher(*reranker_scorer(flags))
    scorer, model = remote_scorer(flags) if is_endpoint(flags.lm_model_path) else local_scorer(flags)
    prompter = scorer.prompter
    return Teacher(scorer, fingerprint(model, str(asdict(prompter.arguments)), prompter.instruction))
