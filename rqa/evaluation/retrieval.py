"""How well a retriever finds the gold documents."""

from collections.abc import Sequence

from rqa.data.documents import Document
from rqa.data.examples import Example
from rqa.evaluation.metrics import ndcg, recall_at, reciprocal_rank


def score_retrieval(
    found: Sequence[Sequence[Document]], examples: Sequence[Example], cutoffs: Sequence[int]
) -> dict[str, float]:
    """Means over the questions that have gold documents; none of them: no scores.

    Recall@k goes by two names: `retr/recall@4`, and LocalRQA's `retr/document_recall/recall4`.

    Args:
        found: What was retrieved for each question, best first; at least max(cutoffs, 10) documents.
        cutoffs: The k of Recall@k.
    """
    pairs = [
        ([document.key for document in documents], {document.key for document in example.gold_docs})
        for documents, example in zip(found, examples, strict=True)
        if example.gold_docs
    ]
    if not pairs:
        return {}
    scores: dict[str, float] = {}
    for k in cutoffs:
        recall = sum(recall_at(ranking, gold, k) for ranking, gold in pairs) / len(pairs)
        scores[f"retr/recall@{k}"] = scores[f"retr/document_recall/recall{k}"] = recall
    scores["retr/mrr@10"] = sum(reciprocal_rank(*pair) for pair in pairs) / len(pairs)
    scores["retr/ndcg@10"] = sum(ndcg(*pair) for pair in pairs) / len(pairs)
    return scores
