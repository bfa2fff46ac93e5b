"""Scores of answers; each is a rate between 0 and 1. BLEU, of all answers together, brings its interval."""

import re
import string
from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import sacrebleu

from rqa.evaluation.results import Rates, Rows, interval, resampled

_BLEU = sacrebleu.BLEU(effective_order=True)  # of its sentence scores only the counts are used


def normalize_answer(text: str) -> list[str]:
    """Lower-case words without punctuation and articles (Rajpurkar et al. 2016, SQuAD)."""
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def faithfulness(answer: str, passages: Sequence[str], size: int = 1) -> float:
    """The share of the answer's words, or runs of `size` words, that the passages hold as often; 0 if it has none."""

    def runs(text: str) -> Counter[tuple[str, ...]]:
        words = normalize_answer(text)
        return Counter(zip(*(words[start:] for start in range(size)), strict=False))

    ours, theirs = runs(answer), sum(map(runs, passages), Counter())  # a run never spans two passages
    return (ours & theirs).total() / ours.total() if ours else 0.0


def score_answer(answer: str, reference: str) -> dict[str, float]:
    """The scores of one answer that can be averaged; F1 is that of word precision and recall, 1 for two empty texts."""
    rouge = {kind: score.fmeasure for kind, score in _rouge().score(reference, answer).items()}
    ours, theirs = normalize_answer(answer), normalize_answer(reference)
    same, total = float(ours == theirs), len(ours) + len(theirs)
    f1 = 2 * (Counter(ours) & Counter(theirs)).total() / total if ours and theirs else same
    return rouge | {"f1": f1, "exact_match": same}


@cache
def _rouge() -> Any:
    from rouge_score.rouge_scorer import RougeScorer  # brings nltk, which takes longer to import than all of rqa

    return RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)


def bleu_statistics(answer: str, reference: str) -> list[int]:
    """What `bleu` needs of one answer: matches and totals of runs of 1 to 4 words, both lengths. -> [10]"""
    score = _BLEU.sentence_score(answer, [reference])
    return [*score.counts, *score.totals, score.sys_len, score.ref_len]


def bleu(statistics: Sequence[int]) -> float:
    """sacreBLEU, divided by 100, from statistics summed over answers. [10]"""
    counts, totals, lengths = list(statistics[:4]), list(statistics[4:8]), map(int, statistics[8:])
    score = sacrebleu.BLEU.compute_bleu(counts, totals, *lengths, smooth_method="exp").score
    return min(score / 100, 1.0)  # sacreBLEU's geometric mean of four ones comes out a rounding error above one


def corpus_bleu(answers: Sequence[str], references: Sequence[str]) -> float:
    """sacreBLEU over all answers together, divided by 100."""
    rows = [bleu_statistics(*pair) for pair in zip(answers, references, strict=True)]
    return bleu([sum(column) for column in zip(*rows, strict=True)])


def answer_statistics(rows: Rows) -> list[list[int]]:
    """What BLEU needs of each generated answer. [n, 10]"""
    both = [row for row in rows if "generated_answer" in row and "gold_answer" in row]
    return [bleu_statistics(row["generated_answer"], row["gold_answer"]) for row in both]


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
