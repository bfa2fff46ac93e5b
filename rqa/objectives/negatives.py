"""Hard negatives from the live retriever (Xiong et al. 2021, ANCE)."""

from collections.abc import Sequence

import numpy as np

from rqa.data.documents import Document
from rqa.data.examples import Example
from rqa.prompts import retrieval_query
from rqa.retrieval.retriever import Retriever

DEPTH = 20


class MinedNegatives:
    """The best-ranked documents that are not gold, for each training question.

    Args:
        from_rank: Better-ranked non-gold documents, counted from 1, are left out.
        margin: A document that scores within this of the gold passage may well answer the question; it is left out.
            None: no document is.
    """

    def __init__(self, examples: Sequence[Example], retriever: Retriever, from_rank: int, margin: float | None) -> None:
        self.examples = examples
        self.retriever = retriever
        self.from_rank = from_rank
        self.margin = margin
        self._found: list[list[Document]] = []

    def __getitem__(self, example: int) -> list[Document]:
        return self._found[example]

    def mine(self) -> None:
        """Ask the retriever, whose index is fresh, for all questions at once."""
        encoder = self.retriever.encoder
        queries = encoder.embed(encoder.tokenize_queries([retrieval_query(example) for example in self.examples]))
        gold = {document.key: document for example in self.examples for document in example.gold_docs}
        embeddings = encoder.embed(encoder.tokenize_passages([document.fmt_content for document in gold.values()]))
        rows = {key: row for row, key in enumerate(gold)}
        scores, ids = self.retriever.index.search(queries, DEPTH + self.from_rank)
        self._found = []
        for number, example in enumerate(self.examples):
            keys = {document.key for document in example.gold_docs}
            best = np.max(embeddings[[rows[key] for key in keys]] @ queries[number])
            others = [
                (self.retriever.documents[i], score)
                for i, score in zip(ids[number].tolist(), scores[number].tolist(), strict=True)
                if i >= 0 and self.retriever.documents[i].key not in keys
            ]
            highest = np.inf if self.margin is None else best - self.margin
            self._found.append([document for document, score in others[self.from_rank - 1 :] if score <= highest])
