"""Training a reranker over a frozen first-stage retriever."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

from rqa.data import Example
from rqa.documents import gold_places
from rqa.endpoint.client import is_endpoint
from rqa.evaluation.retrieval import evaluate_retrieval
from rqa.models.layout import GENERAL_FILE
from rqa.models.loading import load_config, train_adapters
from rqa.models.reranker import FIRST_STAGE, WEIGHT, load_reranker
from rqa.objectives.ctl import MinedNegatives, NegativeArguments
from rqa.objectives.dca import reader_teacher
from rqa.objectives.rerank import Lists, ListwiseReranking, RerankArguments
from rqa.objectives.teacher import is_reranker
from rqa.prompts import retrieval_query
from rqa.recipe.retriever import TeacherArguments, open_teacher
from rqa.recipe.run import Rows, Run, Scores, TrainingArguments
from rqa.retrieval.hybrid import RetrieverArguments, open_retriever
from rqa.retrieval.refresh import Refresher
from rqa.retrieval.reranking import USUAL_SHARE, RerankingRetriever, first_stage
from rqa.runtime import distributed
from rqa.runtime.errors import UserError
from rqa.runtime.files import write_json
from rqa.runtime.flags import flag
from rqa.runtime.parallelize import load_whole_weights
from rqa.training.loop import Batches

log = logging.getLogger(__name__)

ENOUGH = 500  # questions for a new head: 668 of pydocs were enough, 171 of perl were not


@dataclass(kw_only=True)
class RerankerTraining(RerankArguments, TeacherArguments, TrainingArguments, RetrieverArguments):
    """Flags of runs that train a reranker."""

    retriever: str = flag("bm25", "First stage of --negatives_from file.", ["dense", "bm25", "hybrid"], rare=True)
    embedding_model: str | None = flag(None, "Encoder of the first stage: a directory or a hub name.")

    def __post_init__(self) -> None:
        first = {"file": self.retriever, "both": "hybrid"}.get(self.negatives_from, self.negatives_from)
        if self.retriever not in (first, RerankerTraining.retriever):
            raise UserError(f"--retriever {self.retriever}: --negatives_from sets another first stage; leave one out")
        self.retriever = first
        super().__post_init__()

    def check(self) -> None:
        if (self.retriever == "bm25") == bool(self.embedding_model):
            raise UserError("--embedding_model: set it with --negatives_from dense or both, and only then")
        lacking = {} if self.mine_negatives else {"refresh_step": "--mine_negatives true"}
        lacking |= {} if self.lm_model_path else {"lm_temperature": "--teacher"}
        if self.negatives_from == "file":
            ranked = ["mine_negatives", *(item.name for item in fields(NegativeArguments))]
            lacking |= dict.fromkeys(ranked, "--negatives_from bm25, dense or both")
        for name, needed in lacking.items():
            if getattr(self, name) != getattr(RerankerTraining, name):
                raise UserError(f"--{name}: has no effect without {needed}")


class NegativesRefresher(Refresher):
    """Chooses hard negatives anew on schedule, by the reranker's current ranking. It refreshes no index."""

    def __call__(self, step: int) -> dict[str, float]:
        if self.due(step):
            self.then.retriever = self.retriever
            self._follow(step)
        return {}


class RerankerRun(Run):
    """A run that trains a reranker, evaluated by how it ranks the first stage's passages."""

    flags: RerankerTraining
    trains_retriever = True

    def __init__(self, flags: RerankerTraining) -> None:
        path = flags.lm_model_path
        local = path and not is_endpoint(path) and not is_reranker(path)
        self.fid_teacher = bool(local and load_config(path, flags.trust_remote_code).is_encoder_decoder)
        super().__init__(flags, answers=bool(path) and not is_reranker(path) and not self.fid_teacher)
        flags.ignore("per_device_eval_batch_size", "pairs are batched by their number of tokens")
        self.reranker = load_reranker(self.source, flags, flags.trained_dtype, main_only=True, new_head=True)
        self.model = self.reranker.model
        kinds = " ".join(load_config(flags.model_name_or_path, flags.trust_remote_code).architectures or [])
        self.has_new_head = "ForSequenceClassification" not in kinds and not self.reranker.answers
        if self.has_new_head and len(self.train) < ENOUGH:
            hint = "a published reranker as --model_name_or_path needs fewer"
            log.warning("%d questions are few for a new head; %s", len(self.train), hint)
        train_adapters(self.model, flags, self.source)
        alone = {name: getattr(RerankerTraining, name) for name in ("rerank_depth", "rerank_weight", "max_pair_length")}
        search = flags if flags.reranker else replace(flags, **alone)
        self.stage = first_stage(flags.retriever, flags.embedding_model)
        self.first = open_retriever(search, flags.embedding_model or "bm25", self.documents, self.eval)
        self.reranker.weight = USUAL_SHARE if flags.rerank_weight is None else flags.rerank_weight
        self.reranked = RerankingRetriever(self.first, self.reranker, flags.rerank_depth, self.reranker.weight)

    def finish(self) -> Scores:
        """Mine negatives, train, and test. -> scores on the test file"""
        flags, teacher = self.flags, None
        mined = None if flags.negatives_from == "file" else MinedNegatives(self.train, self.first, flags)
        refresher = NegativesRefresher(self.reranked, flags, mined) if mined and flags.mine_negatives else None
        if flags.lm_model_path:
            teacher = reader_teacher(flags.lm_model_path, flags) if self.fid_teacher else open_teacher(flags)
        lists = Lists(self.train, self.documents, self.reranker, mined, flags, flags.seed, teacher, self.fid_teacher)
        if mined:
            mined()
        if short := sum(len(row) < 2 for row in lists.chosen(range(len(self.train)))):
            problem = f"{short} of {len(self.train)} questions have fewer than two passages to rank and train nothing"
            if short == len(self.train):
                hint = "choose other negatives or ranks"
                raise UserError(f"--negatives_from {flags.negatives_from}: {problem}; {hint}")
            log.warning(problem)
        batches = Batches(len(self.train), lists, flags, ahead=lists.ahead)
        return self.train_and_test(ListwiseReranking(self.reranker, 3 if self.has_new_head else 1), batches, refresher)

    def score_eval(self, step: int) -> tuple[Scores, Rows]:
        return self._score(self.eval, compare=step == 0)

    def settle(self) -> None:
        """Choose the reranker's share of the final score on the eval questions, and save it with the best model."""
        best = load_reranker(self.flags.output_dir, self.flags, main_only=True)
        load_whole_weights(self.reranker, best.state_dict())
        examples = [example for example in self.eval if example.gold_docs]
        if self.flags.rerank_weight is None and examples:
            self.reranked.choose_weight(list(map(retrieval_query, examples)), gold_places(examples, self.documents))
            log.info("--rerank_weight %.2f: chosen by %d questions", self.reranked.weight, len(examples))
            if distributed.is_main():
                chosen = {WEIGHT: self.reranked.weight, FIRST_STAGE: self.stage}
                write_json(self.output / GENERAL_FILE, best.general | chosen)

    def score_test(self) -> tuple[Scores, Rows]:
        return self._score(self.test, compare=True)

    def _score(self, examples: Sequence[Example], compare: bool) -> tuple[Scores, Rows]:
        """Scores of the reranked passages; `compare` also logs those of the first stage alone."""
        scores, rows = evaluate_retrieval(self.reranked, examples, self.flags)
        if compare:
            before, _ = evaluate_retrieval(self.first, examples, self.flags)
            log.info("first stage alone  %s", "  ".join(f"{name} {value:.4g}" for name, value in before.items()))
            if examples is self.test and scores.get("retr/mrr@10", 0) < before.get("retr/mrr@10", 0):
                log.warning("reranking lowers MRR@10 on the test file; lower --rerank_weight, or add questions")
        return scores, rows
