"""BM25, BM25 beside embeddings, and whichever retriever the flags ask for."""

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
from rqa.retrieval.ranking import best
from rqa.retrieval.reranking import RerankingArguments, reranking
from rqa.retrieval.retriever import Hits, PassageRetriever, Retriever, stack
from rqa.runtime import distributed
from rqa.runtime.cli import progress
from rqa.runtime.errors import UserError
from rqa.runtime.files import atomic_directory, cache_root, damage, fingerprint
from rqa.runtime.flags import flag
from rqa.runtime.text import words

log = logging.getLogger(__name__)

DEPTH = 100  # candidates that each retriever brings
# What questions are asked with: rare in passages, these words would count for much.
ASKING = frozenset(words(
    "a an and any are as at be by can could do does did for from had has have how i if in is it its me my not of on or "
    "our should so some that the their them there these they this those to us was we were what when where which who "
    "whose why will with would you your"
))  # fmt: skip
AT_ONCE = 2**21  # words of documents whose scores are computed together
FILES = {"data": "f4", "indices": "i4", "indptr": "i8", "words": PRINT, "columns": "i8"}  # how scipy names a CSC matrix


@dataclass(kw_only=True)
class RetrieverArguments(EncoderArguments, RerankingArguments, IndexArguments):
    """Which retriever finds the passages."""

    retriever: str = flag("dense", "Search by embeddings, by shared words, or by both.", ["dense", "bm25", "hybrid"])
    fusion: str = flag("weighted", "How hybrid fuses: a weighted sum, or by ranks.", ["weighted", "rrf"], rare=True)
    fusion_weight: float | None = flag(
        None, "Dense share of the sum. Default: chosen on --fusion_eval_path, or a trainer's questions, else 0.75.",
        rare=True,
    )  # fmt: skip
    fusion_normalization: str = flag("min_max", "How the sum normalises scores.", ["min_max", "z"], rare=True)
    fusion_eval_path: str | None = flag(None, "Examples (JSONL) that choose the dense share.", rare=True)

    def check(self) -> None:
        self.check_bounds("fusion_weight", at_least=0, at_most=1)
        if self.fusion_weight is not None and self.fusion != "weighted":
            raise UserError("--fusion_weight: reciprocal ranks have no weight; leave out --fusion rrf")
        for name in ("fusion", "fusion_weight", "fusion_eval_path"):
            if getattr(self, name) != getattr(RetrieverArguments, name) and self.retriever != "hybrid":
                raise UserError(f"--{name} {getattr(self, name)}: there is nothing to fuse; add --retriever hybrid")


def open_retriever(
    flags: RetrieverArguments, embedding_model: str | None, documents: Sequence[Document],
    examples: Sequence[Example] = (),
) -> PassageRetriever:  # fmt: skip
    """The retriever that the flags name, with its index loaded or built, and behind it the reranker, if any.

    The name of the encoder may be `bm25`, too. Examples choose the weight of a sum if `fusion_eval_path` names none.
    """
    if embedding_model == "bm25" and flags.retriever == "hybrid":
        raise UserError("--retriever hybrid: needs an encoder beside BM25; name one instead of bm25")
    if flags.filter and (flags.retriever != "dense" or embedding_model == "bm25"):
        raise UserError("--filter: BM25 finds passages that do not meet it; use --retriever dense and an encoder")
    behind = reranking(flags)  # a reranker that cannot be used is refused before an index is built
    if "bm25" in (flags.retriever, embedding_model):
        flags.ignore("truncate_dim", "BM25 has no embeddings")
        return behind(LexicalRetriever(documents))
    if embedding_model is None:
        raise UserError(f"--retriever {flags.retriever}: name its encoder, too (--embedding_model)")
    if flags.fusion_eval_path:
        examples = with_known_gold(read_examples(flags.fusion_eval_path), documents)
    chosen_by = [example for example in examples if example.gold_docs]
    if flags.fusion_eval_path and not chosen_by:
        raise UserError(f"--fusion_eval_path {flags.fusion_eval_path}: its questions have no gold passages")
    dense = Retriever(load_encoder(embedding_model, flags), documents, flags).open(flags.index_path)
    if flags.retriever == "dense":
        return behind(dense)
    weight = USUAL if flags.fusion_weight is None else flags.fusion_weight
    hybrid = HybridRetriever(dense, LexicalRetriever(documents), flags.fusion, weight, flags.fusion_normalization)
    if flags.fusion == "weighted" and flags.fusion_weight is None and chosen_by:
        candidates = hybrid.candidates([retrieval_query(example) for example in chosen_by])
        hybrid.weight = choose_weight(*candidates, gold_places(chosen_by, documents), flags.fusion_normalization)
        log.info("--fusion_weight %.2f: chosen by %d questions", hybrid.weight, len(chosen_by))
    return behind(hybrid)


class LexicalRetriever(PassageRetriever):
    """BM25 as Lucene computes it (Robertson & Zaragoza 2009), over the words of the documents' formatted text.

    The words that English asks with are left out of questions. Scripts without spaces count by
    characters and pairs of them: titles find 0.58 of 1179 Chinese manual pages at rank 1, by characters alone 0.54
    (Japanese: 0.56 and 0.48 of 788).

    What shares no word with the question is not found at all; equal scores are ranked by position in the database.
    """

    def __init__(self, documents: Sequence[Document], k1: float = 1.2, b: float = 0.75) -> None:
        self.documents = documents
        # Give this another name when `words` changes: an index of the former words would be opened.
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
        rows, k = [], min(k, len(self.documents))
        for question in questions:
            wanted = prints((term,) for term in terms(question, ASKING))
            places = np.searchsorted(self._words, wanted).clip(max=len(self._words) - 1)
            scores = np.zeros(len(self.documents), np.float32)  # [N]
            for column in self._columns[places[self._words[places] == wanted]]:
                part = slice(*self._starts[column : column + 2])
                scores[self._owners[part]] += self._scores[part]
            found = np.flatnonzero(scores > 0)
            rows.append(best(scores[found], found, k))
        return stack(rows, k)

    def identity(self) -> str:
        return self._identity


def terms(text: str, but: Set[str] = frozenset()) -> list[str]:
    """The words that are counted, without the s of a plural; and without some, if others are left."""
    found = words(text, pairs=True)
    kept = [word for word in found if word not in but] or found
    return [word[:-1] if len(word) > 3 and word[-1] == "s" != word[-2] else word for word in kept]


def _build(directory: Path, documents: Sequence[Document], k1: float, b: float) -> None:
    """Write each word's share of the documents' scores, and where each word is.

    Memory holds a number for each document and a string for each different word; the rest is sorted in a file.
    """
    vocabulary: defaultdict[str, int] = defaultdict(count().__next__)  # words by first occurrence
    lengths, starts = array("q"), array("q", [0])
    with TemporaryFile(dir=directory) as scratch:
        for number, document in enumerate(progress(documents, desc="BM25 index", unit="document")):
            # A document without words holds "", for which nobody asks: an empty file cannot be mapped.
            found = terms(document.fmt_content) or [""]
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
    """Two retrievers over one database, their lists fused by `weighted_sum` or `reciprocal_rank_fusion` (rrf)."""

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
        """What each retriever finds by itself, deep enough to find k together."""
        depth = max(k, DEPTH)
        return self.dense.retrieve(questions, depth), self.lexical.retrieve(questions, depth)

    def identity(self) -> str:
        settings = map(str, (self.fusion, self.weight, self.normalization))
        return fingerprint("hybrid", self.dense.identity(), self.lexical.identity(), *settings)
