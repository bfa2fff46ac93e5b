"""Retrieval metrics: how well a retriever finds the gold documents, as rates between 0 and 1."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from rqa.data import Document, Example
from rqa.evaluation.results import Rows, Scores
from rqa.prompts import retrieval_query
from rqa.retrieval.retriever import PassageRetriever
from rqa.runtime.flags import Arguments, flag

T = TypeVar("T")
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
