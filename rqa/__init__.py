"""rqa trains retrieval-augmented question answering systems on your own documents.

In Python, each name is imported when it is first used:

    encoder = rqa.load_encoder("sentence-transformers/all-MiniLM-L6-v2")
    retriever = rqa.Retriever(encoder, rqa.read_documents("documents.jsonl")).open("index/")
    text, passages = rqa.answer("What does it trade in?", retriever, rqa.load_reader("out/swr"))
"""

import logging
from importlib import import_module
from typing import Any

for name in ("torchao", "torch.utils._pytree"):  # transformers imports torchao if installed, and both log warnings
    logging.getLogger(name).setLevel(logging.ERROR)

SURFACE = {
    "Document": "rqa.data",
    "read_documents": "rqa.documents",
    "read_examples": "rqa.data",
    "load_encoder": "rqa.models.encoder",
    "Retriever": "rqa.retrieval.retriever",
    "load_reader": "rqa.recipe.system",
    "answer": "rqa.recipe.system",
    "Batches": "rqa.training.loop",
    "LoopArguments": "rqa.training.arguments",
    "train": "rqa.training.loop",
}


def __getattr__(name: str) -> Any:
    """Import on demand: `import rqa` alone loads no torch."""
    if name in SURFACE:
        return getattr(import_module(SURFACE[name]), name)
    raise AttributeError(f"module 'rqa' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(SURFACE)
