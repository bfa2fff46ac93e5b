"""FiD as an objective: saved, loaded again, and batches of what fits; models/test_encoder_decoder.py has its loss."""

from pathlib import Path

import torch
import pytest
from transformers import AutoModelForSeq2SeqLM

from rqa.data import Document, Example
from rqa.objectives.fid import FiDArguments, FiDLikelihood
from rqa.objectives.sft import encode_examples

FLAGS = FiDArguments(embedding_model="bm25", max_encoder_seq_length=64, max_decoder_seq_length=16)


@pytest.mark.parametrize("kind", ["t5", "bart", "bert"])
def test_what_is_saved_is_loaded_by_transformers_and_again_with_the_same_loss(
    kind: str, t5_path: str, bart_path: str, encoder_path: str, examples: list[Example], documents: list[Document],
    tmp_path: Path,
) -> None:  # fmt: skip
    path = {"t5": t5_path, "bart": bart_path, "bert": f"bert::{encoder_path}"}[kind]
    objective = FiDLikelihood.load(path, FLAGS).eval()
    endless = Example("Why?", gold_answer="Because " * 20, where="train.jsonl:2")
    passages = [documents[:1], documents[:1], documents[2:5]]
    sequences = encode_examples(objective.prompter, [examples[0], endless, examples[1]], passages)
    assert list(sequences) == [0, 2]
    batch = objective.batch(list(sequences.values()), list(sequences))
    assert batch.indices == (0, 2)
    assert batch.weight == sum(len(sequence.answer) for sequence in sequences.values())
    objective.save_pretrained(tmp_path)
    again = FiDLikelihood.load(str(tmp_path), FLAGS).eval()
    torch.testing.assert_close(again(batch)[0], objective(batch)[0], rtol=1e-6, atol=0)
    plain = AutoModelForSeq2SeqLM.from_pretrained(tmp_path).eval()
    theirs = plain(input_ids=torch.tensor(sequences[0].passages), labels=torch.tensor([sequences[0].answer])).loss
    ours = again(again.batch([sequences[0]]))[0]
    assert ours.item() == pytest.approx(theirs.item() * len(sequences[0].answer), rel=1e-4)
