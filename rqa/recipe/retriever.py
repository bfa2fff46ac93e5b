"""Training an encoder: what every algorithm shares that trains a retriever."""

import logging
from collections.abc import Callable, Sequence
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass, replace
from random import Random
from typing import Any

from torch import nn

from rqa.data import Example
from rqa.endpoint.client import EndpointArguments, is_endpoint
from rqa.endpoint.scorer import remote_scorer
from rqa.evaluation.retrieval import find_passages, mean_scores, retrieval_rows
from rqa.models.encoder import EncoderArguments, load_encoder, positions_of
from rqa.models.loading import freeze_pooler, train_adapters
from rqa.models.reranker import RerankerArguments
from rqa.objectives.teacher import LanguageModelArguments, Teacher, is_reranker, local_scorer, reranker_scorer
from rqa.recipe.run import FEW_QUESTIONS, Rows, Run, Scores, TrainingArguments
from rqa.retrieval.index import IndexArguments
from rqa.retrieval.refresh import Refresher
from rqa.retrieval.retriever import Retriever
from rqa.runtime.errors import UserError
from rqa.runtime.files import fingerprint
from rqa.runtime.parallelize import load_whole_weights
from rqa.training.loop import Batches

log = logging.getLogger(__name__)

LENGTHS_TRIED = (128, 256, 512)  # of passages, in tokens, beside the checkpoint's
QUESTIONS_TRIED, OTHERS_TRIED = 200, 300  # and passages beside their gold ones


@dataclass(kw_only=True)
class RetrieverTraining(TrainingArguments, EncoderArguments, IndexArguments):
    """What runs that train an encoder read from the command line."""

    def check(self) -> None:
        if self.filter:
            raise UserError("--filter: training searches all passages; evaluate with it afterwards")


class RetrieverRun(Run):
    """A run that trains an encoder, by whatever objective; `retriever` holds the very encoder that is trained."""

    flags: RetrieverTraining
    trains_retriever = True

    def __init__(self, flags: RetrieverTraining, answers: bool = False) -> None:
        super().__init__(flags, "retr/mrr@10", train_answers=answers, eval_answers=False)
        if len(self.documents) < 2:
            raise UserError(f"--document_path {flags.document_path}: a single passage teaches nothing; two are needed")
        flags.ignore("per_device_eval_batch_size", "questions are encoded by tokens, not by number")
        self.encoder = load_encoder(self.source, flags, flags.trained_dtype)
        self.model = self.encoder.backbone
        if not (flags.max_passage_length or flags.index_path or self.checkpoint or self.encoder.passage_encoder):
            self._choose_length()
        self.retriever = Retriever(self.encoder, self.documents, flags)
        self.judged = Retriever(self.encoder, self.documents, flags)  # so that to evaluate changes nothing in training
        self.refresher: Refresher | None = None
        train_adapters(self.model, flags, self.source)
        freeze_pooler(self.model)

    def finish(self, objective: nn.Module, collate: Callable[..., Any], refresher: Refresher | None = None) -> Scores:
        """Train, evaluate, test; without a refresher nothing is retrieved in training."""
        self.refresher = refresher
        frozen = self.encoder.passage_encoder is not None
        if frozen and self.flags.use_lora:
            raise UserError("--train_query_encoder_only true: trains the whole query encoder; leave out --use_lora")
        whole = {"refresh_async": refresher and refresher.flags.refresh_async, "train_query_encoder_only": frozen}
        for name, asked in whole.items():
            if asked and self.flags.fsdp != "no":
                raise UserError(f"--{name} true: needs the whole encoder on every process; leave out --fsdp")
        if refresher and self.flags.index_path and not self.checkpoint:
            self.retriever.open(self.flags.index_path)  # of the weights before training; written at no other time
        with closing(refresher) if refresher else nullcontext():
            batches = Batches(len(self.train), collate, self.flags, ahead=getattr(collate, "ahead", False))
            return self.train_and_test(objective, batches, refresher)

    def score_eval(self, step: int) -> tuple[Scores, Rows]:
        scores = self._score(self.eval, None if step else self.flags.index_path)
        if self.refresher and not (step or len(self.retriever.index)):
            self.retriever.index = self.judged.index  # of the same weights
        return scores

    def score_test(self) -> tuple[Scores, Rows]:
        if self.refresher:
            self.refresher.close()  # nothing is encoded beside the test
        last = self.encoder.fingerprint()
        best = load_encoder(self.flags.output_dir, self.flags, main_only=True)
        load_whole_weights(self.encoder, best.state_dict())
        return self._score(self.test, None, indexed=self.encoder.fingerprint() == last)  # by the last evaluation

    def _choose_length(self) -> None:
        """Cut passages where training questions, before any training, find their gold ones best among others.

        Longer ones are tried until they find less: they take more time, and many an encoder learned from short ones.
        """
        asked, chance = [example for example in self.train if example.gold_docs], Random(0)
        if len(asked) < FEW_QUESTIONS:
            return
        asked = chance.sample(asked, min(QUESTIONS_TRIED, len(asked)))
        documents = [document for example in asked for document in example.gold_docs]
        others = chance.sample(range(len(self.documents)), min(OTHERS_TRIED, len(self.documents)))
        documents += [self.documents[number] for number in others]
        pool = list({document.key: document for document in documents}.values())
        own, found = self.encoder.settings.max_passage_length, {}
        for length in sorted({own, *(length for length in LENGTHS_TRIED if length <= positions_of(self.model))}):
            retriever = Retriever(self.encoder.cutting(length), pool).open()
            rows = retrieval_rows(find_passages(retriever, asked, self.flags), asked, self.flags.recall_at)
            found[length] = mean_scores(rows)["retr/mrr@10"]
            if found[length] < max(found.values()):
                break
        best = max(found, key=lambda length: (found[length], length == own))
        self.encoder.settings = replace(self.encoder.settings, max_passage_length=best)
        told = ", ".join(f"{length}: {score:.3f}" for length, score in found.items())
        log.info("--max_passage_length %d: finds most for %d training questions (MRR@10: %s)", best, len(asked), told)

    def _score(self, examples: Sequence[Example], index_path: str | None, indexed: bool = False) -> tuple[Scores, Rows]:
        indexed |= self.encoder.passage_encoder is not None  # frozen passages are encoded once
        if not (indexed and len(self.judged.index)):
            self.judged.open(index_path)
        found = find_passages(self.judged, examples, self.flags)
        rows = retrieval_rows(found, examples, self.flags.recall_at)
        return mean_scores(rows), rows


@dataclass(kw_only=True)
class TeacherArguments(LanguageModelArguments, RerankerArguments, EndpointArguments):
    """Who judges documents, and how a language model is asked that stands behind a server."""

    def check(self) -> None:
        if self.lm_tokenizer and not is_endpoint(self.lm_model_path or ""):
            raise UserError("--lm_tokenizer: a local model brings its own; give it with --lm_model_path openai::URL")


def open_teacher(flags: TeacherArguments) -> Teacher:
    """A reranker's score, or the mean log-likelihood of the answer's tokens by a local model or a server's."""
    if is_reranker(flags.lm_model_path):
        return Teacher(*reranker_scorer(flags))
    scorer, model = remote_scorer(flags) if is_endpoint(flags.lm_model_path) else local_scorer(flags)
    prompter = scorer.prompter
    return Teacher(scorer, fingerprint(model, str(asdict(prompter.arguments)), prompter.instruction))
