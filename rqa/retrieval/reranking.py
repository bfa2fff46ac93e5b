"""The second stage of retrieval: a cross-encoder reranks the passages of another retriever."""

import logging
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass

import numpy as np

from rqa.models.reranker import FIRST_STAGE, Reranker, RerankerArguments, load_reranker
from rqa.retrieval.fusion import choose_weight, weighted_sum
from rqa.retrieval.ranking import Hits
from rqa.retrieval.retriever import PassageRetriever
from rqa.runtime import distributed
from rqa.runtime.cli import progress
from rqa.runtime.errors import UserError
from rqa.runtime.files import fingerprint
from rqa.runtime.flags import flag

log = logging.getLogger(__name__)

PAIRS_AT_ONCE = 2**14  # bounds the memory of token ids
USUAL_SHARE = 0.25  # in doubt: more of a reranker that has learned little does harm


@dataclass(kw_only=True)
class RerankingArguments(RerankerArguments):
    """Reranking."""

    reranker: str | None = flag(None, "Cross-encoder that reranks the passages found: a directory or a hub name.")
    rerank_depth: int = flag(50, "Passages of each question to rerank; if more are retrieved, all of them.", rare=True)
    rerank_weight: float | None = flag(
        None, "Weight of the reranker's scores in a sum with the first stage's, from 0 to 1; 1: reranker only. "
        "Default: as bin/train_rerank chose, else 1.", rare=True,
    )  # fmt: skip

    def check(self) -> None:
        self.check_bounds("rerank_depth", at_least=1)
        self.check_bounds("rerank_weight", at_least=0, at_most=1)


class RerankingRetriever(PassageRetriever):
    """Reranks the top `depth` passages of another retriever; equal scores keep their order.

    With a `weight` below 1 the ranking is by `weighted_sum` with the first stage's scores. With several processes, all
    call `retrieve` at the same time, whatever the first stage is.
    """

    def __init__(self, first: PassageRetriever, reranker: Reranker, depth: int, weight: float = 1.0) -> None:
        self.first, self.reranker, self.depth, self.weight = first, reranker, depth, weight
        self.documents, self.encoder = first.documents, first.encoder

    def retrieve(self, questions: Sequence[str], k: int) -> Hits:
        return self.rerank(questions, self.first.retrieve(questions, max(k, self.depth)), k)

    def rerank(self, questions: Sequence[str], hits: Hits, k: int) -> Hits:
        """The k best of the passages found for each question. [Q, depth] -> [Q, k]"""
        scores = np.full(hits.ids.shape, -np.inf, dtype=np.float32)
        longest = int(max(distributed.total_by_rank(len(questions))))  # equally often on every process
        parts = range(0, longest, max(PAIRS_AT_ONCE // max(hits.ids.shape[1], 1), 1))
        for start in progress(parts, desc="rerank", unit="batch", disable=len(parts) < 2):
            rows, columns = np.nonzero(hits.ids[start : start + parts.step] >= 0)
            numbers = hits.ids[start + rows, columns]
            texts = {number: self.documents[number].fmt_content for number in np.unique(numbers).tolist()}
            pairs = [(questions[start + row], texts[number]) for row, number in zip(rows, numbers, strict=True)]
            distinct = list(dict.fromkeys(pairs))  # so equal passages get exactly equal scores
            score_of = dict(zip(distinct, self.reranker.score(distinct), strict=True))
            scores[start + rows, columns] = [score_of[pair] for pair in pairs]
        if self.weight < 1:
            return weighted_sum(Hits(hits.ids, scores), hits, self.weight, min(k, hits.ids.shape[1]))
        order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        return Hits(np.take_along_axis(hits.ids, order, axis=1), np.take_along_axis(scores, order, axis=1))

    def choose_weight(self, questions: Sequence[str], gold: Sequence[Set[int]]) -> None:
        """Set the weight that ranks the gold positions best; every process passes all questions."""
        self.weight = 1.0
        ranked, first = (each.retrieve_shared(questions, self.depth) for each in (self, self.first))
        self.weight = choose_weight(ranked, first, gold, usual=USUAL_SHARE)

    def identity(self) -> str:
        settings = map(str, (self.reranker.fingerprint(), self.reranker.model.dtype, self.depth, self.weight))
        return fingerprint("reranked", self.first.identity(), *settings)


def first_stage(retriever: str, embedding_model: str | None) -> str:
    """The name of a first stage, by which a reranker remembers where its weight was chosen."""
    return "bm25" if "bm25" in (retriever, embedding_model) else f"{retriever} {embedding_model}"


def reranking(flags: RerankingArguments, stage: str) -> Callable[[PassageRetriever], PassageRetriever]:
    """A function that adds the reranker of the flags, if any, to a retriever; the model is loaded now.

    `stage` is the name of that retriever.
    """
    if flags.reranker is None:
        for name in ("rerank_depth", "rerank_weight", "max_pair_length"):
            if getattr(flags, name) != getattr(RerankingArguments, name):
                raise UserError(f"--{name} {getattr(flags, name)}: has no effect without a reranker; add --reranker")
        return lambda first: first
    reranker = load_reranker(flags.reranker, flags)
    weight = reranker.weight if flags.rerank_weight is None else flags.rerank_weight
    if flags.rerank_weight is None and weight < 1:
        log.info("--rerank_weight %.2f: was chosen by bin/train_rerank", weight)
        if (known := reranker.general.get(FIRST_STAGE, stage)) != stage:
            log.warning(
                "--rerank_weight %.2f: was chosen behind %s, not behind %s; it may not suit", weight, known, stage
            )
    return lambda first: RerankingRetriever(first, reranker, flags.rerank_depth, weight)
