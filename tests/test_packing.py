"""Packed and padded batches, against loops; answers' logits against the full ones."""

import random
from collections.abc import Callable, Sequence
from functools import partial

import torch
import pytest
from transformers import AutoModelForCausalLM, PreTrainedModel

from rqa.models.causal_lm import answer_logits, load_causal_lm
from rqa.packing import TokenBatch, answer_batch, pack, pad, token_budget_batches
from rqa.prompts import TokenSequence

SEQUENCES = [[5, 6, 7], [8], [9, 10, 11, 12, 13], [14, 15]]
PAD_ID = 99
pad_99 = partial(pad, pad_id=PAD_ID)


def random_sequences(count: int, vocabulary: int, seed: int) -> list[TokenSequence]:
    """Prompts and answers of many lengths, the shortest possible ones among them."""
    chance = random.Random(seed)
    made = [TokenSequence([3, 4], 1)]
    for _ in range(count - 1):
        length = chance.randint(2, 40)
        made.append(
            TokenSequence([chance.randrange(3, vocabulary) for _ in range(length)], chance.randint(1, length - 1))
        )
    return made


@pytest.fixture(scope="module")
def ours(lm_path: str) -> PreTrainedModel:
    return load_causal_lm(lm_path, dtype=torch.float64).eval()


@pytest.fixture(scope="module")
def theirs(lm_path: str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(lm_path, dtype=torch.float64, attn_implementation="sdpa").eval()


def naive_rows(model: PreTrainedModel, sequences: Sequence[TokenSequence]) -> torch.Tensor:
    """The full logits of one sequence at a time, and of them the rows before each answer token."""
    rows = []
    with torch.no_grad():
        for sequence in sequences:
            logits = model(input_ids=torch.tensor([sequence.ids])).logits[0]
            for position in range(len(sequence.ids)):
                if position >= sequence.answer_start:
                    rows.append(logits[position - 1])
    return torch.stack(rows)


# ---------------------------------------------------------------- pack and pad


def test_packing_lays_sequences_end_to_end() -> None:
    inputs = pack(SEQUENCES).inputs
    ids, positions, borders = [], [], [0]
    for sequence in SEQUENCES:
        for position, token in enumerate(sequence):
            ids.append(token)
            positions.append(position)
        borders.append(len(ids))
    assert inputs["input_ids"].tolist() == [ids]
    assert inputs["position_ids"].tolist() == [positions]
    assert inputs["cu_seq_lens_q"].tolist() == inputs["cu_seq_lens_k"].tolist() == borders
    assert inputs["cu_seq_lens_q"].dtype == torch.int32  # flash-attn takes no other
    assert inputs["max_length_q"] == inputs["max_length_k"] == 5
    assert "attention_mask" not in inputs


def test_padding_is_on_the_right_and_masked() -> None:
    inputs = pad(SEQUENCES, PAD_ID).inputs
    assert inputs["input_ids"].tolist() == [s + [PAD_ID] * (5 - len(s)) for s in SEQUENCES]
    assert inputs["attention_mask"].tolist() == [[1] * len(s) + [0] * (5 - len(s)) for s in SEQUENCES]


@pytest.mark.parametrize("collate", [pack, pad, pad_99])
@pytest.mark.parametrize("sequences", [SEQUENCES, SEQUENCES[:1], [[1]], [[7, 7], [7, 7]]])
def test_starts_and_lengths_find_each_token_in_the_flat_output(
    sequences: list[list[int]], collate: Callable[[Sequence[Sequence[int]]], TokenBatch]
) -> None:
    batch = collate(sequences)
    flat = batch.inputs["input_ids"].flatten().tolist()
    pairs = zip(batch.starts.tolist(), batch.lengths.tolist(), strict=True)
    assert [flat[start : start + length] for start, length in pairs] == sequences


@pytest.mark.parametrize("collate", [pack, pad_99])
def test_an_answer_batch_names_position_target_and_owner_of_each_answer_token(
    collate: Callable[[Sequence[Sequence[int]]], TokenBatch],
) -> None:
    sequences = random_sequences(9, 50, seed=1)
    batch = answer_batch(sequences, collate, range(20, 29))
    flat = batch.tokens.inputs["input_ids"].flatten()
    positions, targets, owners = [], [], []
    for owner, (sequence, start) in enumerate(zip(sequences, batch.tokens.starts.tolist(), strict=True)):
        for offset in range(sequence.answer_start, len(sequence.ids)):
            positions.append(start + offset - 1)
            targets.append(sequence.ids[offset])
            owners.append(owner)
    assert batch.positions.tolist() == positions
    assert batch.targets.tolist() == targets
    assert batch.owners.tolist() == owners
    assert flat[batch.positions + 1].tolist() == targets
    assert batch.indices == tuple(range(20, 29))
    assert batch.weight == sum(len(sequence.ids) - sequence.answer_start for sequence in sequences)
    assert batch.num_tokens == sum(len(sequence.ids) for sequence in sequences)


# ---------------------------------------------------------------- logits of answers


@pytest.mark.parametrize("collate", [pack, pad, pad_99])
@pytest.mark.parametrize("seed", range(3))
def test_the_answers_logits_are_those_rows_of_the_full_logits(
    seed: int,
    collate: Callable[[Sequence[Sequence[int]]], TokenBatch],
    ours: PreTrainedModel,
    theirs: PreTrainedModel,
) -> None:
    sequences = random_sequences(8, ours.config.vocab_size, seed)
    with torch.no_grad():
        logits = answer_logits(ours, answer_batch(sequences, collate))
    expected = naive_rows(theirs, sequences)
    assert logits.shape == expected.shape
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("collate", [pack, pad])
def test_one_sequence_alone_is_a_batch_too(
    collate: Callable[[Sequence[Sequence[int]]], TokenBatch], ours: PreTrainedModel, theirs: PreTrainedModel
) -> None:
    for sequence in (TokenSequence([3, 4], 1), TokenSequence(list(range(3, 33)), 20)):
        with torch.no_grad():
            logits = answer_logits(ours, answer_batch([sequence], collate))
        torch.testing.assert_close(logits, naive_rows(theirs, [sequence]), rtol=0, atol=1e-10)


@pytest.mark.parametrize("collate", [pack, pad])
def test_permuting_the_sequences_permutes_the_logits_and_nothing_else(
    collate: Callable[[Sequence[Sequence[int]]], TokenBatch], ours: PreTrainedModel
) -> None:
    sequences = random_sequences(7, ours.config.vocab_size, seed=5)
    order = random.Random(0).sample(range(7), 7)
    with torch.no_grad():
        straight = answer_batch(sequences, collate)
        permuted = answer_batch([sequences[i] for i in order], collate)
        first, second = answer_logits(ours, straight), answer_logits(ours, permuted)
    expected = torch.cat([first[straight.owners == i] for i in order])
    torch.testing.assert_close(second, expected, rtol=0, atol=1e-12)


def test_a_sequence_does_not_see_its_neighbours(ours: PreTrainedModel) -> None:
    first, second, third = random_sequences(4, ours.config.vocab_size, seed=6)[1:]
    changed = TokenSequence([token // 2 + 3 for token in second.ids], second.answer_start)
    assert changed.ids != second.ids
    with torch.no_grad():
        before, after = (answer_batch([first, middle, third], pack) for middle in (second, changed))
        logits, others = answer_logits(ours, before), answer_logits(ours, after)
    outside = before.owners != 1
    torch.testing.assert_close(logits[outside], others[outside], rtol=0, atol=1e-12)
    assert (logits[~outside] - others[~outside]).abs().max() > 1e-3


@pytest.mark.parametrize("collate", [pack, pad])
def test_the_gradient_is_that_of_the_sequences_one_by_one(
    collate: Callable[[Sequence[Sequence[int]]], TokenBatch], lm_path: str
) -> None:
    sequences = random_sequences(5, 200, seed=7)
    ours = load_causal_lm(lm_path, dtype=torch.float64)
    theirs = AutoModelForCausalLM.from_pretrained(lm_path, dtype=torch.float64, attn_implementation="sdpa")
    batch = answer_batch(sequences, collate)
    torch.nn.functional.cross_entropy(answer_logits(ours, batch), batch.targets, reduction="sum").backward()
    for sequence in sequences:
        logits = theirs(input_ids=torch.tensor([sequence.ids])).logits[0, sequence.answer_start - 1 : -1]
        targets = torch.tensor(sequence.ids[sequence.answer_start :])
        torch.nn.functional.cross_entropy(logits, targets, reduction="sum").backward()
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-8, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


# ---------------------------------------------------------------- token budgets


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("padded", [False, True])
def test_batches_hold_each_index_once_within_the_budget_longest_first(padded: bool, seed: int) -> None:
    chance = random.Random(seed)
    lengths = [chance.choice([1, 2, 5, chance.randint(1, 300)]) for _ in range(chance.randint(1, 60))]
    budget = chance.choice([1, 7, 64, 250, 10_000])
    batches = token_budget_batches(lengths, budget, padded)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    assert all(batches)
    for batch in batches:
        tokens = max(lengths[i] for i in batch) * len(batch) if padded else sum(lengths[i] for i in batch)
        assert len(batch) == 1 or tokens <= budget
    in_order = [lengths[index] for batch in batches for index in batch]
    assert in_order == sorted(lengths, reverse=True)


def test_batches_are_filled_as_far_as_the_order_allows() -> None:
    assert token_budget_batches([10, 40, 30, 20], 60) == [[1], [2, 3, 0]]
    assert token_budget_batches([10, 40, 30, 20], 60, padded=True) == [[1], [2, 3], [0]]
    assert token_budget_batches([7] * 6, 14) == [[0, 1], [2, 3], [4, 5]]


def test_no_sequences_are_no_batches_and_empty_ones_cost_nothing() -> None:
    assert token_budget_batches([], 10) == []
    assert token_budget_batches([0, 0], 10) == [[0, 1]]
