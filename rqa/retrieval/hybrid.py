"""BM25, BM25 beside embeddings, and whichever retriever the flags ask for."""

import logging
import os
from array import array
from collections import defaultdict
from collections.abc import Sequence, Set
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from tempfile import TemporaryFile

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # bm25s tries JAX when imported, which takes 75 % of a GPU's memory

import bm25s
import numpy as np

from rqa.data import Document, Example, read_examples
from rqa.documents import PRINT, Places, keys_of, passages_of, prints, with_known_gold
from rqa.models.encoder import EncoderArguments, load_encoder
from rqa.prompts import retrieval_query
from rqa.retrieval.index import IndexArguments
from rqa.retrieval.ranking import best
from rqa.retrieval.reranking import RerankingArguments, reranked
from rqa.retrieval.retriever import Hits, PassageRetriever, Retriever, stack
from rqa.runtime import distributed
from rqa.runtime.cli import progress
from rqa.runtime.errors import UserError
from rqa.runtime.files import atomic_directory, cache_root, damage, fingerprint
from rqa.runtime.flags import flag
from rqa.runtime.text import words

log = logging.getLogger(__name__)
logging.getLogger("bm25s").setLevel(logging.WARNING)  # it logs at DEBUG whatever the application asked for

DEPTH = 100  # candidates that each retriever brings
WEIGHTS = np.linspace(0, 1, 21)
AT_ONCE = 2**21  # words of documents whose scores are computed together
FILES = {"data": "f4", "indices": "i4", "indptr": "i8", "words": PRINT, "columns": "i8"}  # how scipy names a CSC matrix


@dataclass(kw_only=True)
class RetrieverArguments(EncoderArguments, RerankingArguments, IndexArguments):
    """Which retriever finds the passages."""

    retriever: str = flag("dense", "Search by embeddings, by shared words, or by both.", ["dense", "bm25", "hybrid"])
    fusion: str = flag("rrf", "How hybrid fuses both lists: by ranks, or a weighted sum.", ["rrf", "weighted"])
    fusion_weight: float | None = flag(
        None, "Dense share of the sum. Default: the best on --fusion_eval_path, or a trainer's --eval_file.", rare=True
    )
    fusion_normalization: str = flag("min_max", "How the sum normalises scores.", ["min_max", "z"], rare=True)
    fusion_eval_path: str | None = flag(None, "Examples (JSONL) that choose the dense share.", rare=True)

    def check(self) -> None:
        self.check_bounds("fusion_weight", at_least=0, at_most=1)
        if self.fusion_weight is not None and self.fusion != "weighted":
            raise UserError("--fusion_weight: reciprocal ranks have no weight; add --fusion weighted")
        if self.fusion != "rrf" and self.retriever != "hybrid":
            raise UserError(f"--fusion {self.fusion}: there is nothing to fuse; add --retriever hybrid")


def open_retriever(
    flags: RetrieverArguments, embedding_model: str | None, documents: Sequence[Document],
    examples: Sequence[Example] = (),
) -> PassageRetriever:  # fmt: skip
    """The retriever that the flags name, with its index loaded or built, and behind it the reranker, if any.

    The name of the encoder may be `bm25`, too. Examples choose the weight of a sum if `fusion_eval_path` names none.
    """
    return reranked(_first_stage(flags, embedding_model, documents, examples), flags)


def _first_stage(
    flags: RetrieverArguments, embedding_model: str | None, documents: Sequence[Document], examples: Sequence[Example]
) -> PassageRetriever:
    if embedding_model == "bm25" and flags.retriever == "hybrid":
        raise UserError("--retriever hybrid: needs an encoder beside BM25; name one instead of bm25")
    if flags.filter and (flags.retriever != "dense" or embedding_model == "bm25"):
        raise UserError("--filter: BM25 finds passages that do not meet it; use --retriever dense and an encoder")
    if "bm25" in (flags.retriever, embedding_model):
        return LexicalRetriever(documents)
    if embedding_model is None:
        raise UserError(f"--retriever {flags.retriever}: name its encoder, too (--embedding_model)")
    if flags.fusion_eval_path:
        examples = with_known_gold(read_examples(flags.fusion_eval_path), documents)
    chosen_by = [example for example in examples if example.gold_docs]
    if flags.fusion == "weighted" and flags.fusion_weight is None and not chosen_by:
        chosen = "questions with gold passages that choose it (--fusion_eval_path, or a trainer's --eval_file)"
        raise UserError(f"--fusion weighted: give --fusion_weight, or {chosen}")
    dense = Retriever(load_encoder(embedding_model, flags), documents, flags).open(flags.index_path)
    if flags.retriever == "dense":
        return dense
    weight = 0.5 if flags.fusion_weight is None else flags.fusion_weight
    hybrid = HybridRetriever(dense, LexicalRetriever(documents), flags.fusion, weight, flags.fusion_normalization)
    if flags.fusion == "weighted" and flags.fusion_weight is None:
        places = Places(keys_of(documents))
        gold = [{*places(keys_of(example.gold_docs)).tolist()} - {-1} for example in chosen_by]
        candidates = hybrid.candidates([retrieval_query(example) for example in chosen_by])
        hybrid.weight = choose_weight(*candidates, gold, flags.fusion_normalization)
        log.info("--fusion_weight %.2f: the best of %d questions", hybrid.weight, len(chosen_by))
    return hybrid


class LexicalRetriever(PassageRetriever):
    """BM25 as Lucene computes it (Robertson & Zaragoza 2009), over the words of the documents' formatted text.

    Stop words and a stemmer would tie it to one language. Scripts without spaces count by characters and pairs of them:
    titles find 0.58 of 1179 Chinese manual pages at rank 1, by characters alone 0.54 (Japanese: 0.56 and 0.48 of 788).

    What shares no word with the question is not found at all; equal scores are ranked by position in the database.
    """

    def __init__(self, documents: Sequence[Document], k1: float = 1.2, b: float = 0.75) -> None:
        self.documents = documents
        # Give this another name when `words` changes: an index of the former words would be opened.
        method = "bm25 of words and pairs 2", str(k1), str(b)
        self._identity = fingerprint(*method, passages_of(documents).tobytes())
        directory = cache_root() / "bm25" / self._identity
        if distributed.is_main() and damage(directory):
            with atomic_directory(directory) as temporary:
                _build(temporary, documents, k1, b)
            log.info("BM25 index of %d documents: built in %s", len(documents), directory)
        distributed.barrier()
        data, indices, indptr, self._words, self._columns = (np.memmap(directory / n, t, "r") for n, t in FILES.items())
        self._bm25 = bm25s.BM25(k1=k1, b=b)
        self._bm25.scores = {"data": data, "indices": indices, "indptr": indptr, "num_docs": len(documents)}
        self._bm25.nonoccurrence_array = None  # Lucene's BM25 gives nothing for words that a document lacks

    def retrieve(self, questions: Sequence[str], k: int) -> Hits:
        rows, k = [], min(k, len(self.documents))
        for question in questions:
            wanted = prints((word,) for word in words(question, pairs=True))
            places = np.searchsorted(self._words, wanted).clip(max=len(self._words) - 1)
            scores = self._bm25.get_scores_from_ids(self._columns[places[self._words[places] == wanted]])  # [N]
            found = np.flatnonzero(scores > 0)
            rows.append(best(scores[found], found, k))
        return stack(rows, k)

    def identity(self) -> str:
        return self._identity


def _build(directory: Path, documents: Sequence[Document], k1: float, b: float) -> None:
    """Write what bm25s searches, and where each word is. bm25s itself builds from the whole corpus in memory.

    Memory holds a number for each document and a string for each different word; the rest is sorted in a file.
    """
    vocabulary: defaultdict[str, int] = defaultdict(count().__next__)  # words by first occurrence
    lengths, starts = array("q"), array("q", [0])
    with TemporaryFile(dir=directory) as scratch:
        for number, document in enumerate(progress(documents, desc="BM25 index", unit="document")):
            # A document without words holds "", for which nobody asks: an empty file cannot be mapped.
            found = words(document.fmt_content, pairs=True) or [""]
            lengths.append(len(found))
            scratch.write(array("q", [vocabulary[word] << 32 | number for word in found]))
        scratch.flush()
        pairs = np.memmap(scratch, "i8")
        pairs.sort()
        norms = k1 * ((1 - b) + b * np.array(lengths) / np.mean(lengths))  # [N]
        with (directory / "data").open("wb") as data, (directory / "indices").open("wb") as indices:
            end = 0
            while end < len(pairs):  # some words at a time
                start, last = end, pairs[end : end + AT_ONCE][-1] >> 32
                end = np.searchsorted(pairs, (last + 1) << 32)  # all of the last word's
                postings, often = np.unique(pairs[start:end], return_counts=True)
                of, owners = (postings >> 32) - (postings[0] >> 32), postings & 0xFFFFFFFF
                holding = np.bincount(of)  # documents with each word
                idf = np.log(1 + (len(documents) - holding + 0.5) / (holding + 0.5)).astype("f4")
                data.write((idf[of] * (often / (norms[owners] + often))).astype("f4"))
                indices.write(owners.astype("i4"))
                starts.extend(starts[-1] + np.cumsum(holding))
    names = prints((word,) for word in vocabulary)
    order = np.argsort(names)
    for name, values in (("indptr", np.array(starts)), ("words", names[order]), ("columns", order)):
        (directory / name).write_bytes(values.tobytes())


@dataclass(eq=False)
class HybridRetriever(PassageRetriever):
    """Two retrievers over one database, their lists fused by `reciprocal_rank_fusion` (rrf) or `weighted_sum`."""

    dense: PassageRetriever
    lexical: PassageRetriever
    fusion: str = "rrf"
    weight: float = 0.5
    normalization: str = "min_max"

    def __post_init__(self) -> None:
        self.documents = self.dense.documents

    def retrieve(self, questions: Sequence[str], k: int) -> Hits:
        dense, lexical = self.candidates(questions, k)
        k = min(k, len(self.documents))
        if self.fusion == "rrf":
            return reciprocal_rank_fusion([dense, lexical], k)
        return weighted_sum(dense, lexical, self.weight, k, self.normalization)

    def candidates(self, questions: Sequence[str], k: int = 0) -> tuple[Hits, Hits]:
        """What each retriever finds by itself, deep enough to find k together."""
        depth = max(k, DEPTH)
        return self.dense.retrieve(questions, depth), self.lexical.retrieve(questions, depth)

    def identity(self) -> str:
        settings = map(str, (self.fusion, self.weight, self.normalization))
        return fingerprint("hybrid", self.dense.identity(), self.lexical.identity(), *settings)


def reciprocal_rank_fusion(lists: Sequence[Hits], k: int) -> Hits:
    """Documents by the sum over lists of 1 / (60 + rank from 1) (Cormack et al. 2009). [Q, d] each -> [Q, k]"""
    values = [np.broadcast_to(1 / (60 + np.arange(1, hits.ids.shape[1] + 1)), hits.ids.shape) for hits in lists]
    return _sum([hits.ids for hits in lists], values, k)


def weighted_sum(dense: Hits, lexical: Hits, weight: float, k: int, normalization: str = "min_max") -> Hits:
    """Documents by `weight * dense + (1 - weight) * lexical`, of scores normalised for each question.

    They are normalised to 0 to 1 in each list (`min_max`), or to its standard deviations (`z`). A document that a list
    does not hold counts there as the list's last one. [Q, d] each -> [Q, k]
    """
    values = [share * _above_the_last(hits, normalization) for share, hits in ((weight, dense), (1 - weight, lexical))]
    return _sum([dense.ids, lexical.ids], values, k)


def choose_weight(dense: Hits, lexical: Hits, gold: Sequence[Set[int]], normalization: str = "min_max") -> float:
    """The dense share with the greatest mean reciprocal rank of the `gold` positions; of equals the most even."""

    def quality(weight: float) -> float:
        found = weighted_sum(dense, lexical, weight, 10, normalization).ids  # [Q, 10]
        relevant = np.array([[i in wanted for i in row] for row, wanted in zip(found.tolist(), gold, strict=True)])
        return float(np.where(relevant.any(1), 1 / (relevant.argmax(1) + 1), 0.0).mean())

    return float(max(WEIGHTS, key=lambda weight: (round(quality(weight), 9), -abs(weight - 0.5))))


def _above_the_last(hits: Hits, normalization: str) -> np.ndarray:
    """How far each score stands above the last of its list. [Q, d]"""
    scores = np.where(hits.ids >= 0, hits.scores, np.nan).astype(np.float64)
    found = ~np.isnan(scores).all(axis=1, keepdims=True)  # [Q, 1]
    scores = np.where(found, scores, 0.0)
    lowest, highest = np.nanmin(scores, axis=1, keepdims=True), np.nanmax(scores, axis=1, keepdims=True)
    unit = highest - lowest if normalization == "min_max" else np.nanstd(scores, axis=1, keepdims=True)
    # Where all are equally good, each of them is better than what was not found.
    return np.where(highest > lowest, (scores - lowest) / np.where(unit > 0, unit, 1), 1.0)


def _sum(ids: Sequence[np.ndarray], values: Sequence[np.ndarray], k: int) -> Hits:
    """The k documents with the greatest sum of values over the lists."""
    rows = []
    for row_ids, row_values in zip(np.concatenate(ids, axis=1), np.concatenate(values, axis=1), strict=True):
        found = row_ids >= 0
        documents, places = np.unique(row_ids[found], return_inverse=True)
        rows.append(best(np.bincount(places, row_values[found], len(documents)), documents, k))
    return stack(rows, k)
