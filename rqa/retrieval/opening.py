"""Whichever retriever is asked for, ready to be asked."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from rqa.data.documents import Document
from rqa.data.examples import Example, read_examples
from rqa.models.encoder import EncoderArguments, load_encoder
from rqa.prompts import retrieval_query
from rqa.retrieval.hits import PassageRetriever
from rqa.retrieval.hybrid import HybridRetriever, choose_weight
from rqa.retrieval.index import IndexArguments
from rqa.retrieval.lexical import LexicalRetriever
from rqa.retrieval.retriever import Retriever
from rqa.runtime import distributed
from rqa.runtime.errors import UserError, check_bounds

log = logging.getLogger(__name__)


@dataclass
class RetrieverArguments:
    """Which retriever finds the passages."""

    retriever: str = field(
        default="dense",
        metadata={"help": "By embeddings, by shared words, or by both.", "choices": ["dense", "bm25", "hybrid"]},
    )
    fusion: str = field(
        default="rrf",
        metadata={"help": "Of hybrid: by ranks, or a weighted sum of scores.", "choices": ["rrf", "weighted"]},
    )
    fusion_weight: float | None = field(
        default=None, metadata={"help": "The dense share of the sum; by default the best one on the eval file."}
    )
    fusion_normalization: str = field(
        default="min_max", metadata={"help": "Of the sum's scores.", "choices": ["min_max", "z"]}
    )
    fusion_eval_path: str | None = field(
        default=None, metadata={"help": "Examples that choose the share, JSONL; trainers take --eval_file."}
    )

    def __post_init__(self) -> None:
        check_bounds(self, "fusion_weight", at_least=0, at_most=1)
        if self.fusion_weight is not None and self.fusion != "weighted":
            raise UserError("--fusion_weight: reciprocal ranks have no weight; add --fusion weighted")
        if self.fusion != "rrf" and self.retriever != "hybrid":
            raise UserError(f"--fusion {self.fusion}: there is nothing to fuse; add --retriever hybrid")


def open_retriever(
    arguments: RetrieverArguments,
    embedding_model: str | None,
    documents: Sequence[Document],
    encoder: EncoderArguments,
    index: IndexArguments,
    index_path: str | None,
    device: torch.device,
    examples: Sequence[Example] = (),
    **options: Any,
) -> PassageRetriever:
    """The retriever that the flags name, with its index loaded or built. Call it under autocast.

    Args:
        embedding_model: The encoder, a directory or a hub name; `bm25` asks for BM25, which needs none.
        examples: Examples that choose the weight of a weighted sum, if `fusion_eval_path` names none.
        options: Those of `load_model`.

    Raises:
        UserError: what a user can mend.
    """
    if "bm25" in (arguments.retriever, embedding_model):
        if arguments.retriever == "hybrid":
            raise UserError("--retriever hybrid: needs an encoder beside BM25; name one instead of bm25")
        return LexicalRetriever(documents)
    if arguments.fusion_eval_path:
        examples = read_examples(arguments.fusion_eval_path)
    if arguments.retriever == "hybrid" and arguments.fusion == "weighted" and arguments.fusion_weight is None:
        _require_gold(examples)
    with distributed.in_turn():
        model = load_encoder(embedding_model, encoder, **options).to(device)
    dense = Retriever(model, documents, index)
    dense.open(index_path)
    if arguments.retriever == "dense":
        return dense
    hybrid = HybridRetriever(
        dense, LexicalRetriever(documents), arguments.fusion, normalization=arguments.fusion_normalization
    )
    if arguments.fusion == "weighted":
        given = arguments.fusion_weight
        hybrid.weight = tuned_weight(hybrid, examples) if given is None else given
    return hybrid


def tuned_weight(retriever: HybridRetriever, examples: Sequence[Example]) -> float:
    """The weight that is best for these examples; those without gold passages say nothing."""
    numbers = {document.key: number for number, document in enumerate(retriever.documents)}
    asked = [example for example in examples if example.gold_docs]
    gold = [{numbers.get(document.key, -2) for document in example.gold_docs} for example in asked]
    candidates = retriever.candidates([retrieval_query(example) for example in asked])
    weight = choose_weight(*candidates, gold, retriever.normalization)
    log.info("--fusion_weight %.2f: the best of %d questions", weight, len(asked))
    return weight


def _require_gold(examples: Sequence[Example]) -> None:
    if not any(example.gold_docs for example in examples):
        raise UserError(
            "--fusion weighted: give --fusion_weight, or questions with gold passages that choose it "
            "(--fusion_eval_path, or a trainer's --eval_file)"
        )
