"""Hard negatives: passages that a retriever ranks high and that do not answer the question.

Which ranks and scores count follows Xiong et al. 2021 (ANCE) and, for margins, de Souza Moreira et al. 2024
(NV-Retriever, "TopK-MarginPos" and "TopK-PercPos").
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import zip_longest

import numpy as np
from tqdm import tqdm

from rqa.data.documents import Document
from rqa.data.duplicates import digest, normalize
from rqa.data.examples import Example
from rqa.prompts import retrieval_query
from rqa.retrieval.hits import Hits, PassageRetriever, best, stack
from rqa.runtime.errors import UserError, check_bounds

QUERIES_AT_ONCE = 256
TEXTS_KEPT = 2**18  # passages whose text's digest is remembered


@dataclass
class NegativeArguments:
    """Which passages of a ranking are hard negatives.

    Ranks, from 1, are those of the passages that are not gold.
    """

    negatives_from_rank: int = field(
        default=1, metadata={"help": "The best rank of a hard negative, among the passages that are not gold."}
    )
    negatives_to_rank: int = field(default=100, metadata={"help": "The worst rank of one, counted so, too."})
    negatives_margin: float | None = field(
        default=None,
        metadata={
            "help": "A hard negative scores lower than the best gold passage by at least this; none is taken where no "
            "gold passage is found. By default any score will do."
        },
    )
    negatives_max_share: float | None = field(
        default=None,
        metadata={"help": "It has at most this share of the best gold passage's score, such as 0.95; likewise."},
    )

    def __post_init__(self) -> None:
        check_bounds(self, "negatives_from_rank", at_least=1)
        check_bounds(self, "negatives_margin", at_least=0)
        check_bounds(self, "negatives_max_share", above=0, at_most=1)
        if self.negatives_to_rank < self.negatives_from_rank:
            raise UserError(f"--negatives_to_rank {self.negatives_to_rank}: is before --negatives_from_rank")

    def highest_score(self, gold: float) -> float:
        """The greatest score that a hard negative may have, from that of the best gold passage."""
        highest = np.inf
        if self.negatives_margin is not None:
            highest = min(highest, gold - self.negatives_margin)
        if self.negatives_max_share is not None:
            highest = min(highest, gold - (1 - self.negatives_max_share) * abs(gold))
        return highest


class NegativeChooser:
    """The one rule by which passages of a ranking are hard negatives, mined beforehand or in the training loop.

    Passages are gold by their normalised text, whatever their source; what is gold for the same question in another
    line of the file is gold here. Of equal texts the best-ranked counts, and the others have no rank.

    A gold passage that the ranking lacks scores no higher than its last passage, if the database holds it. So with a
    margin or a share nothing of such a ranking is chosen: whatever ranks before gold may well answer the question.

    Attributes:
        counts: What was chosen from and left out, over all rankings.
    """

    def __init__(
        self, examples: Sequence[Example], documents: Sequence[Document], arguments: NegativeArguments
    ) -> None:
        self.arguments = arguments
        self.counts: Counter[str] = Counter()
        self.text_of = lru_cache(TEXTS_KEPT)(lambda number: _text(documents[number]))
        gold: dict[bytes, set[bytes]] = {}
        for example in examples:
            gold.setdefault(_question(example), set()).update(map(_text, example.gold_docs))
        self._gold = [gold[_question(example)] for example in examples]

    @property
    def depth(self) -> int:
        """How many passages a ranking needs, for the last rank to be among them."""
        return self.arguments.negatives_to_rank + max(map(len, self._gold), default=0)

    def __call__(self, example: int, ids: Sequence[int], scores: Sequence[float]) -> list[int]:
        """The hard negatives in one question's ranking, best first.

        Args:
            example: The question's position among the examples.
            ids: The ranking's positions in the database, best first; -1 stands for none. [k]
            scores: Theirs. [k]
        """
        gold_score = -np.inf
        ranked: dict[bytes, tuple[int, float]] = {}
        for number, score in zip(ids, scores, strict=True):
            if number < 0:
                continue
            text = self.text_of(number)
            if text in self._gold[example]:
                gold_score = max(gold_score, score)
                self.counts["passages left out as gold"] += 1
            else:
                ranked.setdefault(text, (number, score))
        highest = self.arguments.highest_score(gold_score)
        window = list(ranked.values())[self.arguments.negatives_from_rank - 1 : self.arguments.negatives_to_rank]
        chosen = [number for number, score in window if score <= highest]
        self.counts["searches that found a gold passage"] += bool(gold_score > -np.inf)
        self.counts["passages left out by their score"] += len(window) - len(chosen)
        return chosen


def _text(document: Document) -> bytes:
    return digest(normalize(document.page_content))


def _question(example: Example) -> bytes:
    return digest(normalize(retrieval_query(example)))


def mine(
    chooser: NegativeChooser, rankings: Sequence[Hits], documents: Sequence[Document], count: int
) -> list[list[Document]]:
    """The hard negatives of each question, `count` at most, taken in turn from each retriever's ranking, none twice.

    Args:
        rankings: What each retriever found for all questions, `chooser.depth` deep or more. [Q, k] each
    """
    found = []
    for number in tqdm(range(len(rankings[0].ids)), desc="choose negatives", unit="q", leave=False):
        lists = [chooser(number, hits.ids[number].tolist(), hits.scores[number].tolist()) for hits in rankings]
        chosen: dict[bytes, int] = {}
        for i in (i for row in zip_longest(*lists) for i in row if i is not None):
            chosen.setdefault(chooser.text_of(i), i)
        found.append([documents[i] for i in list(chosen.values())[:count]])
    return found


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
