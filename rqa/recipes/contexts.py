"""The passages that DCA's reader is shown: a fixed list for each question, the same in a resumed run."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from rqa.data.documents import Document
from rqa.data.examples import Example
from rqa.models.encoder import EncoderArguments
from rqa.prompts import retrieval_query
from rqa.recipes.files import DataArguments
from rqa.retrieval.index import IndexArguments
from rqa.retrieval.opening import RetrieverArguments, open_retriever
from rqa.runtime.errors import check_bounds
from rqa.training.arguments import LoopArguments


@dataclass
class ContextArguments:
    """Which passages a question is trained on."""

    n_context: int = field(default=20, metadata={"help": "Passages of each question."})
    context_retriever: str = field(
        default="dense",
        metadata={
            "help": "Who finds passages where an example has no ctxs: the model before training, shared words or both.",
            "choices": ["dense", "bm25", "hybrid"],
        },
    )

    def __post_init__(self) -> None:
        check_bounds(self, "n_context", at_least=2)  # one cannot be told from others


def find_contexts(
    context: ContextArguments,
    examples: Sequence[Example],
    documents: Sequence[Document],
    data: DataArguments,
    loop: LoopArguments,
    encoder: EncoderArguments,
    index: IndexArguments,
    device: torch.device,
) -> list[list[Document]]:
    """The passages of each example: its `ctxs`, else what is retrieved from the database. [N] lists

    Retrieved by the model that training began with, whatever checkpoint it goes on from.
    """
    contexts = [list(example.ctxs[: context.n_context]) for example in examples]
    bare = [number for number, documents_of in enumerate(contexts) if not documents_of]
    if bare:
        retriever = open_retriever(
            RetrieverArguments(retriever=context.context_retriever),
            data.model_name_or_path,
            documents,
            encoder,
            index,
            data.full_dataset_index_path,
            device,
            **loop.loading,
        )
        hits = retriever.retrieve_once([retrieval_query(examples[number]) for number in bare], context.n_context)
        for number, found in zip(bare, retriever.documents_of(hits), strict=True):
            contexts[number] = found
    return contexts
