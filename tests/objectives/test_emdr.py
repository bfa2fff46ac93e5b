"""EMDR2: its teacher gives whole answers' log-likelihoods; the loss over them is tested in test_losses.py."""

from pathlib import Path

import torch
import pytest
from transformers import PreTrainedTokenizerBase

from rqa.data import Document, Example
from rqa.models.encoder import Encoder
from rqa.models.loading import load_causal_lm
from rqa.objectives.emdr import WholeAnswers
from rqa.objectives.rpg import ScoredCandidates
from rqa.objectives.teacher import AnswerScorer, Teacher
from rqa.prompts import PromptArguments, Prompter


@pytest.mark.parametrize("chat_format", ["prefix", "template"])
def test_the_language_models_mean_becomes_the_whole_answers_likelihood(
    chat_format: str, encoder: Encoder, lm_path: str, examples: list[Example], documents: list[Document],
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase,
) -> None:  # fmt: skip
    prompter = Prompter(tokenizer, PromptArguments(max_seq_length=256, max_new_tokens=1, chat_format=chat_format))
    lm = load_causal_lm(lm_path)
    teacher = Teacher(AnswerScorer(lm, prompter, 1000), "lm", tmp_path / "scores.sqlite")
    scored = ScoredCandidates(examples[:2], documents[:3], encoder, lambda indices: [[0, 1, 2], [1]], teacher)
    batch = WholeAnswers(examples[:2], scored, prompter)([0, 1])
    for row, column, number in ((0, 0, 0), (0, 2, 2), (1, 0, 1)):
        prompt = prompter.encode(examples[row], [documents[number]]).ids
        text = (" " if chat_format == "prefix" else "") + str(examples[row].gold_answer)
        answer = tokenizer.encode(text, add_special_tokens=False)
        with torch.no_grad():
            log_probabilities = lm.double()(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
        expected = sum(float(log_probabilities[len(prompt) - 1 + i, token]) for i, token in enumerate(answer))
        assert float(batch.teacher[row, column]) == pytest.approx(expected, rel=1e-4)
    assert batch.teacher[1, 1:].isneginf().all()
