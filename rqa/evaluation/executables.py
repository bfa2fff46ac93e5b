"""Parts of the evaluation executables: their flags, a retriever's speed, and files for trec_eval."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from rqa.data import Document, DocumentArguments, Example
from rqa.evaluation.results import Scores
from rqa.evaluation.runtime import latencies, seconds
from rqa.prompts import retrieval_query
from rqa.retrieval.reranking import RerankingRetriever
from rqa.retrieval.retriever import Hits, PassageRetriever
from rqa.runtime import distributed
from rqa.runtime.files import atomic_file, fingerprint
from rqa.runtime.flags import RESULTS, flag

WARM_UP, TIMED_QUESTIONS = 3, 100  # questions asked one at a time


@dataclass(kw_only=True)
class EvaluationDataArguments(DocumentArguments):
    """What to evaluate, and on which data."""

    embedding_model: str = flag(
        help="Encoder of the retriever: a directory or a hub name; bm25 names BM25, which needs no encoder.",
    )
    eval_data_path: str = flag(
        help="Examples (JSONL) with gold passages; readers also need answers.", also="eval_file test_file"
    )
    output_dir: str = flag(help="Directory for scores, predictions and report.")
    max_examples: int = flag(0, "Number of questions to evaluate on, a fixed subset; 0: all.")

    def check(self) -> None:
        self.check_bounds("max_examples", at_least=0)
        self.refuse_input_as("output_dir", RESULTS)


def timed_retrieval(retriever: PassageRetriever, examples: Sequence[Example], k: int) -> tuple[Hits, Scores]:
    """Retrieve for all questions at once, and time it; time single questions, too. -> hits [Q, k], speed by metric name

    Latencies of single questions are in milliseconds; with a reranker they are sums over two stages, which are also
    reported apart. Every process calls this, retrieves for its share of the questions, and gets all hits.
    """
    queries = list(map(retrieval_query, examples))
    singles = [distributed.share([query]) for query in queries[:TIMED_QUESTIONS]]
    for query in singles[:WARM_UP]:
        retriever.retrieve(query, k)
    if isinstance(retriever, RerankingRetriever):
        hits, depth = list[Hits](), max(k, retriever.depth)
        first = [seconds(lambda q=query: hits.append(retriever.first.retrieve(q, depth))) for query in singles]
        second = [seconds(partial(retriever.rerank, *pair, k)) for pair in zip(singles, hits, strict=True)]
        durations = {"": np.add(first, second), "first_stage_": first, "reranking_": second}
    else:
        durations = {"": [seconds(partial(retriever.retrieve, query, k)) for query in singles]}
    found: list[Hits] = []
    duration = seconds(lambda: found.append(retriever.retrieve(distributed.share(queries), k)))
    speed = {stage + name: value for stage, each in durations.items() for name, value in latencies(each).items()}
    speed["questions_per_second"] = len(queries) / duration
    return found[0].gathered(), {f"retr/{name}": value for name, value in speed.items()}


def document_name(document: Document) -> str:
    """A name without spaces, the same for equal documents."""
    return fingerprint(*document.key)[:16]


def write_run(path: str | Path, hits: Hits, documents: Sequence[Document], tag: str = "rqa") -> None:
    """Write `question Q0 document rank score tag` lines; questions are numbered from 1, in the order of the hits.

    trec_eval sorts by score in single precision, then by name. To keep our ranking, a score that is not below the one
    before it is written as the next smaller number.
    """
    with atomic_file(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for question, (ids, scores) in enumerate(zip(hits.ids, hits.scores.astype(np.float32), strict=True), start=1):
            before = np.float32(np.inf)
            for rank, (i, score) in enumerate(zip(ids[ids >= 0], scores[ids >= 0], strict=True), start=1):
                before = min(score, np.nextafter(before, np.float32(-np.inf)))
                file.write(f"{question} Q0 {document_name(documents[i])} {rank} {float(before)!r} {tag}\n")


def write_qrels(path: str | Path, examples: Sequence[Example]) -> None:
    """Write `question 0 document gain` lines for the gold documents; questions are numbered from 1."""
    with atomic_file(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for question, example in enumerate(examples, start=1):
            for name, gain in {document_name(document): document.gain for document in example.gold_docs}.items():
                file.write(f"{question} 0 {name} {gain:g}\n")
