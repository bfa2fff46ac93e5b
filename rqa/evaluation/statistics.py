"""How sure a mean over questions is: bootstrap intervals, of one system and of the difference of two."""

from collections.abc import Callable, Iterator

import numpy as np

RESAMPLES = 10_000
LEVEL = 0.95
CHUNK = 2**22  # resampled counts held at once
TELLING = 6  # a sign test calls five questions that all changed one way chance: 2 * 0.5**5 > 0.05


def mean_intervals(values: np.ndarray, seed: int = 0) -> np.ndarray:
    """95 % intervals of the means over n questions, from resampled questions (Efron 1979, percentiles).

    Rates that are 0 for all questions, or 1 for all, would get an interval without width, which claims a certainty that
    nobody has: theirs is the exact binomial one (Clopper & Pearson 1934).

    Args:
        values: Scores between 0 and 1 of each question; each column is a metric. [n, M]

    Returns:
        Lower and upper ends. [M, 2]
    """
    n = len(values)
    means = np.concatenate([counts @ values for counts in _resampled(n, seed)]) / n  # [R, M]
    ends = _ends(means)
    margin = 1 - ((1 - LEVEL) / 2) ** (1 / n)
    ends[(values == 0).all(axis=0)] = (0, margin)
    ends[(values == 1).all(axis=0)] = (1 - margin, 1)
    return ends


def difference_intervals(differences: np.ndarray, seed: int = 0) -> np.ndarray:
    """95 % intervals of the mean difference of two systems on the same n questions (paired bootstrap). [n, M] -> [M, 2]

    Source: Koehn (2004), Statistical significance tests for machine translation evaluation.
    """
    n = len(differences)
    return _ends(np.concatenate([counts @ differences for counts in _resampled(n, seed)]) / n)


def statistic_samples(
    statistics: np.ndarray, score: Callable[[np.ndarray], float], seed: int = 0, resamples: int = 1000
) -> np.ndarray:
    """A score of statistics summed over n questions, such as BLEU, on resampled questions. [n, S] -> [R]

    The same seed and n resample the same questions, so that the samples of two systems may be subtracted.
    """
    sums = (sample for counts in _resampled(len(statistics), seed, resamples) for sample in counts @ statistics)
    return np.array([score(sample) for sample in sums])


def interval(samples: np.ndarray) -> tuple[float, float]:
    """The ends between which 95 % of the samples lie. [R]"""
    low, high = _ends(samples[:, None])[0]
    return float(low), float(high)


def is_telling(low: float, high: float, changed: int) -> bool:
    """Whether a difference can be told from chance: its interval excludes 0, and enough questions changed.

    Fewer than six changed questions tell nothing, whatever the bootstrap says: it cannot draw what it never saw.
    """
    return changed >= TELLING and (low > 0 or high < 0)


def _resampled(n: int, seed: int, resamples: int = RESAMPLES) -> Iterator[np.ndarray]:
    """How often each question was drawn. -> chunks of [r, n]"""
    chance = np.random.default_rng(seed)
    size = max(1, min(resamples, CHUNK // n))
    for start in range(0, resamples, size):
        rows = min(size, resamples - start)
        drawn = chance.integers(0, n, (rows, n)) + n * np.arange(rows)[:, None]
        yield np.bincount(drawn.ravel(), minlength=rows * n).reshape(rows, n).astype(np.float64)


def _ends(samples: np.ndarray) -> np.ndarray:
    """[R, M] -> [M, 2]"""
    return np.quantile(samples, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0).T
