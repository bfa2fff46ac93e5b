"""EMDR2: the loss is the whole answer's marginal likelihood, and it moves the retriever to what helps."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
import pytest
from transformers import PreTrainedTokenizerBase

from rqa.data import Document, Example
from rqa.models.causal_lm import load_causal_lm
from rqa.models.encoder import Encoder, load_encoder
from rqa.objectives.emdr import MarginalLikelihood, WholeAnswers
from rqa.objectives.losses import marginal_nll
from rqa.objectives.rpg import DistillationBatch, ScoredCandidates
from rqa.objectives.teacher import AnswerScorer, Teacher
from rqa.prompts import PromptArguments, Prompter

ABSENT = float("-inf")


def test_the_loss_and_its_gradient_are_a_naive_sum_of_products_in_float64() -> None:
    likelihood, student = 5 * torch.randn(4, 3) - 8, torch.randn(4, 3)
    likelihood[1, 2] = ABSENT
    student = student.masked_fill(likelihood.isneginf(), ABSENT).requires_grad_()
    ours = marginal_nll(likelihood, student)
    theirs = student.detach().double().requires_grad_()
    expected = []
    for p, s in zip(likelihood.double(), theirs, strict=True):
        there = p > ABSENT
        weights = s[there].exp() / s[there].exp().sum()
        expected.append(-sum(w * math.exp(float(q)) for w, q in zip(weights, p[there], strict=True)).log())
    torch.testing.assert_close(ours.double(), torch.stack(expected), rtol=1e-5, atol=1e-5)
    ours.sum().backward()
    torch.stack(expected).sum().backward()
    torch.testing.assert_close(student.grad.double(), theirs.grad, rtol=1e-4, atol=1e-6)


def test_an_answer_of_hundreds_of_tokens_underflows_nowhere() -> None:
    loss = marginal_nll(torch.tensor([[-900.0, -905.0]]), torch.zeros(1, 2))
    assert float(loss) == pytest.approx(900 + math.log(2) - math.log1p(math.exp(-5)), 1e-6)


def test_a_question_without_documents_contributes_nothing() -> None:
    student = torch.full((2, 2), ABSENT)
    student[1] = 0.0
    student.requires_grad_()
    likelihood = torch.tensor([[ABSENT, ABSENT], [-1.0, -3.0]])
    loss = marginal_nll(likelihood, student)
    assert float(loss[0].detach()) == 0
    loss.sum().backward()
    assert student.grad[0].tolist() == [0, 0]
    assert student.grad[1].isfinite().all()


@pytest.fixture
def encoder(encoder_path: str) -> Encoder:
    return load_encoder(encoder_path).eval()


def test_the_language_models_mean_becomes_the_whole_answers_likelihood(
    encoder: Encoder,
    lm_path: str,
    examples: list[Example],
    documents: list[Document],
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    prompter = Prompter(tokenizer, PromptArguments(max_seq_length=256, max_new_tokens=1))
    lm = load_causal_lm(lm_path)
    teacher = Teacher(AnswerScorer(lm, prompter, 1000), "lm", tmp_path / "scores.sqlite")
    scored = ScoredCandidates(examples[:2], documents[:3], encoder, lambda indices: [[0, 1, 2], [1]], teacher)
    batch = WholeAnswers(examples[:2], scored, prompter)([0, 1])
    for row, column, number in ((0, 0, 0), (0, 2, 2), (1, 0, 1)):
        prompt = prompter.encode(examples[row], [documents[number]]).ids
        answer = tokenizer.encode(" " + examples[row].gold_answer, add_special_tokens=False)
        with torch.no_grad():
            log_probabilities = lm.double()(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
        expected = sum(float(log_probabilities[len(prompt) - 1 + i, token]) for i, token in enumerate(answer))
        assert float(batch.teacher[row, column]) == pytest.approx(expected, rel=1e-4)
    assert batch.teacher[1, 1:].isneginf().all()


def test_training_moves_the_retriever_to_the_document_that_helps(
    encoder: Encoder, examples: Sequence[Example], documents: Sequence[Document]
) -> None:
    batch = DistillationBatch(
        queries=encoder.tokenize_queries([examples[0].question]),
        passages=encoder.tokenize_passages([document.fmt_content for document in documents[:3]]),
        columns=torch.tensor([[0, 1, 2]]),
        teacher=torch.tensor([[-20.0, -5.0, -20.0]]),
        indices=[0],
    )
    objective = MarginalLikelihood(encoder, temperature=0.1)
    optimizer = torch.optim.SGD(encoder.parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        loss, _ = objective(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert losses[-1] >= 5
    assert objective(batch)[1]["agreement"] == 1
    same = replace(batch, teacher=torch.full((1, 3), -5.0))
    assert float(objective(same)[0].detach()) == pytest.approx(5, rel=1e-5)
