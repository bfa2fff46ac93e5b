"""Training a reranker of what a frozen first stage finds."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rqa.data import Example
from rqa.endpoint.client import is_endpoint
from rqa.evaluation.retrieval import find_passages, mean_scores, retrieval_rows
from rqa.models.loading import load_config, train_adapters
from rqa.models.reranker import load_reranker
from rqa.objectives.ctl import MinedNegatives
from rqa.objectives.dca import DCAArguments, reader_teacher
from rqa.objectives.rerank import Lists, ListwiseReranking, RerankArguments
from rqa.objectives.teacher import is_reranker
from rqa.recipe.retriever import TeacherArguments, open_teacher
from rqa.recipe.run import Rows, Run, Scores, TrainingArguments
from rqa.retrieval.hybrid import RetrieverArguments, open_retriever
from rqa.retrieval.refresh import parse_schedule
from rqa.retrieval.reranking import RerankingRetriever
from rqa.retrieval.retriever import PassageRetriever
from rqa.runtime.errors import UserError
from rqa.runtime.flags import flag
from rqa.runtime.parallelize import load_whole_weights
from rqa.training.loop import Batches

log = logging.getLogger(__name__)

FIRST_STAGES = {"bm25": "bm25", "dense": "dense", "both": "hybrid"}


@dataclass(kw_only=True)
class RerankerTraining(RerankArguments, TeacherArguments, TrainingArguments, RetrieverArguments):
    """What a run that trains a reranker reads from the command line."""

    retriever: str = flag("bm25", "First stage where --negatives_from is file.", ["dense", "bm25", "hybrid"], rare=True)
    embedding_model: str | None = flag(
        None, "Encoder of the first stage: a directory or a hub name.",
        also="embedding_model_name_or_path eval_embedding_model",
    )  # fmt: skip
    reranker: str | None = flag(None, "Refused: --model_name_or_path names the reranker that is trained.", rare=True)

    def __post_init__(self) -> None:
        first_stage = FIRST_STAGES.get(self.negatives_from, self.retriever)
        if self.retriever not in (first_stage, RerankerTraining.retriever):
            raise UserError(
                f"--retriever {self.retriever}: --negatives_from names the first stage; leave one of them out"
            )
        self.retriever = first_stage
        super().__post_init__()

    def check(self) -> None:
        if self.reranker:
            raise UserError("--reranker: what is trained is named by --model_name_or_path; leave the flag out")
        if (self.retriever == "bm25") == bool(self.embedding_model):
            raise UserError("--embedding_model: goes with --negatives_from dense or both, and only with them")

    @property
    def reads(self) -> bool:
        """Whether the teacher is a FiD reader, which needs no answers either."""
        path = self.lm_model_path
        local = path and not is_endpoint(path) and not is_reranker(path)
        return bool(local and load_config(path, self.trust_remote_code).is_encoder_decoder)


class MinedAgain:
    """`before_step` of the loop, and a `LiveState`: on schedule, negatives are what the reranker now ranks first."""

    def __init__(self, mined: MinedNegatives, retriever: RerankingRetriever, schedule: str) -> None:
        """`retriever` ranks with the very reranker that is trained."""
        self.mined, self.retriever = mined, retriever
        self.version: str | None = None
        self._spans = parse_schedule(schedule)

    def __call__(self, step: int) -> dict[str, float]:
        if step and any(first <= step < end and step % every == 0 for first, end, every in self._spans):
            self.mined.retriever = self.retriever
            self.mined()
            self.version = f"index-{step}"
        return {}

    def collect(self) -> None:
        """Nothing: every process has all negatives."""

    def save(self, directory: Path) -> None:
        self.mined.save(directory)

    def load(self, directory: Path) -> None:
        self.mined.load(directory)
        self.version = directory.name


class RerankerRun(Run):
    """A run that trains a reranker; it is measured by how it orders what the first stage finds."""

    flags: RerankerTraining
    trains_retriever = True

    def __init__(self, flags: RerankerTraining) -> None:
        answers = bool(flags.lm_model_path) and not is_reranker(flags.lm_model_path) and not flags.reads
        super().__init__(flags, "retr/mrr@10", train_answers=answers, eval_answers=False)
        flags.ignore("per_device_eval_batch_size", "pairs are scored by tokens, not by number")
        self.reranker = load_reranker(self.source, flags, flags.trained_dtype, main_only=True, new_head=True)
        self.model = self.reranker.model
        train_adapters(self.model, flags, self.source)
        search = replace(flags, rerank_depth=RerankerTraining.rerank_depth)  # nothing ranks anew but what is trained
        self.first = open_retriever(search, flags.embedding_model or "bm25", self.documents, self.eval)
        self.judged = RerankingRetriever(self.first, self.reranker, flags.rerank_depth)

    def finish(self) -> Scores:
        """Mine, train, evaluate, test."""
        flags, mined, before_step, teacher = self.flags, None, None, None
        if flags.negatives_from != "file":
            mined = MinedNegatives(self.train, self.first, flags)
            before_step = MinedAgain(mined, self.judged, flags.refresh_step) if flags.mine_negatives else None
        if flags.reads:
            shared = {"dtype": flags.dtype, "bf16": flags.bf16, "trust_remote_code": flags.trust_remote_code}
            reader = DCAArguments(
                reader_model_path=flags.lm_model_path, max_encoder_seq_length=flags.text_maxlength, **shared
            )
            teacher = reader_teacher(reader, self.train)
        elif flags.lm_model_path:
            teacher = open_teacher(flags)
        collate = Lists(
            self.train, self.documents, self.reranker, mined, flags, flags.seed, teacher, together=flags.reads
        )
        if mined:
            mined()
        collate.count()
        batches = Batches(len(self.train), collate, flags, ahead=collate.ahead)
        return self.train_and_test(ListwiseReranking(self.reranker), batches, before_step)

    def score_eval(self, step: int) -> tuple[Scores, Rows]:
        return self._score(self.eval, "eval" if step == 0 else "")

    def score_test(self) -> tuple[Scores, Rows]:
        best = load_reranker(self.flags.output_dir, self.flags, main_only=True)
        load_whole_weights(self.reranker, best.state_dict())
        return self._score(self.test, "test")

    def _score(self, examples: Sequence[Example], told: str) -> tuple[Scores, Rows]:
        def scores(retriever: PassageRetriever) -> tuple[Scores, Rows]:
            found = find_passages(retriever, examples, self.flags)
            rows = retrieval_rows(found, examples, self.flags.recall_at)
            return mean_scores(rows), rows

        if told:
            alone = {name: value for name, value in scores(self.first)[0].items() if "document_recall" not in name}
            log.info("first stage alone  %s", "  ".join(f"{told}_{name} {value:.4g}" for name, value in alone.items()))
        return scores(self.judged)
