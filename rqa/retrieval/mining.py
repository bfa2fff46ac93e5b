"""Hard negatives: passages that a retriever ranks high and that do not answer the question.

Which ranks and scores count follows Xiong et al. 2021 (ANCE) and, for margins, de Souza Moreira et al. 2024
(NV-Retriever, "TopK-MarginPos" and "TopK-PercPos").
"""

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import zip_longest

import numpy as np
from tqdm import tqdm

from rqa.data.documents import Document
from rqa.data.duplicates import normalize
from rqa.data.examples import Example
from rqa.prompts import retrieval_query
from rqa.retrieval.hits import Hits, PassageRetriever, best, stack
from rqa.runtime.errors import UserError

QUERIES_AT_ONCE = 256
TEXTS_KEPT = 2**17  # passages whose normalised text is remembered


@dataclass
class MiningArguments:
    """Which passages of a ranking are hard negatives."""

    num_negatives: int = field(default=8, metadata={"help": "Hard negatives of a question, at most."})
    negatives_from_rank: int = field(default=1, metadata={"help": "The best-ranked passage that may be one, from 1."})
    negatives_to_rank: int = field(default=100, metadata={"help": "The worst-ranked passage that may be one."})
    negatives_margin: float | None = field(
        default=None,
        metadata={"help": "A negative scores lower than the best gold passage by at least this; by default any score."},
    )
    negatives_max_share: float | None = field(
        default=None,
        metadata={"help": "A negative has at most this share of the best gold passage's score, such as 0.95."},
    )

    def __post_init__(self) -> None:
        for name in ("num_negatives", "negatives_from_rank"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} {getattr(self, name)}: must be at least 1")
        if self.negatives_to_rank < self.negatives_from_rank:
            raise UserError(f"--negatives_to_rank {self.negatives_to_rank}: is before --negatives_from_rank")
        if self.negatives_margin is not None and self.negatives_margin < 0:
            raise UserError(f"--negatives_margin {self.negatives_margin}: must not be negative")
        if self.negatives_max_share is not None and not 0 < self.negatives_max_share <= 1:
            raise UserError(f"--negatives_max_share {self.negatives_max_share}: must be above 0 and at most 1")


def choose_negatives(
    texts: Sequence[str],
    scores: Sequence[float],
    gold: Collection[str],
    arguments: MiningArguments,
    counts: Counter[str],
) -> list[int]:
    """The ranks, from 0, of one ranking's hard negatives, not yet cut to their number; each text once.

    A gold passage that the ranking does not hold scores no higher than its last one, so with a margin nothing is left:
    whatever ranks before the gold passage may well answer the question.

    Args:
        texts: The normalised passages of the ranking, from rank 1 to `negatives_to_rank` at least.
        scores: Theirs, descending.
        gold: The normalised texts of all gold passages of this question.
        counts: Counts what is left out, and why.
    """
    gold_scores = [score for text, score in zip(texts, scores, strict=True) if text in gold]
    counts["questions whose gold passage was found"] += bool(gold_scores)
    highest = _highest_score(max(gold_scores, default=-np.inf), arguments)
    chosen: dict[str, int] = {}
    for rank in range(arguments.negatives_from_rank - 1, min(arguments.negatives_to_rank, len(texts))):
        if texts[rank] in gold:
            counts["passages left out as gold"] += 1
        elif scores[rank] > highest:
            counts["passages left out by their score"] += 1
        else:
            chosen.setdefault(texts[rank], rank)
    return list(chosen.values())


def _highest_score(gold: float, arguments: MiningArguments) -> float:
    highest = np.inf
    if arguments.negatives_margin is not None:
        highest = min(highest, gold - arguments.negatives_margin)
    if arguments.negatives_max_share is not None:
        highest = min(highest, gold - (1 - arguments.negatives_max_share) * abs(gold))
    return highest


def mine(
    examples: Sequence[Example], rankings: Sequence[Hits], documents: Sequence[Document], arguments: MiningArguments
) -> tuple[list[list[Document]], Counter[str]]:
    """The hard negatives of each question, taken in turn from each retriever's ranking, none twice.

    Args:
        rankings: What each retriever found for all questions, `negatives_to_rank` deep or more. [Q, k] each

    Returns:
        The negatives of each question, and what was left out, counted.
    """
    gold: dict[str, set[str]] = {}
    for example in examples:  # the same question may stand in several lines, each with another gold passage
        known = gold.setdefault(normalize(retrieval_query(example)), set())
        known.update(normalize(document.page_content) for document in example.gold_docs)
    text_of = lru_cache(TEXTS_KEPT)(lambda number: normalize(documents[number].page_content))
    counts: Counter[str] = Counter()
    found = []
    for number, example in enumerate(tqdm(examples, desc="choose negatives", unit="q", leave=False)):
        lists = []
        for hits in rankings:
            ids = [i for i in hits.ids[number].tolist() if i >= 0]
            texts, scores = [text_of(i) for i in ids], hits.scores[number].tolist()[: len(ids)]
            known = gold[normalize(retrieval_query(example))]
            lists.append([ids[rank] for rank in choose_negatives(texts, scores, known, arguments, counts)])
        in_turn = (i for row in zip_longest(*lists) for i in row if i is not None)
        chosen: dict[str, int] = {}
        for i in in_turn:
            chosen.setdefault(text_of(i), i)
        found.append([documents[i] for i in list(chosen.values())[: arguments.num_negatives]])
        counts["negatives"] += len(found[-1])
        counts["questions with fewer than asked"] += len(found[-1]) < arguments.num_negatives
    return found, counts


def rank_in_parts(
    open_part: Callable[[Sequence[Document]], PassageRetriever],
    documents: Sequence[Document],
    queries: Sequence[str],
    k: int,
    part_size: int,
) -> Hits:
    """The k best documents of a database that is indexed a part at a time, so that memory does not grow with it.

    Embeddings find the same in parts as at once. BM25 weighs words by how often they occur in the part.

    Args:
        open_part: A retriever over these documents.
        part_size: Documents indexed at once.
    """
    kept = stack([best(np.empty(0), np.empty(0, dtype=np.int64), k) for _ in queries], k)
    for start in range(0, len(documents), part_size):
        retriever = open_part(documents[start : start + part_size])
        part = f"search {start + 1} to {start + len(retriever.documents)}"
        rows = []
        for first in tqdm(range(0, len(queries), QUERIES_AT_ONCE), desc=part, unit="batch", leave=False):
            chosen = slice(first, first + QUERIES_AT_ONCE)
            hits = retriever.retrieve(queries[chosen], min(k, len(retriever.documents)))
            ids = np.concatenate([kept.ids[chosen], np.where(hits.ids >= 0, hits.ids + start, -1)], axis=1)
            scores = np.concatenate([kept.scores[chosen], hits.scores], axis=1)
            rows += [best(score[i >= 0], i[i >= 0], k) for i, score in zip(ids, scores, strict=True)]
        kept = stack(rows, k)
    return kept
