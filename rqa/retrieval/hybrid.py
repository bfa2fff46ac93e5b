"""BM25, hybrid retrieval, and opening the retriever that the flags ask for."""

import logging
from array import array
from collections import defaultdict
from collections.abc import Sequence, Set
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from tempfile import TemporaryFile

import numpy as np

from rqa.data import Document, Example, read_examples
from rqa.documents import PRINT, gold_places, passages_of, prints, with_known_gold
from rqa.models.encoder import EncoderArguments, load_encoder
from rqa.prompts import retrieval_query
from rqa.retrieval.fusion import USUAL, choose_weight, reciprocal_rank_fusion, weighted_sum
from rqa.retrieval.index import IndexArguments
from rqa.retrieval.ranking import Hits, best
from rqa.retrieval.reranking import RerankingArguments, first_stage, reranking
from rqa.retrieval.retriever import PassageRetriever, Retriever
from rqa.runtime import distributed
from rqa.runtime.cli import progress
from rqa.runtime.errors import UserError
from rqa.runtime.files import atomic_directory, cache_root, damage, fingerprint
from rqa.runtime.flags import flag
from rqa.runtime.text import words

log = logging.getLogger(__name__)

DEPTH = 100  # candidates of each retriever
# Words of questions that BM25 would overrate, since they are rare in passages.
ASKING = frozenset(words(
    "a an and any are as at be by can could do does did for from had has have how i if in is it its me my not of on or "
    "our should so some that the their them there these they this those to us was we were what when where which who "
    "whose why will with would you your"
))  # fmt: skip
AT_ONCE = 2**21  # words of documents that are scored at once
FILES = {"data": "f4", "indices": "i4", "indptr": "i8", "words": PRINT, "columns": "i8"}  # a CSC matrix, named by scipy


@dataclass(kw_only=True)
class RetrieverArguments(EncoderArguments, RerankingArguments, IndexArguments):
    """The retriever."""

    retriever: str = flag("dense", "Retriever: embeddings, shared words, or both.", ["dense", "bm25", "hybrid"])
    fusion: str = flag("weighted", "Fusion of hybrid: weighted sum, or by ranks.", ["weighted", "rrf"], rare=True)
    fusion_weight: float | None = flag(
        None, "Dense share of the sum. Default: chosen on fusion_eval_path or a trainer's questions, else 0.75.",
        rare=True,
    )  # fmt: skip
    fusion_normalization: str = flag("min_max", "Normalisation of scores in the sum.", ["min_max", "z"], rare=True)
    fusion_eval_path: str | None = flag(None, "Examples (JSONL) to choose the dense share on.", rare=True)

    def check(self) -> None:
        self.check_bounds("fusion_weight", at_least=0, at_most=1)
        if self.fusion_weight is not None and self.fusion != "weighted":
            raise UserError("--fusion_weight: has no effect with --fusion rrf; remove one")
        for name in ("fusion", "fusion_weight", "fusion_eval_path"):
            if getattr(self, name) != getattr(RetrieverArguments, name) and self.retriever != "hybrid":
                raise UserError(f"--{name} {getattr(self, name)}: has no effect without fusion; add --retriever hybrid")


def open_retriever(
    flags: RetrieverArguments, embedding_model: str | None, documents: Sequence[Document],
    examples: Sequence[Example] = (),
) -> PassageRetriever:  # fmt: skip
    """The retriever of the flags, with its index loaded or built, and its reranker, if any.

    `embedding_model` may be `bm25`. `examples` choose the weight of a sum unless there is a `fusion_eval_path`.
    """
    if embedding_model == "bm25" and flags.retriever == "hybrid":
        raise UserError("--retriever hybrid: needs an encoder besides BM25; give one instead of bm25")
    if flags.filter and (flags.retriever != "dense" or embedding_model == "bm25"):
        raise UserError("--filter: does not apply to BM25; use --retriever dense and an encoder")
    stage = first_stage(flags.retriever, embedding_model)
    reranked = reranking(flags, stage)  # first: an unusable reranker is refused before an index is built
    if stage == "bm25":
        flags.ignore("truncate_dim", "BM25 has no embeddings")
        return reranked(LexicalRetriever(documents))
    if embedding_model is None:
        raise UserError(f"--retriever {flags.retriever}: needs an encoder; give --embedding_model")
    if flags.fusion_eval_path:
        examples = with_known_gold(read_examples(flags.fusion_eval_path), documents)
    chosen_by = [example for example in examples if example.gold_docs]
    if flags.fusion_eval_path and not chosen_by:
        raise UserError(f"--fusion_eval_path {flags.fusion_eval_path}: its questions have no gold passages")
    dense = Retriever(load_encoder(embedding_model, flags), documents, flags).open(flags.index_path)
    if flags.retriever == "dense":
        return reranked(dense)
    weight = USUAL if flags.fusion_weight is None else flags.fusion_weight
    hybrid = HybridRetriever(dense, LexicalRetriever(documents), flags.fusion, weight, flags.fusion_normalization)
    if flags.fusion == "weighted" and flags.fusion_weight is None and not chosen_by:
        log.info("--fusion_weight %.2f: is the default; --fusion_eval_path chooses it on questions", weight)
    elif flags.fusion == "weighted" and flags.fusion_weight is None:
        candidates = hybrid.candidates([retrieval_query(example) for example in chosen_by])
        hybrid.weight = choose_weight(*candidates, gold_places(chosen_by, documents), flags.fusion_normalization)
        log.info("--fusion_weight %.2f: chosen by %d questions", hybrid.weight, len(chosen_by))
    return reranked(hybrid)


class LexicalRetriever(PassageRetriever):
    """BM25 as Lucene computes it (Robertson & Zaragoza 2009), over the words of the documents' formatted text.

    English question words and stop words are left out of questions. Terms of scripts without spaces are characters and
    pairs of them: titles then find 0.58 of 1179 Chinese manual pages at rank 1, by characters alone 0.54 (Japanese:
    0.56 and 0.48 of 788).

    Documents that share no word with the question are not found; ties are ordered by position in the database.
    """

    def __init__(self, documents: Sequence[Document], k1: float = 1.2, b: float = 0.75) -> None:
        self.documents = documents
        # Change this name whenever `words` or `terms` changes, or an outdated index would be opened.
        method = "bm25 of words and pairs 3", str(k1), str(b)
        self._identity = fingerprint(*method, passages_of(documents).tobytes())
        directory = cache_root() / "bm25" / self._identity
        if distributed.is_main() and damage(directory):
            with atomic_directory(directory) as temporary:
                _build(temporary, documents, k1, b)
            log.info("BM25 index of %d documents: built in %s", len(documents), directory)
        distributed.barrier()
        files = (np.asarray(np.memmap(directory / name, kind, "r")) for name, kind in FILES.items())
        self._scores, self._owners, self._starts, self._words, self._columns = files

    def retrieve(self, questions: Sequence[str], k: int) -> Hits:
        return best(map(self._found, questions), min(k, len(self.documents)))

    def _found(self, question: str) -> tuple[np.ndarray, np.ndarray]:
        """Scores and positions of the documents that share a word with the question. -> [n], [n]"""
        queried = prints((term,) for term in terms(question, ASKING))
        places = np.searchsorted(self._words, queried).clip(max=len(self._words) - 1)
        scores = np.zeros(len(self.documents), np.float32)  # [N]
        for column in self._columns[places[self._words[places] == queried]]:
            part = slice(*self._starts[column : column + 2])
            scores[self._owners[part]] += self._scores[part]
        found = np.flatnonzero(scores > 0)
        return scores[found], found

    def identity(self) -> str:
        return self._identity


def terms(text: str, stop_words: Set[str] = frozenset()) -> list[str]:
    """The words that are counted, without a plural's s; and without stop words, unless all are stop words."""
    found = words(text, pairs=True)
    kept = [word for word in found if word not in stop_words] or found
    return [word[:-1] if len(word) > 3 and word[-1] == "s" != word[-2] else word for word in kept]


def _build(directory: Path, documents: Sequence[Document], k1: float, b: float) -> None:
    """Write each word's contribution to the documents' scores, and an index of words.

    Memory holds a number for each document and a string for each distinct word; the rest is sorted in a file.
    """
    vocabulary: defaultdict[str, int] = defaultdict(count().__next__)  # words by first occurrence
    lengths, starts = array("q"), array("q", [0])
    with TemporaryFile(dir=directory) as scratch:
        for number, document in enumerate(progress(documents, desc="BM25 index", unit="document")):
            # A document without words gets "", which no question contains: an empty file cannot be mapped.
            found = terms(document.fmt_content) or [""]
            lengths.append(len(found))
            scratch.write(array("q", [vocabulary[word] << 32 | number for word in found]))
        scratch.flush()
        pairs = np.memmap(scratch, "i8")
        pairs.sort()
        norms = k1 * ((1 - b) + b * np.array(lengths) / np.mean(lengths))  # [N]
        with (directory / "data").open("wb") as data, (directory / "indices").open("wb") as indices:
            end = 0
            while end < len(pairs):  # a group of words at a time
                start, last = end, pairs[end : end + AT_ONCE][-1] >> 32
                end = np.searchsorted(pairs, (last + 1) << 32)  # include all of the last word
                postings, counts = np.unique(pairs[start:end], return_counts=True)
                word_of, owners = (postings >> 32) - (postings[0] >> 32), postings & 0xFFFFFFFF
                frequency = np.bincount(word_of)  # documents with each word
                idf = np.log(1 + (len(documents) - frequency + 0.5) / (frequency + 0.5)).astype("f4")
                data.write((idf[word_of] * (counts / (norms[owners] + counts))).astype("f4"))
                indices.write(owners.astype("i4"))
                starts.extend(starts[-1] + np.cumsum(frequency))
    names = prints((word,) for word in vocabulary)
    order = np.argsort(names)
    for name, values in (("indptr", np.array(starts)), ("words", names[order]), ("columns", order)):
        (directory / name).write_bytes(values.tobytes())


@dataclass(eq=False)
class HybridRetriever(PassageRetriever):
    """Fuses two retrievers over one database by `weighted_sum` or `reciprocal_rank_fusion` (rrf)."""

    dense: PassageRetriever
    lexical: PassageRetriever
    fusion: str = "weighted"
    weight: float = USUAL
    normalization: str = "min_max"

    def __post_init__(self) -> None:
        self.documents, self.encoder = self.dense.documents, self.dense.encoder

    def retrieve(self, questions: Sequence[str], k: int) -> Hits:
        dense, lexical = self.candidates(questions, k)
        k = min(k, len(self.documents))
        if self.fusion == "rrf":
            return reciprocal_rank_fusion([dense, lexical], k)
        return weighted_sum(dense, lexical, self.weight, k, self.normalization)

    def candidates(self, questions: Sequence[str], k: int = 0) -> tuple[Hits, Hits]:
        """The hits of each retriever, before fusion; at least k for each question."""
        depth = max(k, DEPTH)
        return self.dense.retrieve(questions, depth), self.lexical.retrieve(questions, depth)

    def identity(self) -> str:
        settings = map(str, (self.fusion, self.weight, self.normalization))
        return fingerprint("hybrid", self.dense.identity(), self.lexical.identity(), *settings)
