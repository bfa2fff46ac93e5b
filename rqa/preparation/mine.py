"""Hard negatives mined beforehand, for a whole file of questions."""

from collections.abc import Callable, Sequence
from itertools import zip_longest

import numpy as np

from rqa.data import Document
from rqa.objectives.ctl import NegativeChooser
from rqa.retrieval.retriever import Hits, PassageRetriever, best, stack
from rqa.runtime.cli import progress

QUERIES_AT_ONCE = 256


def mine(
    chooser: NegativeChooser, rankings: Sequence[Hits], documents: Sequence[Document], count: int
) -> list[list[Document]]:
    """The hard negatives of each question, `count` at most, taken in turn from each retriever's ranking, none twice.

    Rankings are those of all questions, `chooser.depth` deep or more. [Q, k] each
    """
    found = []
    for number in progress(range(len(rankings[0].ids)), desc="choose negatives", unit="q"):
        lists = [chooser(number, hits.ids[number].tolist(), hits.scores[number].tolist()) for hits in rankings]
        chosen: dict[str, int] = {}
        for i in (i for row in zip_longest(*lists) for i in row if i is not None):
            chosen.setdefault(chooser.text_of(i), i)
        found.append([documents[i] for i in list(chosen.values())[:count]])
    return found


def rank_in_parts(
    open_part: Callable[[Sequence[Document]], PassageRetriever], documents: Sequence[Document], queries: Sequence[str],
    k: int, part_size: int,
) -> Hits:  # fmt: skip
    """The k best documents of a database that is indexed a part at a time, so that memory does not grow with it.

    Embeddings find the same in parts as at once. BM25 weighs words by how often they occur in the part. -> [Q, k]
    """
    kept = stack([best(np.empty(0), np.empty(0, dtype=np.int64), k) for _ in queries], k)
    for start in range(0, len(documents), part_size):
        retriever = open_part(documents[start : start + part_size])
        part = f"search {start + 1} to {start + len(retriever.documents)}"
        rows = []
        for first in progress(range(0, len(queries), QUERIES_AT_ONCE), desc=part, unit="batch"):
            chosen = slice(first, first + QUERIES_AT_ONCE)
            hits = retriever.retrieve(queries[chosen], min(k, len(retriever.documents)))
            ids = np.concatenate([kept.ids[chosen], np.where(hits.ids >= 0, hits.ids + start, -1)], axis=1)
            scores = np.concatenate([kept.scores[chosen], hits.scores], axis=1)
            rows += [best(score[i >= 0], i[i >= 0], k) for i, score in zip(ids, scores, strict=True)]
        kept = stack(rows, k)
    return kept
