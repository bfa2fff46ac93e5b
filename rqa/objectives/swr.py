"""SwR: SFT with passages from a frozen retriever, mixed with gold ones (as in LocalRQA; Zhang et al. 2024, RAFT)."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from rqa.data import Document, Example
from rqa.prompts import retrieval_query
from rqa.retrieval.retriever import PassageRetriever
from rqa.runtime.flags import Arguments, flag


@dataclass(kw_only=True)
class SwRArguments(Arguments):
    """How gold and retrieved passages are mixed in training."""

    embedding_model: str = flag(help="Frozen retriever: a directory or a hub name; bm25 needs no model.")
    gold_position: str = flag(
        "ranked", "Place of gold passages in the prompt; ranked: where the retriever finds them, else anywhere.",
        ["ranked", "random", "first"],
    )  # fmt: skip
    drop_gold_prob: float = flag(0.0, "Share of training questions whose prompt omits the gold passages (RAFT).")

    def check(self) -> None:
        self.check_bounds("drop_gold_prob", at_least=0, at_most=1)


def gold_and_retrieved(
    examples: Sequence[Example], retriever: PassageRetriever, k: int, flags: SwRArguments, seed: int
) -> list[list[Document]]:
    """The gold and retrieved passages of each training prompt, at most `k` + 1."""
    # No index searches for 0 passages.
    hits = retriever.retrieve_once([retrieval_query(example) for example in examples], max(k, 1))
    pairs = zip(examples, retriever.documents_of(hits), strict=True)
    return [mix(example, found[:k], k + 1, flags, f"{seed}-{number}") for number, (example, found) in enumerate(pairs)]


def mix(example: Example, retrieved: Sequence[Document], limit: int, flags: SwRArguments, seed: str) -> list[Document]:
    """Gold passages, then retrieved ones, without duplicates; `seed` belongs to this example alone."""
    chance = random.Random(seed)
    gold = {document.key: document for document in example.gold_docs}
    others = {document.key: document for document in retrieved if document.key not in gold}
    if chance.random() < flags.drop_gold_prob:
        return list(others.values())[:limit]
    passages = [*gold.values(), *others.values()][:limit]
    if flags.gold_position == "random":
        chance.shuffle(passages)
    elif flags.gold_position == "ranked":  # as in the prompts of evaluation
        ranks = {key: rank for rank, key in enumerate(dict.fromkeys(document.key for document in retrieved))}
        passages.sort(key=lambda document: ranks.get(document.key, chance.uniform(-1, len(retrieved))))
    return passages
