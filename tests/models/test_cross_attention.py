"""What is recorded is the model's own cross-attention: queries and keys by its own projections, nothing else."""

import copy
from collections.abc import Sequence

from dataclasses import dataclass
import torch
import pytest
from torch import Tensor, nn
from transformers import PreTrainedModel

from rqa.data import Document, Example
from rqa.models.encoder_decoder import load_encoder_decoder, mean_by_owner, observe, passage_scores, start_token
from rqa.models.loading import choose_collate
from rqa.packing import FiDBatch, fid_batch
from rqa.models.encoder_decoder import EncoderDecoderArguments
from rqa.prompts import FiDPromptArguments, FiDPrompter, FiDSequence

@dataclass(kw_only=True)
class Flags(EncoderDecoderArguments, FiDPromptArguments):
    """x"""


ABSENT = float("-inf")


@pytest.fixture(params=["t5", "bart", "bert"])
def reader(
    request: pytest.FixtureRequest, t5_path: str, bart_path: str, encoder_path: str
) -> tuple[PreTrainedModel, FiDPrompter]:
    path = {"t5": t5_path, "bart": bart_path, "bert": f"bert::{encoder_path}"}[request.param]
    arguments = Flags(max_encoder_seq_length=64, max_decoder_seq_length=16)
    model, prompter = load_encoder_decoder(path, arguments)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(1.5 if request.param == "t5" else 12.0)
    return model.double().eval(), prompter


@pytest.fixture
def sequences(
    reader: tuple[PreTrainedModel, FiDPrompter], examples: Sequence[Example], documents: Sequence[Document]
) -> list[FiDSequence]:
    """Three questions over 3, 2 and 1 passages."""
    return [reader[1].encode(example, documents[n:3]) for n, example in enumerate(examples[:3])]


def collated(model: PreTrainedModel, sequences: Sequence[FiDSequence]) -> FiDBatch:
    return fid_batch(sequences, choose_collate(model.get_encoder(), 0), 16384)


def cross_attentions(model: PreTrainedModel) -> list[tuple[nn.Module, nn.Linear, nn.Linear, nn.Linear, int]]:
    """Each cross-attention with its query, key and value projections and its number of heads, by architecture."""
    found = []
    for name, module in model.get_decoder().named_modules():
        if name.endswith("EncDecAttention"):
            found.append((module, module.q, module.k, module.v, module.n_heads))
        elif name.endswith("encoder_attn"):
            found.append((module, module.q_proj, module.k_proj, module.v_proj, module.num_heads))
        elif name.endswith("crossattention.self"):
            found.append((module, module.query, module.key, module.value, module.num_attention_heads))
    assert len(found) == 2
    return found


def by_hand(model: PreTrainedModel, sequence: FiDSequence, kind: str) -> Tensor:
    """Q_0 . K of each layer from the states that its projections were given, one head after the other. -> [K]"""
    model = copy.deepcopy(model)
    model.set_attn_implementation("eager")
    given: list[tuple[Tensor, Tensor, Tensor, int]] = []

    def keep(heads: int, projections: Sequence[nn.Linear]) -> None:
        outputs: list[Tensor] = []
        for projection in projections:
            projection.register_forward_hook(lambda module, args, output: outputs.append(output[0]))
        given.append((outputs, heads))  # type: ignore[arg-type]

    for _, query, key, value, heads in cross_attentions(model):
        keep(heads, (query, key, value))
    encoder = model.get_encoder()
    states = torch.cat([encoder(input_ids=torch.tensor([ids])).last_hidden_state for ids in sequence.passages], dim=1)
    model(encoder_outputs=(states,), decoder_input_ids=torch.tensor([[start_token(model)]]), use_cache=False)
    total = torch.zeros(states.shape[1], dtype=torch.float64)
    for (query, key, value), heads in given:
        width = query.shape[-1] // heads
        scale = 1.0 if model.config.model_type == "t5" else width**-0.5
        for head in range(heads):
            part = slice(head * width, (head + 1) * width)
            scores = key[:, part] @ query[0, part] * scale  # [S]
            norm = value[:, part].norm(dim=-1)
            total += (scores.softmax(0) * norm if kind == "value_norm" else scores) / heads / len(given)
    means, start = [], 0
    for ids in sequence.passages:
        means.append(total[start : start + len(ids)].mean())
        start += len(ids)
    return torch.stack(means)


@pytest.mark.parametrize("kind", ["plain", "value_norm"])
def test_scores_are_the_models_own_projections_multiplied_by_hand(
    kind: str, reader: tuple[PreTrainedModel, FiDPrompter], sequences: list[FiDSequence]
) -> None:
    model, _ = reader
    expected = [by_hand(model, sequence, kind) for sequence in sequences]
    observe(model)
    scores = passage_scores(model, collated(model, sequences), kind)
    for row, one in zip(scores, expected, strict=True):
        torch.testing.assert_close(row[: len(one)].double(), one, rtol=1e-4, atol=1e-5)
        assert (row[len(one) :] == ABSENT).all()
    assert float(expected[0].detach().std()) > 1e-4


def test_padding_and_order_of_passages_change_no_score(
    reader: tuple[PreTrainedModel, FiDPrompter], sequences: list[FiDSequence]
) -> None:
    model, _ = reader
    observe(model)
    together = passage_scores(model, collated(model, sequences))
    for row, sequence in zip(together, sequences, strict=True):
        alone = passage_scores(model, collated(model, [sequence]))[0]
        torch.testing.assert_close(row[: len(alone)], alone, rtol=1e-4, atol=1e-5)
    turned = [FiDSequence(sequence.passages[::-1], sequence.answer) for sequence in sequences]
    torch.testing.assert_close(
        passage_scores(model, collated(model, turned))[0], together[0].flip(0), rtol=1e-4, atol=1e-5
    )


def test_a_score_depends_on_the_passages_beside_it(
    reader: tuple[PreTrainedModel, FiDPrompter], sequences: list[FiDSequence]
) -> None:
    model, _ = reader
    observe(model)
    whole = passage_scores(model, collated(model, sequences[:1]))[0]
    part = passage_scores(model, collated(model, [FiDSequence(sequences[0].passages[:2], [])]))[0]
    assert (whole[:2] - part).abs().max() > 1e-5


def test_observing_changes_no_output(
    reader: tuple[PreTrainedModel, FiDPrompter], sequences: list[FiDSequence]
) -> None:
    model, _ = reader
    inputs = {
        "input_ids": torch.tensor([sequences[0].passages[0]]),
        "decoder_input_ids": torch.tensor([[start_token(model), 5, 6]]),
    }
    before = model(**inputs).logits
    observe(model)
    torch.testing.assert_close(model(**inputs).logits, before)
    passage_scores(model, collated(model, sequences))
    torch.testing.assert_close(model(**inputs).logits, before)


def test_means_are_over_each_passages_real_tokens() -> None:
    values = torch.tensor([[1.0, 3.0, 10.0, 20.0, 60.0], [5.0, ABSENT, ABSENT, ABSENT, ABSENT]])
    owners = torch.tensor([[0, 0, 1, 1, 1], [0, -1, -1, -1, -1]])
    assert mean_by_owner(values, owners).tolist() == [[2.0, 30.0], [5.0, ABSENT]]
