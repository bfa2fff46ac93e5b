"""BM25: passages found by the words that they share with the question."""

import logging
import re
from collections.abc import Sequence

import bm25s
import numpy as np

from rqa.data.documents import Document
from rqa.retrieval.hits import Hits, PassageRetriever, best, stack
from rqa.runtime.files import fingerprint

logging.getLogger("bm25s").setLevel(logging.WARNING)  # it logs at DEBUG whatever the application asked for


class LexicalRetriever(PassageRetriever):
    """BM25 as Lucene computes it (Robertson & Zaragoza 2009), over the documents' formatted text.

    A document that shares no word with the question is not found at all. Equal scores are ranked by position in the
    database, so that two runs find the same.

    Args:
        documents: The document database.
        k1: How soon a word that is repeated stops to count.
        b: How much a long document is discounted.
    """

    def __init__(self, documents: Sequence[Document], k1: float = 1.2, b: float = 0.75) -> None:
        self.documents = documents
        self._parameters = (k1, b)
        self._bm25 = bm25s.BM25(k1=k1, b=b, method="lucene")
        # bm25s cannot index a vocabulary without words: a document that has none gets one that nobody asks for.
        self._bm25.index([_words(document.fmt_content) or [""] for document in documents], show_progress=False)

    def retrieve(self, queries: Sequence[str], k: int) -> Hits:
        k = min(k, len(self.documents))
        return stack([self._search(query, k) for query in queries], k)

    def identity(self) -> str:
        return fingerprint("bm25", *map(str, self._parameters), *(document.fmt_content for document in self.documents))

    def _search(self, query: str, k: int) -> tuple[np.ndarray, np.ndarray]:
        scores = self._bm25.get_scores_from_ids(self._bm25.get_tokens_ids(_words(query)))  # [N]
        found = np.flatnonzero(scores > 0)
        return best(scores[found], found, k)


def _words(text: str) -> list[str]:
    """Every word counts: stop words and a stemmer would tie the retriever to one language."""
    return re.findall(r"\w+", text.casefold())
