"""SFT's and SwR's loss, beside transformers' own and a loop in float64."""

from collections.abc import Sequence

import torch
import pytest
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from rqa.data import Document, Example
from rqa.models.causal_lm import load_causal_lm
from rqa.objectives.sft import AnswerLikelihood
from rqa.prompts import PromptArguments, Prompter, TokenSequence


@pytest.fixture
def objective(lm_path: str, tokenizer: PreTrainedTokenizerBase) -> AnswerLikelihood:
    return AnswerLikelihood(load_causal_lm(lm_path).double(), Prompter(tokenizer, PromptArguments(max_new_tokens=16)))


@pytest.fixture
def sequences(
    objective: AnswerLikelihood, examples: Sequence[Example], documents: Sequence[Document]
) -> list[TokenSequence]:
    prompter = objective.prompter
    return [prompter.encode(example, documents[:n], example.gold_answer) for n, example in enumerate(examples[:4])]


def naive_loss(lm_path: str, sequences: Sequence[TokenSequence]) -> tuple[torch.Tensor, LlamaForCausalLM]:
    """Each sequence by itself, every label but the answer's set to -100, summed."""
    model = LlamaForCausalLM.from_pretrained(lm_path).double()
    losses = []
    for sequence in sequences:
        ids = torch.tensor([sequence.ids])
        labels = ids.clone()
        labels[0, : sequence.answer_start] = -100
        answer_tokens = len(sequence.ids) - sequence.answer_start
        losses.append(model(input_ids=ids, labels=labels).loss * answer_tokens)
    return torch.stack(losses).sum(), model


def test_the_loss_and_its_gradient_are_those_of_the_answers_alone(
    objective: AnswerLikelihood, sequences: list[TokenSequence], lm_path: str
) -> None:
    ours, _ = objective(objective.batch(sequences))
    theirs, model = naive_loss(lm_path, sequences)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)  # the loss is taken in float32
    ours.backward()
    theirs.backward()
    for (name, left), right in zip(objective.model.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(left.grad, right.grad, rtol=1e-4, atol=1e-5, msg=name)


def test_the_weight_counts_answer_and_end_of_turn(objective: AnswerLikelihood, sequences: list[TokenSequence]) -> None:
    expected = sum(len(sequence.ids) - sequence.answer_start for sequence in sequences)
    assert objective.batch(sequences).weight == expected
    for sequence in sequences:
        assert sequence.ids[-1] == objective.prompter.tokenizer.eos_token_id


def test_micro_batches_add_up_to_the_whole(objective: AnswerLikelihood, sequences: list[TokenSequence]) -> None:
    whole = objective(objective.batch(sequences))[0]
    parts = [objective(objective.batch(sequences[start : start + 2]))[0] for start in (0, 2)]
    torch.testing.assert_close(sum(parts), whole, rtol=1e-6, atol=1e-5)


def test_another_answer_in_the_batch_changes_nothing(
    objective: AnswerLikelihood, sequences: list[TokenSequence]
) -> None:
    first = objective(objective.batch(sequences[:1]))[0]
    pair = objective(objective.batch(sequences[:2]))[0] - objective(objective.batch(sequences[1:2]))[0]
    torch.testing.assert_close(first, pair, rtol=1e-5, atol=1e-5)
