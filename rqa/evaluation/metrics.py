"""Scores of answers and of rankings; each is a rate between 0 and 1."""

import math
import re
import string
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence, Set
from functools import cache
from typing import Any

import sacrebleu

ROUGE_KINDS = ("rouge1", "rouge2", "rougeL")
LOCALRQA_NAMES = {"gen/f1": "gen/f1/avg_f1_ans", **{f"gen/{kind}": f"gen/rouge/avg_{kind}_ans" for kind in ROUGE_KINDS}}


def normalize_answer(text: str) -> list[str]:
    """Lower-case words without punctuation and articles (Rajpurkar et al. 2016, SQuAD)."""
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def token_f1(answer: str, reference: str) -> float:
    """The harmonic mean of word precision and recall; two empty texts agree."""
    ours, theirs = normalize_answer(answer), normalize_answer(reference)
    if not ours or not theirs:
        return float(ours == theirs)
    return 2 * (Counter(ours) & Counter(theirs)).total() / (len(ours) + len(theirs))


def faithfulness(answer: str, passages: Sequence[str], size: int = 1) -> float:
    """The share of the answer's words, or runs of `size` words, that the passages hold as often; 0 if it has none.

    Words are those of `token_f1`, without articles and punctuation. A run never spans two passages.
    """

    def runs(text: str) -> Counter[tuple[str, ...]]:
        words = normalize_answer(text)
        return Counter(zip(*(words[start:] for start in range(size)), strict=False))

    ours, theirs = runs(answer), sum(map(runs, passages), Counter())
    return (ours & theirs).total() / ours.total() if ours else 0.0


def score_answer(answer: str, reference: str) -> dict[str, float]:
    """The scores of one answer beside its reference that can be averaged over answers."""
    rouge = {kind: score.fmeasure for kind, score in _rouge().score(reference, answer).items()}
    same = float(normalize_answer(answer) == normalize_answer(reference))
    return rouge | {"f1": token_f1(answer, reference), "exact_match": same}


@cache
def _rouge() -> Any:
    from rouge_score.rouge_scorer import RougeScorer  # brings nltk, which takes longer to import than all of rqa

    return RougeScorer(list(ROUGE_KINDS), use_stemmer=True)


def bleu_statistics(answer: str, reference: str) -> list[int]:
    """What `bleu` needs of one answer: matches and totals of runs of 1 to 4 words, both lengths. -> [10]"""
    score = _BLEU.sentence_score(answer, [reference])
    return [*score.counts, *score.totals, score.sys_len, score.ref_len]


_BLEU = sacrebleu.BLEU(effective_order=True)  # of its sentence scores only the counts are used


def bleu(statistics: Sequence[int]) -> float:
    """sacreBLEU, divided by 100, from statistics summed over answers. [10]"""
    counts, totals, lengths = list(statistics[:4]), list(statistics[4:8]), map(int, statistics[8:])
    score = sacrebleu.BLEU.compute_bleu(counts, totals, *lengths, smooth_method="exp").score
    return min(score / 100, 1.0)  # sacreBLEU's geometric mean of four ones comes out a rounding error above one


def corpus_bleu(answers: Sequence[str], references: Sequence[str]) -> float:
    """sacreBLEU over all answers together, divided by 100."""
    rows = [bleu_statistics(*pair) for pair in zip(answers, references, strict=True)]
    return bleu([sum(column) for column in zip(*rows, strict=True)])


def reciprocal_rank(ranking: Sequence[Hashable], gold: Set[Hashable], k: int = 10) -> float:
    """One over the rank of the first gold document; 0 if it is not among the first k."""
    return next((1 / rank for rank in _gold_ranks(ranking, gold, k)), 0.0)


def ndcg(ranking: Sequence[Hashable], gold: Set[Hashable], k: int = 10) -> float:
    """Discounted cumulative gain over the best possible one, relevance 0 or 1 (Järvelin & Kekäläinen 2002)."""
    gain = sum(1 / math.log2(rank + 1) for rank in _gold_ranks(ranking, gold, k))
    return gain / sum(1 / math.log2(rank + 1) for rank in range(1, min(k, len(gold)) + 1))


def average_precision(ranking: Sequence[Hashable], gold: Set[Hashable], k: int = 10) -> float:
    """The precision at each gold document's rank among the first k, summed and divided by the number of gold ones.

    Source: trec_eval's `map_cut`.
    """
    return sum(found / rank for found, rank in enumerate(_gold_ranks(ranking, gold, k), start=1)) / len(gold)


def _gold_ranks(ranking: Sequence[Hashable], gold: Set[Hashable], k: int) -> list[int]:
    """The ranks, from 1 to k, at which gold documents are first found, in ascending order."""
    return sorted(ranking.index(document) + 1 for document in gold if document in ranking[:k])


def score_ranking(ranking: Sequence[Hashable], gold: Set[Hashable], cutoffs: Sequence[int]) -> dict[str, float]:
    """The scores of one ranking that can be averaged over questions; recall is 1 if ALL gold is among the first k."""
    return {
        **{f"recall@{k}": float(gold <= set(ranking[:k])) for k in cutoffs},
        "mrr@10": reciprocal_rank(ranking, gold),
        "ndcg@10": ndcg(ranking, gold),
        "map@10": average_precision(ranking, gold),
    }


def with_localrqa_names(means: Mapping[str, float]) -> dict[str, float]:
    """The scores by our names and by LocalRQA's: Recall@4 is `retr/recall@4` and `retr/document_recall/recall4`.

    ROUGE is of word stems here, and of whole words there.
    """
    theirs = {name: name.replace("retr/recall@", "retr/document_recall/recall") for name in means} | LOCALRQA_NAMES
    return dict(means) | {theirs[name]: mean for name, mean in means.items()}
