"""Hard negatives mined before training, for a whole file of questions."""

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import numpy as np

from rqa.objectives.ctl import NegativeChooser
from rqa.retrieval.retriever import Hits, PassageRetriever
from rqa.runtime import distributed
from rqa.runtime.cli import progress

QUERIES_AT_ONCE = 256


def mine(chooser: NegativeChooser, rankings: Sequence[Hits], count: int) -> list[list[int]]:
    """Choose at most `count` hard negatives for each question, from the rankings in turn, each text once.

    Each ranking holds all questions and is at least `chooser.depth` deep [Q, k]. -> positions in the database
    """
    found = []
    for number in progress(range(len(rankings[0].ids)), desc="choose negatives", unit="q"):
        lists = [chooser(number, hits.ids[number].tolist(), hits.scores[number].tolist()) for hits in rankings]
        chosen: dict[Any, int] = {}
        for i in (i for row in zip_longest(*lists) for i in row if i is not None):
            chosen.setdefault(chooser.text_of(i), i)
        found.append(list(chosen.values())[:count])
    return found


def rank(retriever: PassageRetriever, queries: Sequence[str], k: int) -> Hits:
    """The k best documents for each question; every process calls this and ranks its share. -> [Q, k]"""
    size = QUERIES_AT_ONCE * distributed.world_size()
    parts = progress(range(0, len(queries), size), desc="search", unit="batch")
    found = [retriever.retrieve_shared(queries[first : first + size], k) for first in parts]
    return Hits(np.concatenate([hits.ids for hits in found]), np.concatenate([hits.scores for hits in found]))
