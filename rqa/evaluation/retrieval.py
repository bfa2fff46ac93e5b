"""Evaluation of retrievers: metrics as rates between 0 and 1, speed, and files for trec_eval."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np

from rqa.data import Document, DocumentArguments, Example
from rqa.evaluation.results import Rows, Scores
from rqa.evaluation.runtime import latencies, seconds
from rqa.prompts import retrieval_query
from rqa.retrieval.reranking import RerankingRetriever
from rqa.retrieval.retriever import Hits, PassageRetriever
from rqa.runtime import distributed
from rqa.runtime.files import atomic_file, fingerprint
from rqa.runtime.flags import RESULTS, Arguments, flag

T = TypeVar("T")
WARM_UP, TIMED_QUESTIONS = 3, 100  # questions asked one at a time
LOCALRQA_NAMES = {"gen/f1": "gen/f1/avg_f1_ans"}
LOCALRQA_NAMES |= {f"gen/{kind}": f"gen/rouge/avg_{kind}_ans" for kind in ("rouge1", "rouge2", "rougeL")}


@dataclass(kw_only=True)
class EvaluationArguments(Arguments):
    """How a system is evaluated."""

    embedding_max_num_to_retrieve: int = flag(3, "Number of passages to retrieve and read for a question.")
    recall_at: list[int] = flag([1, 4, 10], "Values of k in Recall@k.", rare=True)

    def check(self) -> None:
        self.check_bounds("embedding_max_num_to_retrieve", at_least=0)
        self.check_bounds("recall_at", at_least=1)

    @property
    def depth(self) -> int:
        """Length of a ranking, enough for every metric (MRR@10 and others need 10) and for the reader."""
        return max(10, self.embedding_max_num_to_retrieve, *self.recall_at)


@dataclass(kw_only=True)
class EvaluationDataArguments(DocumentArguments, EvaluationArguments):
    """What to evaluate, and on which data."""

    embedding_model: str = flag(
        help="Encoder of the retriever: a directory or a hub name; bm25 names BM25, which needs no encoder.",
        also="embedding_model_name_or_path eval_embedding_model",
    )
    eval_data_path: str = flag(
        help="Examples (JSONL) with gold passages; readers also need answers.", also="eval_file test_file"
    )
    output_dir: str = flag(help="Directory for scores, predictions and report.")
    max_examples: int = flag(0, "Number of questions to evaluate on, a fixed subset; 0: all.")

    def check(self) -> None:
        self.check_bounds("max_examples", at_least=0)
        self.refuse_input_as("output_dir", RESULTS)


def find_passages(
    retriever: PassageRetriever, examples: Sequence[Example], flags: EvaluationArguments
) -> list[list[Document]]:
    """The best `flags.depth` passages for each question, best first. [Q] lists"""
    return retriever.documents_of(retriever.retrieve_shared(list(map(retrieval_query, examples)), flags.depth))


def evaluate_retrieval(
    retriever: PassageRetriever, examples: Sequence[Example], flags: EvaluationArguments
) -> tuple[Scores, Rows]:
    """Retrieve for every question. -> mean scores by name, and a row for each question"""
    rows = retrieval_rows(find_passages(retriever, examples, flags), examples, flags.recall_at)
    return mean_scores(rows), rows


def score_ranking(ranking: Sequence[T], gold: Mapping[T, float], cutoffs: Sequence[int], depth: int = 10) -> Scores:
    """Scores of one ranking, to be averaged over questions. Recall is 1 if ALL gold documents are in the first k.

    NDCG weights gold documents by their gains (Järvelin & Kekäläinen 2002). MAP divides by the number of all gold
    documents, including those not found (trec_eval's `map_cut`).
    """
    ranks = sorted(ranking.index(document) + 1 for document in gold if document in ranking[:depth])
    gain = sum(gold[ranking[rank - 1]] / math.log2(rank + 1) for rank in ranks)
    ideal = enumerate(sorted(gold.values(), reverse=True)[:depth], start=1)
    return {
        **{f"recall@{k}": float(gold.keys() <= set(ranking[:k])) for k in cutoffs},
        f"mrr@{depth}": 1 / ranks[0] if ranks else 0.0,
        f"ndcg@{depth}": gain / sum(gain / math.log2(rank + 1) for rank, gain in ideal),
        f"map@{depth}": sum(found / rank for found, rank in enumerate(ranks, start=1)) / len(gold),
    }


def retrieval_rows(found: Sequence[Sequence[Document]], examples: Sequence[Example], cutoffs: Sequence[int]) -> Rows:
    """One row per question: the example, the documents found, and `scores` such as `retr/recall@4` (none without gold).

    `found` holds at least max(cutoffs, 10) documents per question, best first.
    """
    rows = []
    for documents, example in zip(found, examples, strict=True):
        ranking = [document.key for document in documents]
        gold = {document.key: document.gain for document in example.gold_docs}
        scores = score_ranking(ranking, gold, cutoffs) if gold else {}
        row = {"retrieved_docs": [document.to_json() for document in documents]}
        rows.append(example.to_json() | row | {"scores": {f"retr/{name}": value for name, value in scores.items()}})
    return rows


def mean_scores(rows: Rows) -> Scores:
    """Mean of each score over the questions that have it, under our name and under LocalRQA's.

    Recall@4 is `retr/recall@4` and `retr/document_recall/recall4`. ROUGE compares word stems; LocalRQA's, whole words.
    """
    names = dict.fromkeys(name for row in rows for name in row["scores"])
    columns = {name: [row["scores"][name] for row in rows if name in row["scores"]] for name in names}
    means = {name: sum(values) / len(values) for name, values in columns.items()}
    theirs = {name: name.replace("retr/recall@", "retr/document_recall/recall") for name in means} | LOCALRQA_NAMES
    return means | {theirs[name]: mean for name, mean in means.items()}


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
