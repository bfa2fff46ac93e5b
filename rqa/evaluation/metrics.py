"""Scores of answers; each is a rate between 0 and 1. BLEU, of all answers together, brings its interval."""

from collections import Counter
from collections.abc import Sequence
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import sacrebleu

from rqa.evaluation.results import Rates, Rows, interval, resampled
from rqa.runtime.text import spaced, words

_BLEU = sacrebleu.BLEU(effective_order=True)  # of its sentence scores only the counts are used


def normalize_answer(text: str) -> list[str]:
    """Words without punctuation and articles (Rajpurkar et al. 2016, SQuAD); Chinese and the like by character."""
    return [word for word in words(text, joined=True) if word not in ("a", "an", "the")]


def right_answers(row: dict[str, Any]) -> list[str]:
    """The gold answer and those as right; one without words would equal an empty answer."""
    return [row["gold_answer"], *(other for other in row.get("other_answers") or () if normalize_answer(other))]


def faithfulness(answer: str, passages: Sequence[str], size: int = 1) -> float:
    """The share of the answer's words, or runs of `size` words, that the passages hold as often; 0 if it has none."""

    def runs(text: str) -> Counter[tuple[str, ...]]:
        found = normalize_answer(text)
        return Counter(zip(*(found[start:] for start in range(size)), strict=False))

    ours, theirs = runs(answer), sum(map(runs, passages), Counter())  # a run never spans two passages
    return (ours & theirs).total() / ours.total() if ours else 0.0


def score_answer(answer: str, *references: str) -> dict[str, float]:
    """The scores of one answer, each its best over the references; F1 is of words, and 1 for two empty texts."""
    rouge = {kind: score.fmeasure for kind, score in _rouge().score_multi(references, answer).items()}
    ours, right = normalize_answer(answer), list(map(normalize_answer, references))
    same = float(ours in right)
    f1 = max(2 * (Counter(ours) & Counter(theirs)).total() / (len(ours) + len(theirs) or 1) for theirs in right)
    return rouge | {"f1": max(f1, same), "exact_match": same}


@cache
def _rouge() -> Any:
    from rouge_score.rouge_scorer import RougeScorer  # brings nltk, which takes longer to import than all of rqa
    from rouge_score.tokenizers import DefaultTokenizer

    stems = DefaultTokenizer(use_stemmer=True).tokenize  # of English; it drops all other letters
    every = SimpleNamespace(tokenize=lambda text: [s for w in words(text) for s in (stems(w) if w.isascii() else [w])])
    return RougeScorer(["rouge1", "rouge2", "rougeL"], tokenizer=every)


def bleu_statistics(answer: str, *references: str) -> list[int]:
    """What `bleu` needs of one answer: matches and totals of runs of 1 to 4 words, both lengths. -> [10]"""
    score = _BLEU.sentence_score(spaced(answer), list(map(spaced, references)))
    return [*score.counts, *score.totals, score.sys_len, score.ref_len]


def bleu(statistics: Sequence[int]) -> float:
    """sacreBLEU, divided by 100, from statistics summed over answers; 1 if all are right, however short. [10]"""
    counts, totals, (length, wanted) = list(statistics[:4]), list(statistics[4:8]), map(int, statistics[8:])
    if counts == totals and length >= wanted > 0:
        return 1.0  # sacreBLEU: 0 if none has four words, else a rounding error above one
    return sacrebleu.BLEU.compute_bleu(counts, totals, length, wanted, smooth_method="exp").score / 100


def answer_statistics(rows: Rows) -> list[list[int]]:
    """What BLEU needs of each generated answer. [n, 10]"""
    both = [row for row in rows if "generated_answer" in row and "gold_answer" in row]
    return [bleu_statistics(row["generated_answer"], *right_answers(row)) for row in both]


def bleu_samples(statistics: np.ndarray) -> np.ndarray:
    """BLEU of 1,000 resamples, the same at every call: two systems' may be subtracted. [n, 10] -> [1000]"""
    sums = (sample for counts in resampled(len(statistics), 1000) for sample in counts @ statistics)
    return np.array([bleu(sample) for sample in sums])


def bleu_rate(rows: Rows) -> Rates:
    """BLEU as `results.with_intervals` has the other rates; nothing where no row has an answer."""
    if not (statistics := answer_statistics(rows)):
        return {}
    low, high = interval(bleu_samples(np.array(statistics))).tolist()
    value = bleu(np.sum(statistics, axis=0))
    return {"test_gen/bleu": {"value": value, "n": len(statistics), "low": low, "high": high}}
