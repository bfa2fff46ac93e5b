"""SwR: which passages a training prompt shows (LocalRQA's mix of gold and retrieved; Zhang et al. 2024, RAFT)."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from rqa.data import Document, Example


@dataclass
class PassageArguments:
    """How gold and retrieved passages are mixed in training."""

    gold_position: str = field(
        default="first",
        metadata={"help": "Where the gold passages stand among the others.", "choices": ["first", "random"]},
    )
    drop_gold_prob: float = field(
        default=0.0, metadata={"help": "Share of training questions that see no gold passage (RAFT)."}
    )


def gold_and_retrieved(
    example: Example, retrieved: Sequence[Document], limit: int, arguments: PassageArguments, seed: str
) -> list[Document]:
    """Gold passages, then retrieved ones, none twice.

    Args:
        retrieved: Best first, from the whole database.
        limit: Passages at most.
        seed: Decides what is random, for this example alone.
    """
    chance = random.Random(seed)
    gold = {document.key: document for document in example.gold_docs}
    others = {document.key: document for document in retrieved if document.key not in gold}
    if chance.random() < arguments.drop_gold_prob:
        return list(others.values())[:limit]
    passages = [*gold.values(), *others.values()][:limit]
    if arguments.gold_position == "random":
        chance.shuffle(passages)
    return passages
