"""Scores of answers and of rankings; every one a rate between 0 and 1."""

import math
import re
import string
from collections import Counter
from collections.abc import Hashable, Sequence, Set

import sacrebleu
from rouge_score.rouge_scorer import RougeScorer

ROUGE_KINDS = ("rouge1", "rouge2", "rougeL")


def normalize_answer(text: str) -> list[str]:
    """Lower-case words without punctuation and articles (Rajpurkar et al. 2016, SQuAD)."""
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def token_f1(answer: str, reference: str) -> float:
    """The harmonic mean of word precision and recall; two empty texts agree."""
    ours, theirs = normalize_answer(answer), normalize_answer(reference)
    common = sum((Counter(ours) & Counter(theirs)).values())
    if not ours or not theirs:
        return float(ours == theirs)
    return 2 * common / (len(ours) + len(theirs))


def exact_match(answer: str, reference: str) -> float:
    """1 if both are the same normalised words."""
    return float(normalize_answer(answer) == normalize_answer(reference))


def score_answer(answer: str, reference: str) -> dict[str, float]:
    """The scores of one answer that can be averaged over answers."""
    rouge = _ROUGE.score(reference, answer)
    return {
        **{kind: rouge[kind].fmeasure for kind in ROUGE_KINDS},
        "f1": token_f1(answer, reference),
        "exact_match": exact_match(answer, reference),
    }


def corpus_bleu(answers: Sequence[str], references: Sequence[str]) -> float:
    """sacreBLEU over all answers together, divided by 100."""
    # sacreBLEU's geometric mean of four ones comes out a rounding error above one.
    return min(sacrebleu.corpus_bleu(list(answers), [list(references)]).score / 100, 1.0)


def recall_at(ranking: Sequence[Hashable], gold: Set[Hashable], k: int) -> float:
    """1 if ALL gold documents are among the first k."""
    return float(gold <= set(ranking[:k]))


def reciprocal_rank(ranking: Sequence[Hashable], gold: Set[Hashable], k: int = 10) -> float:
    """One over the rank of the first gold document; 0 if it is not among the first k."""
    return next((1 / rank for rank, document in enumerate(ranking[:k], start=1) if document in gold), 0.0)


def ndcg(ranking: Sequence[Hashable], gold: Set[Hashable], k: int = 10) -> float:
    """Discounted cumulative gain over the best possible one, relevance 0 or 1 (Järvelin & Kekäläinen 2002)."""
    found = {document: rank for rank, document in reversed(list(enumerate(ranking[:k], start=1)))}  # its first rank
    gain = sum(1 / math.log2(rank + 1) for rank in sorted(found[document] for document in gold & found.keys()))
    ideal = sum(1 / math.log2(rank + 1) for rank in range(1, min(k, len(gold)) + 1))
    return gain / ideal


_ROUGE = RougeScorer(list(ROUGE_KINDS), use_stemmer=True)
