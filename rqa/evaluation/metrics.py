"""Answer metrics, each a rate between 0 and 1. BLEU, which is of all answers together, has its own interval."""

from collections import Counter
from collections.abc import Sequence
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import sacrebleu

from rqa.evaluation.results import Rates, Rows, interval, resampled
from rqa.runtime.text import spaced, words

_BLEU = sacrebleu.BLEU(effective_order=True)  # only the counts of its sentence scores are used


def normalize_answer(text: str) -> list[str]:
    """Words without punctuation and articles (SQuAD, Rajpurkar et al. 2016); characters in Chinese and the like."""
    return [word for word in words(text, joined=True) if word not in ("a", "an", "the")]


def right_answers(row: dict[str, Any]) -> list[str]:
    """The gold answer and the other right ones, except those without words, which would equal an empty answer."""
    return [row["gold_answer"], *(other for other in row.get("other_answers") or () if normalize_answer(other))]


def faithfulness(answer: str, passages: Sequence[str], size: int = 1) -> float:
    """Share of the answer's n-grams (n is `size`) that occur as often in the passages; 0 if the answer has none."""

    def ngrams(text: str) -> Counter[tuple[str, ...]]:
        tokens = normalize_answer(text)
        return Counter(zip(*(tokens[start:] for start in range(size)), strict=False))

    ours, theirs = ngrams(answer), sum(map(ngrams, passages), Counter())  # no n-gram spans two passages
    return (ours & theirs).total() / ours.total() if ours else 0.0


def score_answer(answer: str, *references: str) -> dict[str, float]:
    """Scores of one answer, each the best over all references; F1 compares words, and is 1 for two empty texts."""
    rouge = {kind: score.fmeasure for kind, score in _rouge().score_multi(references, answer).items()}
    ours, right = normalize_answer(answer), list(map(normalize_answer, references))
    same = float(ours in right)
    f1 = max(2 * (Counter(ours) & Counter(theirs)).total() / (len(ours) + len(theirs) or 1) for theirs in right)
    return rouge | {"f1": max(f1, same), "exact_match": same}


@cache
def _rouge() -> Any:
    from rouge_score.rouge_scorer import RougeScorer  # imports nltk, which takes longer than all of rqa
    from rouge_score.tokenizers import DefaultTokenizer

    stem = DefaultTokenizer(use_stemmer=True).tokenize  # for English; it drops all other letters
    tokenizer = SimpleNamespace(
        tokenize=lambda text: [s for w in words(text) for s in (stem(w) if w.isascii() else [w])]
    )
    return RougeScorer(["rouge1", "rouge2", "rougeL"], tokenizer=tokenizer)


def bleu_statistics(answer: str, *references: str) -> list[int]:
    """Statistics of one answer for `bleu`: n-gram matches and totals for n from 1 to 4, both lengths. -> [10]"""
    score = _BLEU.sentence_score(spaced(answer), list(map(spaced, references)))
    return [*score.counts, *score.totals, score.sys_len, score.ref_len]


def bleu(statistics: Sequence[int]) -> float:
    """sacreBLEU / 100 from statistics summed over answers; 1 if all answers are right, however short. [10]"""
    counts, totals, (length, reference) = list(statistics[:4]), list(statistics[4:8]), map(int, statistics[8:])
    if counts == totals and length >= reference > 0:
        return 1.0  # sacreBLEU gives 0 if no answer has four words, otherwise a rounding error above 1
    return sacrebleu.BLEU.compute_bleu(counts, totals, length, reference, smooth_method="exp").score / 100


def corpus_bleu(answers: Sequence[str], references: Sequence[str]) -> float:
    """sacreBLEU / 100 of all answers together."""
    return bleu(np.sum([bleu_statistics(*pair) for pair in zip(answers, references, strict=True)], axis=0))


def answer_statistics(rows: Rows) -> list[list[int]]:
    """BLEU statistics of each generated answer that has a reference. [n, 10]"""
    both = [row for row in rows if "generated_answer" in row and "gold_answer" in row]
    return [bleu_statistics(row["generated_answer"], *right_answers(row)) for row in both]


def bleu_samples(statistics: np.ndarray) -> np.ndarray:
    """BLEU of 1,000 bootstrap resamples, the same at every call, so that systems can be paired. [n, 10] -> [1000]"""
    sums = (sample for counts in resampled(len(statistics), 1000) for sample in counts @ statistics)
    return np.array([bleu(sample) for sample in sums])


def bleu_rate(rows: Rows) -> Rates:
    """BLEU in the form of `results.with_intervals`; empty if no row has an answer."""
    if not (statistics := answer_statistics(rows)):
        return {}
    low, high = interval(bleu_samples(np.array(statistics))).tolist()
    value = bleu(np.sum(statistics, axis=0))
    return {"test_gen/bleu": {"value": value, "n": len(statistics), "low": low, "high": high}}
