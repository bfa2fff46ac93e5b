"""Hard negatives from the live retriever (Xiong et al. 2021, ANCE)."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from rqa.data.documents import Document
from rqa.data.examples import Example
from rqa.prompts import retrieval_query
from rqa.retrieval.retriever import Retriever
from rqa.runtime import distributed

DEPTH = 20
HITS_AT_ONCE = 2**22  # bounds the memory of deep searches


class MinedNegatives:
    """The best-ranked documents that are not gold, for each training question.

    Each question is searched to a depth of some 20 documents, and deeper, to the end if need be, where that gives it
    fewer than `count` negatives.

    Args:
        count: Negatives that each question should have, if the database holds as many.
        from_rank: Better-ranked non-gold documents, counted from 1, are left out.
        margin: A document that scores within this of the gold passage may well answer the question; it is left out.
            None: no document is.
    """

    def __init__(
        self, examples: Sequence[Example], retriever: Retriever, count: int, from_rank: int, margin: float | None
    ) -> None:
        self.examples = examples
        self.retriever = retriever
        self.count = count
        self.from_rank = from_rank
        self.margin = margin
        self._found: list[list[int]] = []

    def __getitem__(self, example: int) -> list[Document]:
        return [self.retriever.documents[number] for number in self._found[example]]

    def __call__(self) -> None:
        """Ask the retriever, whose index is fresh, for all questions; each process for its share of them."""
        encoder, examples = self.retriever.encoder, distributed.share(self.examples)
        queries = encoder.embed(encoder.tokenize_queries([retrieval_query(example) for example in examples]))
        highest = self._highest_scores(examples, queries)
        found: list[list[int]] = [[] for _ in examples]
        missing, depth, N = list(range(len(examples))), DEPTH + self.from_rank, len(self.retriever.documents)
        while missing:
            width = max(1, HITS_AT_ONCE // min(depth, N))
            for part in (missing[start : start + width] for start in range(0, len(missing), width)):
                hits = self.retriever.search(queries[part], depth)
                for number, *ranking in zip(part, hits.ids.tolist(), hits.scores.tolist(), strict=True):
                    found[number] = self._negatives(examples[number], highest[number], *ranking)
            missing = [number for number in missing if len(found[number]) < self.count] if depth < N else []
            depth *= 4
        self._found = distributed.gather(found)

    def save(self, directory: Path) -> None:
        """Write what was found."""
        (directory / "negatives.json").write_text(json.dumps(self._found), encoding="utf-8")

    def load(self, directory: Path) -> None:
        """Read it; as many questions must have been asked.

        Raises:
            ValueError: they were others.
        """
        found = json.loads((directory / "negatives.json").read_text(encoding="utf-8"))
        if len(found) != len(self.examples):
            raise ValueError("its mined negatives are of another training file")
        self._found = found

    def _negatives(self, example: Example, highest: float, ids: list[int], scores: list[float]) -> list[int]:
        """The documents of one ranking that are not gold, from `from_rank` on, and score no higher than `highest`."""
        documents, gold = self.retriever.documents, {document.key for document in example.gold_docs}
        ranking = zip(ids, scores, strict=True)
        others = [(number, score) for number, score in ranking if number >= 0 and documents[number].key not in gold]
        return [number for number, score in others[self.from_rank - 1 :] if score <= highest]

    def _highest_scores(self, examples: Sequence[Example], queries: np.ndarray) -> list[float]:
        """The greatest score that a negative of each question may have. [Q, D] -> [Q]"""
        if self.margin is None:
            return [np.inf] * len(examples)
        encoder = self.retriever.encoder.passage_side
        gold = {document.key: document for example in self.examples for document in example.gold_docs}
        texts = distributed.share([document.fmt_content for document in gold.values()])
        embeddings = np.stack(distributed.gather(encoder.embed(encoder.tokenize_passages(texts))))  # [G, D]
        rows = {key: row for row, key in enumerate(gold)}
        best = [
            np.max(embeddings[[rows[document.key] for document in example.gold_docs]] @ query)
            for example, query in zip(examples, queries, strict=True)
        ]
        return [score - self.margin for score in best]
