"""A second stage: what another retriever finds, ranked anew by a cross-encoder."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rqa.models.reranker import Reranker, RerankerArguments, load_reranker
from rqa.retrieval.retriever import Hits, PassageRetriever
from rqa.runtime.errors import UserError
from rqa.runtime.files import fingerprint
from rqa.runtime.flags import flag


@dataclass(kw_only=True)
class RerankingArguments(RerankerArguments):
    """Whether what is found is ranked anew."""

    reranker: str | None = flag(None, "Cross-encoder that ranks anew what is found: a directory or a hub name.")
    rerank_depth: int = flag(50, "Passages of each question that it reads, at least as many as are asked for.")

    def check(self) -> None:
        self.check_bounds("rerank_depth", at_least=1)


class RerankingRetriever(PassageRetriever):
    """The best of another retriever's first passages, by a reranker's scores; equal ones keep their order."""

    def __init__(self, first: PassageRetriever, reranker: Reranker, depth: int) -> None:
        self.first, self.reranker, self.depth, self.documents = first, reranker, depth, first.documents

    def retrieve(self, questions: Sequence[str], k: int) -> Hits:
        return self.rerank(questions, self.first.retrieve(questions, max(k, self.depth)), k)

    def rerank(self, questions: Sequence[str], hits: Hits, k: int) -> Hits:
        """The k best of what was found for each question. [Q, depth] -> [Q, k]"""
        found = hits.ids >= 0  # [Q, depth]
        texts = {number: self.documents[number].fmt_content for number in np.unique(hits.ids[found]).tolist()}
        asked = [(questions[row], texts[hits.ids[row, column]]) for row, column in zip(*found.nonzero(), strict=True)]
        scores = np.full(hits.ids.shape, -np.inf, dtype=np.float32)
        scores[found] = self.reranker.score(asked)
        order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        return Hits(np.take_along_axis(hits.ids, order, axis=1), np.take_along_axis(scores, order, axis=1))

    def identity(self) -> str:
        return fingerprint("reranked", self.first.identity(), self.reranker.fingerprint(), str(self.depth))


def reranked(first: PassageRetriever, flags: RerankingArguments) -> PassageRetriever:
    """The retriever, behind it the reranker that the flags name, if any."""
    if flags.reranker is None:
        if flags.rerank_depth != RerankingArguments.rerank_depth:
            raise UserError(f"--rerank_depth {flags.rerank_depth}: nothing is ranked anew; add --reranker")
        return first
    return RerankingRetriever(first, load_reranker(flags.reranker, flags), flags.rerank_depth)
