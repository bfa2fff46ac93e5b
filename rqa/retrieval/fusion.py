"""Fusion of two rankings, by ranks or by a weighted sum of scores."""

from collections.abc import Iterator, Sequence, Set

import numpy as np

from rqa.retrieval.ranking import Hits, best

WEIGHTS = np.linspace(0, 1, 21)
USUAL = 0.75  # default dense share: near the best for general sentence encoders on questions by people


def reciprocal_rank_fusion(lists: Sequence[Hits], k: int) -> Hits:
    """The k documents with the greatest sum of 1 / (60 + rank) (Cormack et al. 2009). [Q, d] each -> [Q, k]"""
    values = [np.broadcast_to(1 / (60 + np.arange(1, hits.ids.shape[1] + 1)), hits.ids.shape) for hits in lists]
    return best(_sums(lists, values), k)


def weighted_sum(dense: Hits, lexical: Hits, weight: float, k: int, normalization: str = "min_max") -> Hits:
    """The k documents with the greatest `weight * dense + (1 - weight) * lexical` of normalised scores.

    Scores of each list and question are normalised to 0 to 1 (`min_max`), or to standard deviations above the lowest
    (`z`). A document that a list lacks gets the lowest score of that list. [Q, d] each -> [Q, k]
    """
    values = [share * _normalized(hits, normalization) for share, hits in ((weight, dense), (1 - weight, lexical))]
    return best(_sums((dense, lexical), values), k)


def choose_weight(
    dense: Hits, lexical: Hits, gold: Sequence[Set[int]], normalization: str = "min_max", usual: float = USUAL
) -> float:
    """The dense share nearest to `usual` whose mean reciprocal rank of the `gold` positions is close to the best.

    A choice by few questions is noisy, so a share is close if the best one beats it by at most the standard error of
    their mean difference (the one-standard-error rule of Breiman et al. 1984, "Classification and Regression Trees",
    section 3.4.3, with paired differences).
    """

    def ranks(weight: float) -> np.ndarray:
        found = weighted_sum(dense, lexical, weight, 10, normalization).ids  # [Q, 10]
        relevant = np.array([[i in wanted for i in row] for row, wanted in zip(found.tolist(), gold, strict=True)])
        return np.where(relevant.any(1), 1 / (relevant.argmax(1) + 1), 0.0)

    reciprocal = np.array([ranks(weight) for weight in WEIGHTS])  # [W, Q]
    gap = reciprocal[reciprocal.mean(1).argmax()] - reciprocal
    near = gap.mean(1) <= gap.std(1) / np.sqrt(max(len(gold) - 1, 1)) + 1e-9
    return float(min(WEIGHTS[near], key=lambda weight: abs(weight - usual)))


def _normalized(hits: Hits, normalization: str) -> np.ndarray:
    """Scores above the lowest of their list, in units of the list's range or deviation. [Q, d]"""
    scores = np.where(hits.ids >= 0, hits.scores, np.nan).astype(np.float64)
    found = ~np.isnan(scores).all(axis=1, keepdims=True)  # [Q, 1]
    scores = np.where(found, scores, 0.0)
    lowest, highest = np.nanmin(scores, axis=1, keepdims=True), np.nanmax(scores, axis=1, keepdims=True)
    unit = highest - lowest if normalization == "min_max" else np.nanstd(scores, axis=1, keepdims=True)
    # If all scores are equal, they still rank above documents that were not found.
    return np.where(highest > lowest, (scores - lowest) / np.where(unit > 0, unit, 1), 1.0)


def _sums(lists: Sequence[Hits], values: Sequence[np.ndarray]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Each question's documents in any of the lists, and their sums of values: (sums, positions)."""
    ids = np.concatenate([hits.ids for hits in lists], axis=1)
    for row_ids, row_values in zip(ids, np.concatenate(values, axis=1), strict=True):
        found = row_ids >= 0
        documents, places = np.unique(row_ids[found], return_inverse=True)
        yield np.bincount(places, row_values[found], len(documents)), documents
