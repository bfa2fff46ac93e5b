"""Packed and padded batches, against loops; answers' logits against the full ones."""

import itertools
import random
from collections.abc import Sequence

import torch
import pytest
from transformers import AutoModelForCausalLM, PreTrainedModel

from rqa.models.encoder_decoder import FiDSequence, fid_batch
from rqa.models.loading import load_causal_lm
from rqa.packing import Collate, answer_batch, answer_logits, pack, pad, token_budget_batches
from rqa.prompts import TokenSequence

SEQUENCES = [[5, 6, 7], [8], [9, 10, 11, 12, 13], [14, 15]]
packed_and_padded = pytest.mark.parametrize("collate", [pack, pad])


def random_sequences(count: int, vocabulary: int, seed: int) -> list[TokenSequence]:
    """Prompts and answers of many lengths, the shortest possible ones among them."""
    chance = random.Random(seed)
    drawn = [[chance.randrange(3, vocabulary) for _ in range(chance.randint(2, 40))] for _ in range(count - 1)]
    return [TokenSequence([3, 4], 1), *(TokenSequence(ids, chance.randint(1, len(ids) - 1)) for ids in drawn)]


def naive_rows(model: PreTrainedModel, sequences: Sequence[TokenSequence]) -> torch.Tensor:
    """The full logits of one sequence at a time, and of them the rows before each answer token."""
    logits = [(model(input_ids=torch.tensor([s.ids])).logits[0], s.answer_start) for s in sequences]
    return torch.cat([rows[start - 1 : -1] for rows, start in logits])


def test_packing_lays_sequences_end_to_end_and_padding_is_on_the_right_and_masked() -> None:
    packed, padded = pack(SEQUENCES).inputs, pad(SEQUENCES).inputs
    assert packed["input_ids"].tolist() == [[5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]]
    assert packed["position_ids"].tolist() == [[0, 1, 2, 0, 0, 1, 2, 3, 4, 0, 1]]
    assert packed["cu_seq_lens_q"].tolist() == packed["cu_seq_lens_k"].tolist() == [0, 3, 4, 9, 11]
    assert packed["cu_seq_lens_q"].dtype == torch.int32  # flash-attn takes no other
    assert packed["max_length_q"] == packed["max_length_k"] == 5
    assert "attention_mask" not in packed
    assert padded["input_ids"].tolist() == [s + [0] * (5 - len(s)) for s in SEQUENCES]
    assert padded["attention_mask"].tolist() == [[1] * len(s) + [0] * (5 - len(s)) for s in SEQUENCES]


@packed_and_padded
def test_starts_lengths_and_rows_find_each_token_in_the_flat_output(collate: Collate) -> None:
    for sequences in (SEQUENCES, SEQUENCES[:1], [[1]], [[7, 7], [7, 7]]):
        batch = collate(sequences)
        flat = batch.inputs["input_ids"].flatten().tolist()
        pairs = zip(batch.starts.tolist(), batch.lengths.tolist(), strict=True)
        assert [flat[start : start + length] for start, length in pairs] == sequences
        assert [flat[row] for row in batch.rows.tolist()] == [*itertools.chain(*sequences)]


@packed_and_padded
def test_an_answer_batch_names_position_target_and_owner_of_each_answer_token(collate: Collate) -> None:
    sequences = random_sequences(9, 50, seed=1)
    batch = answer_batch(sequences, collate, range(20, 29))
    expected = []
    for owner, (sequence, start) in enumerate(zip(sequences, batch.tokens.starts.tolist(), strict=True)):
        for offset in range(sequence.answer_start, len(sequence.ids)):
            expected.append([start + offset - 1, sequence.ids[offset], owner])
    assert torch.stack([batch.positions, batch.targets, batch.owners], dim=1).tolist() == expected
    assert torch.equal(batch.tokens.inputs["input_ids"].flatten()[batch.positions + 1], batch.targets)
    assert (batch.indices, batch.weight) == (tuple(range(20, 29)), len(expected))
    assert batch.num_tokens == sum(len(sequence.ids) for sequence in sequences)


@packed_and_padded
def test_a_fid_batch_puts_each_passages_tokens_in_its_questions_row(collate: Collate) -> None:
    asked = [FiDSequence([[1, 2, 3], [4], [5, 6]], [7, 8]), FiDSequence([[9, 10]], []), FiDSequence([[11] * 5], [12])]
    batch = fid_batch(asked, collate, [4, 5, 6], max_tokens=6)
    assert max(len(part.rows) for part in batch.parts) <= 6
    found = torch.zeros(batch.owners.shape, dtype=torch.long).flatten()
    found[batch.places] = torch.cat([part.inputs["input_ids"].flatten()[part.rows] for part in batch.parts])
    assert found.view(3, 6).tolist() == [[1, 2, 3, 4, 5, 6], [9, 10, 0, 0, 0, 0], [11] * 5 + [0]]
    assert batch.owners.tolist() == [[0, 0, 0, 1, 2, 2], [0, 0, -1, -1, -1, -1], [0] * 5 + [-1]]
    assert batch.labels.tolist() == [[7, 8], [-100, -100], [12, -100]]
    assert (batch.weight, batch.num_tokens, batch.indices) == (3, 16, (4, 5, 6))


@packed_and_padded
@torch.no_grad()
def test_the_answers_logits_are_those_of_the_sequences_one_by_one_in_any_order(collate: Collate, lm_path: str) -> None:
    ours = load_causal_lm(lm_path, dtype=torch.float64).eval()
    theirs = AutoModelForCausalLM.from_pretrained(lm_path, dtype=torch.float64, attn_implementation="sdpa").eval()
    alone = [[TokenSequence([3, 4], 1)], [TokenSequence(list(range(3, 33)), 20)]]
    for sequences in [*alone, *(random_sequences(8, ours.config.vocab_size, seed) for seed in range(3))]:
        for turned in (sequences, random.Random(0).sample(sequences, len(sequences))):
            logits, expected = answer_logits(ours, answer_batch(turned, collate)), naive_rows(theirs, turned)
            assert logits.shape == expected.shape
            torch.testing.assert_close(logits, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("padded", [False, True])
def test_batches_hold_each_index_once_within_the_budget_longest_first(padded: bool) -> None:
    for seed in range(20):
        chance = random.Random(seed)
        lengths = [chance.choice([1, 2, 5, chance.randint(1, 300)]) for _ in range(chance.randint(1, 60))]
        budget, least_full = chance.choice([1, 7, 64, 250, 10_000]), chance.choice([0.0, 0.8])
        batches = token_budget_batches(lengths, budget, padded, least_full)
        assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
        for batch in batches:
            costs = [lengths[index] for index in batch]
            assert len(batch) == 1 or (max(costs) * len(batch) if padded else sum(costs)) <= budget
            assert min(costs) >= least_full * max(costs)
        assert [lengths[index] for batch in batches for index in batch] == sorted(lengths, reverse=True)


def test_batches_are_filled_as_far_as_the_order_allows() -> None:
    assert token_budget_batches([10, 40, 30, 20], 60) == [[1], [2, 3, 0]]
    assert token_budget_batches([10, 40, 30, 20], 60, padded=True) == [[1], [2, 3], [0]]
    assert token_budget_batches([7] * 6, 14) == [[0, 1], [2, 3], [4, 5]]
    assert token_budget_batches([], 10) == []
    assert token_budget_batches([0, 0], 10) == [[0, 1]]
