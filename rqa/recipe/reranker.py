"""Training a reranker of what a frozen first stage finds."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

from rqa.data import Example
from rqa.evaluation.retrieval import find_passages, mean_scores, retrieval_rows
from rqa.models.loading import train_adapters
from rqa.models.reranker import load_reranker
from rqa.objectives.ctl import MinedNegatives
from rqa.objectives.rerank import FIRST_STAGES, Lists, ListwiseReranking, MinedAgain, RerankArguments
from rqa.objectives.teacher import is_reranker
from rqa.recipe.retriever import TeacherArguments, open_teacher
from rqa.recipe.run import Rows, Run, Scores, TrainingArguments
from rqa.retrieval.hybrid import RetrieverArguments, open_retriever
from rqa.retrieval.reranking import RerankingRetriever
from rqa.runtime.errors import UserError
from rqa.runtime.parallelize import load_whole_weights
from rqa.training.loop import Batches

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class RerankerTraining(RerankArguments, TeacherArguments, TrainingArguments, RetrieverArguments):
    """What a run that trains a reranker reads from the command line."""

    def check(self) -> None:
        if self.reranker:
            raise UserError("--reranker: what is trained is named by --model_name_or_path; leave the flag out")


class RerankerRun(Run):
    """A run that trains a reranker; it is measured by how it orders what the first stage finds."""

    flags: RerankerTraining
    trains_retriever = True

    def __init__(self, flags: RerankerTraining) -> None:
        answers = bool(flags.lm_model_path) and not is_reranker(flags.lm_model_path)
        super().__init__(flags, "retr/mrr@10", train_answers=answers, eval_answers=False)
        self.reranker = load_reranker(self.source, flags, flags.trained_dtype, main_only=True, new_head=True)
        self.model = self.reranker.model
        train_adapters(self.model, flags, self.source)
        search = replace(flags, retriever=FIRST_STAGES.get(flags.negatives_from, flags.retriever))
        self.first = open_retriever(search, flags.embedding_model or "bm25", self.documents, self.eval)
        self.judged = RerankingRetriever(self.first, self.reranker, flags.rerank_depth)

    def finish(self) -> Scores:
        """Mine, train, evaluate, test."""
        flags, mined, before_step = self.flags, None, None
        if flags.negatives_from != "file":
            mined = MinedNegatives(self.train, self.first, flags)
            mined()
            before_step = MinedAgain(mined, self.judged, flags.refresh_step) if flags.mine_negatives else None
        teacher = open_teacher(flags) if flags.lm_model_path else None
        collate = Lists(self.train, self.documents, self.reranker, mined, flags, flags.seed, teacher)
        batches = Batches(len(self.train), collate, flags, ahead=collate.ahead)
        return self.train_and_test(ListwiseReranking(self.reranker), batches, before_step)

    def score_eval(self, step: int) -> tuple[Scores, Rows]:
        return self._score(self.eval)

    def score_test(self) -> tuple[Scores, Rows]:
        best = load_reranker(self.flags.output_dir, self.flags, main_only=True)
        load_whole_weights(self.reranker, best.state_dict())
        return self._score(self.test)

    def _score(self, examples: Sequence[Example]) -> tuple[Scores, Rows]:
        rows = retrieval_rows(find_passages(self.judged, examples, self.flags), examples, self.flags.recall_at)
        return mean_scores(rows), rows
