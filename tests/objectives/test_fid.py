"""FiD as an objective: what fits becomes a batch. models/test_encoder_decoder.py has its loss and its checkpoints."""

import re

import pytest

from rqa.data import Document, Example
from rqa.objectives.fid import FiDArguments, FiDLikelihood
from rqa.objectives.sft import encode_examples


def test_examples_that_fit_become_a_batch_that_knows_their_numbers(
    t5_path: str, examples: list[Example], documents: list[Document], caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    flags = FiDArguments(embedding_model="bm25", max_encoder_seq_length=64, max_decoder_seq_length=16)
    objective = FiDLikelihood.load(t5_path, flags)
    endless = Example("Why?", gold_answer="Because " * 20, where="train.jsonl:2")
    sequences = encode_examples(objective.prompter, [examples[0], endless, examples[1]], [documents[:2]] * 3)
    batch = objective.batch(list(sequences.values()), list(sequences))
    assert batch.indices == (0, 2)
    assert batch.weight == sum(len(sequence.answer) for sequence in sequences.values())
    assert objective(batch)[0].requires_grad
    assert re.search(r"train.jsonl:2: the answer takes \d+ tokens, more than --max_decoder_seq_length 16", caplog.text)
