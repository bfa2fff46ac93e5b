"""SFT: its loss is that of the answers alone, beside transformers' own; and which examples become prompts."""

from collections.abc import Sequence
from dataclasses import replace

import torch
import pytest
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from rqa.data import Document, Example
from rqa.models.loading import load_causal_lm
from rqa.objectives.sft import AnswerLikelihood, encode_examples
from rqa.prompts import PromptArguments, Prompter, TokenSequence


@pytest.fixture
def objective(lm_path: str, tokenizer: PreTrainedTokenizerBase) -> AnswerLikelihood:
    return AnswerLikelihood(load_causal_lm(lm_path).double(), Prompter(tokenizer, PromptArguments(max_new_tokens=16)))


def naive_loss(model: LlamaForCausalLM, sequences: Sequence[TokenSequence]) -> torch.Tensor:
    """Each sequence by itself, every label but the answer's set to -100, summed."""
    losses = []
    for sequence in sequences:
        ids = torch.tensor([sequence.ids])
        labels = ids.clone()
        labels[0, : sequence.answer_start] = -100
        losses.append(model(input_ids=ids, labels=labels).loss * (len(sequence.ids) - sequence.answer_start))
    return torch.stack(losses).sum()


def test_the_loss_and_its_gradient_are_those_of_the_answers_alone_however_the_batch_is_cut(
    objective: AnswerLikelihood, examples: list[Example], documents: list[Document], lm_path: str
) -> None:
    encode = objective.prompter.encode
    sequences = [encode(example, documents[:n], example.gold_answer) for n, example in enumerate(examples[:4])]
    model = LlamaForCausalLM.from_pretrained(lm_path).double()
    for part in (sequences[:1], sequences[1:], sequences):
        batch = objective.batch(part)
        assert batch.weight == sum(len(sequence.ids) - sequence.answer_start for sequence in part)
        ours, theirs = objective(batch)[0], naive_loss(model, part)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)  # the loss is taken in float32
    ours.backward()
    theirs.backward()
    for (name, left), right in zip(objective.model.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(left.grad, right.grad, rtol=1e-4, atol=1e-5, msg=name)
    assert all(sequence.ids[-1] == objective.prompter.tokenizer.eos_token_id for sequence in sequences)


def test_what_does_not_fit_is_left_out_and_a_prompt_that_is_cut_more_than_in_generation_is_counted(
    tokenizer: PreTrainedTokenizerBase, examples: list[Example], documents: list[Document],
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    prompter = Prompter(tokenizer, PromptArguments(max_seq_length=100, max_new_tokens=16))
    endless = replace(examples[1], question="Why? " * 100, where="train.jsonl:7")
    long = replace(examples[2], gold_answer="Brask trades in wool, and in wool alone, since wool is what it has.")
    asked, passages = [examples[0], endless, long, examples[3]], [[documents[n]] for n in range(4)]
    sequences = encode_examples(prompter, asked, passages)
    assert list(sequences) == [0, 2, 3]
    for number, sequence in sequences.items():
        generated = prompter.encode(asked[number], passages[number]).ids
        assert (sequence.ids[: sequence.answer_start] != generated) == (number == 2)
    left_out, cut_more = [record.getMessage() for record in caplog.records]
    assert left_out.startswith("train.jsonl:7: question and answer alone take")
    assert cut_more == "1 prompts are cut more than in generation: their answers are longer than --max_new_tokens"
