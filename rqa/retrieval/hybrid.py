"""Dense and lexical retrieval together: what one misses, the other may find."""

from collections.abc import Sequence, Set

import numpy as np

from rqa.retrieval.hits import Hits, PassageRetriever, best, stack
from rqa.runtime.files import fingerprint

DEPTH = 100  # candidates that each retriever brings
RRF_CONSTANT = 60
WEIGHTS = np.linspace(0, 1, 21)


class HybridRetriever(PassageRetriever):
    """Two retrievers over one database, their lists fused.

    Args:
        dense: Its scores weigh `weight`.
        lexical: Its scores weigh `1 - weight`.
        fusion: `rrf` (reciprocal rank fusion) or `weighted` (a weighted sum of normalised scores).
        weight: Between 0 and 1; reciprocal rank fusion has none.
        normalization: `min_max` or `z`, of a weighted sum.
    """

    def __init__(
        self,
        dense: PassageRetriever,
        lexical: PassageRetriever,
        fusion: str = "rrf",
        weight: float = 0.5,
        normalization: str = "min_max",
    ) -> None:
        self.documents = dense.documents
        self.dense, self.lexical = dense, lexical
        self.fusion, self.weight, self.normalization = fusion, weight, normalization

    def retrieve(self, queries: Sequence[str], k: int) -> Hits:
        dense, lexical = self.candidates(queries, k)
        k = min(k, len(self.documents))
        if self.fusion == "rrf":
            return reciprocal_rank_fusion([dense, lexical], k)
        return weighted_sum(dense, lexical, self.weight, k, self.normalization)

    def candidates(self, queries: Sequence[str], k: int = 0) -> tuple[Hits, Hits]:
        """What each retriever finds by itself, deep enough to find k together."""
        depth = max(k, DEPTH)
        return self.dense.retrieve(queries, depth), self.lexical.retrieve(queries, depth)

    def identity(self) -> str:
        settings = map(str, (self.fusion, self.weight, self.normalization))
        return fingerprint("hybrid", self.dense.identity(), self.lexical.identity(), *settings)


def reciprocal_rank_fusion(lists: Sequence[Hits], k: int, constant: int = RRF_CONSTANT) -> Hits:
    """Documents by the sum of `1 / (constant + rank)` over the lists that hold them (Cormack et al. 2009).

    Ranks start at 1. Equal sums are ranked by position in the database. [Q, d] each -> [Q, k]
    """
    values = [np.broadcast_to(1 / (constant + np.arange(1, hits.ids.shape[1] + 1)), hits.ids.shape) for hits in lists]
    return _sum([hits.ids for hits in lists], values, k)


def weighted_sum(dense: Hits, lexical: Hits, weight: float, k: int, normalization: str = "min_max") -> Hits:
    """Documents by `weight * dense + (1 - weight) * lexical`, of scores normalised for each question.

    A document that a list does not hold counts there as the list's last one. [Q, d] each -> [Q, k]

    Args:
        normalization: `min_max`: between 0 and 1 in each list; `z`: in standard deviations of the list.
    """
    values = [share * _above_the_last(hits, normalization) for share, hits in ((weight, dense), (1 - weight, lexical))]
    return _sum([dense.ids, lexical.ids], values, k)


def choose_weight(dense: Hits, lexical: Hits, gold: Sequence[Set[int]], normalization: str = "min_max") -> float:
    """The dense share that gives the greatest mean reciprocal rank; of equally good ones the most even.

    Args:
        gold: The positions of each question's gold documents in the database.
    """

    def quality(weight: float) -> float:
        found = weighted_sum(dense, lexical, weight, 10, normalization).ids  # [Q, 10]
        relevant = np.array([[i in wanted for i in row] for row, wanted in zip(found.tolist(), gold, strict=True)])
        return float(np.where(relevant.any(1), 1 / (relevant.argmax(1) + 1), 0.0).mean())

    return float(max(WEIGHTS, key=lambda weight: (round(quality(weight), 9), -abs(weight - 0.5))))


def _above_the_last(hits: Hits, normalization: str) -> np.ndarray:
    """How far each score stands above the last of its list. [Q, d]"""
    scores = np.where(hits.ids >= 0, hits.scores, np.nan).astype(np.float64)
    found = ~np.isnan(scores).all(axis=1, keepdims=True)  # [Q, 1]
    scores = np.where(found, scores, 0.0)
    lowest, highest = np.nanmin(scores, axis=1, keepdims=True), np.nanmax(scores, axis=1, keepdims=True)
    unit = highest - lowest if normalization == "min_max" else np.nanstd(scores, axis=1, keepdims=True)
    # Where all are equally good, each of them is better than what was not found.
    return np.where(highest > lowest, (scores - lowest) / np.where(unit > 0, unit, 1), 1.0)


def _sum(ids: Sequence[np.ndarray], values: Sequence[np.ndarray], k: int) -> Hits:
    """The k documents with the greatest sum of values over the lists."""
    rows = []
    for row_ids, row_values in zip(np.concatenate(ids, axis=1), np.concatenate(values, axis=1), strict=True):
        found = row_ids >= 0
        documents, places = np.unique(row_ids[found], return_inverse=True)
        rows.append(best(np.bincount(places, row_values[found], len(documents)), documents, k))
    return stack(rows, k)
