"""Fusion-in-decoder, for T5, BART and a warm-started pair of BERTs: what the plain model gives, and nothing else.

Scores of passages are the model's own cross-attention: queries and keys by its own projections.
"""

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import pytest
from torch import Tensor, nn
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    GenerationConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutput

from rqa.data import Document, Example
from rqa.models.encoder_decoder import (
    NEW_LAYERS,
    EncoderDecoderArguments,
    FiDPromptArguments,
    FiDReader,
    FiDSequence,
    load_encoder_decoder,
    mean_by_owner,
    observe,
    passage_scores,
    refuse_overflow,
    start_token,
)
from rqa.models.reader import GenerationArguments
from rqa.objectives.fid import FiDLikelihood
from rqa.packing import pack
from rqa.runtime.errors import UserError
from rqa.runtime.parallelize import parallelize

ABSENT = float("-inf")


@dataclass(kw_only=True)
class Flags(FiDPromptArguments, EncoderDecoderArguments):
    """What a FiD reader is loaded with."""


FLAGS = Flags(max_encoder_seq_length=64, max_decoder_seq_length=24)


@pytest.fixture(params=["t5", "bart", "bert"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def path(kind: str, t5_path: str, bart_path: str, encoder_path: str) -> str:
    return {"t5": t5_path, "bart": bart_path, "bert": f"bert::{encoder_path}"}[kind]


@pytest.fixture
def objective(path: str) -> FiDLikelihood:
    """Without dropout, in float64, with weights large enough that passages matter."""
    model, prompter = load_encoder_decoder(path, FLAGS)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(3.0)
    return FiDLikelihood(model.double().eval(), prompter)


@pytest.fixture
def plain(objective: FiDLikelihood, tmp_path: Path) -> PreTrainedModel:
    """What `transformers` alone loads from the saved checkpoint."""
    objective.save_pretrained(tmp_path / "saved")
    return AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "saved", attn_implementation="eager").double().eval()


@pytest.fixture
def sequences(objective: FiDLikelihood, examples: list[Example], documents: list[Document]) -> list[FiDSequence]:
    """Four questions over 1 to 4 passages of different lengths."""
    texts = [*documents[:3], Document(documents[4].page_content + " " + documents[5].page_content)]
    encode = objective.prompter.encode
    return [encode(example, texts[: n + 1], example.gold_answer) for n, example in enumerate(examples[:4])]


def turned(sequences: list[FiDSequence]) -> list[FiDSequence]:
    return [FiDSequence(sequence.passages[::-1], sequence.answer) for sequence in sequences]


def loss(objective: FiDLikelihood, sequences: Sequence[FiDSequence]) -> float:
    return float(objective(objective.batch(sequences))[0].detach())


def naive_states(plain: PreTrainedModel, sequence: FiDSequence) -> BaseModelOutput:
    """One passage after the other, nothing padded."""
    states = [plain.get_encoder()(input_ids=torch.tensor([ids])).last_hidden_state for ids in sequence.passages]
    return BaseModelOutput(last_hidden_state=torch.cat(states, dim=1))


def naive_loss(plain: PreTrainedModel, sequence: FiDSequence) -> Tensor:
    start = plain.generation_config.decoder_start_token_id or plain.config.decoder_start_token_id
    inputs = torch.tensor([[start, *sequence.answer[:-1]]])
    logits = plain(encoder_outputs=naive_states(plain, sequence), decoder_input_ids=inputs).logits[0]
    return -logits.log_softmax(-1)[range(len(sequence.answer)), sequence.answer].sum()


def test_the_loss_and_its_gradient_are_those_of_one_passage_at_a_time(
    objective: FiDLikelihood, plain: PreTrainedModel, sequences: list[FiDSequence]
) -> None:
    one = sequences[0]
    theirs = plain(input_ids=torch.tensor(one.passages), labels=torch.tensor([one.answer])).loss
    assert loss(objective, [one]) / len(one.answer) == pytest.approx(float(theirs.detach()), rel=1e-6)
    ours = objective(objective.batch(sequences))[0]
    theirs = torch.stack([naive_loss(plain, sequence) for sequence in sequences]).sum()
    assert float(ours.detach()) == pytest.approx(float(theirs.detach()), rel=1e-6)
    ours.backward()
    theirs.backward()
    expected = {name: parameter.grad for name, parameter in plain.named_parameters()}
    largest = max(float(gradient.abs().max()) for gradient in expected.values() if gradient is not None)
    for name, parameter in objective.fid.model.named_parameters():
        if "pooler" not in name:  # the loss is taken in float32
            assert (parameter.grad - expected[name]).abs().max() <= 1e-5 * largest, name


def test_neither_the_order_of_passages_nor_other_questions_nor_padding_change_the_loss(
    objective: FiDLikelihood, kind: str, sequences: list[FiDSequence]
) -> None:
    together = loss(objective, sequences)
    assert loss(objective, turned(sequences)) == pytest.approx(together, rel=1e-6)
    assert loss(objective, sequences[::-1]) == pytest.approx(together, rel=1e-6)
    assert sum(loss(objective, [sequence]) for sequence in sequences) == pytest.approx(together, rel=1e-6)
    other = [FiDSequence(sequence.passages[:1], sequence.answer) for sequence in sequences]
    assert abs(loss(objective, other) - together) > 1e-3
    batch = objective.batch(sequences)
    assert batch.weight == sum(len(sequence.answer) for sequence in sequences)
    assert batch.num_tokens == batch.weight + sum(len(ids) for s in sequences for ids in s.passages)
    assert (objective.collate is pack) == (kind == "bert")
    for part in batch.parts:  # a passage is padded by a quarter at most
        width = part.inputs["input_ids"].numel() // len(part.lengths)
        assert int(part.lengths.min()) >= 0.8 * width or objective.collate is pack


def test_the_saved_checkpoint_is_an_ordinary_one(
    objective: FiDLikelihood, plain: PreTrainedModel, sequences: list[FiDSequence]
) -> None:
    ours = objective.fid.model.state_dict()
    assert plain.state_dict().keys() == ours.keys()
    for name, weight in plain.state_dict().items():
        torch.testing.assert_close(weight, ours[name].to(weight), msg=name)
    output, embedding = plain.get_output_embeddings().weight, plain.get_decoder().get_input_embeddings().weight
    assert output.data_ptr() == embedding.data_ptr()
    one = {"input_ids": torch.tensor([sequences[3].passages[0]]), "decoder_input_ids": torch.tensor([[2, 5, 6]])}
    torch.testing.assert_close(plain(**one).logits, objective.fid.model(**one).logits, rtol=1e-6, atol=1e-6)


def reader_of(objective: FiDLikelihood, **flags: object) -> FiDReader:
    return FiDReader(objective.fid, objective.prompter, GenerationArguments(**flags), objective.collate)


@pytest.mark.parametrize("beams", [1, 3])
def test_generation_is_that_of_the_plain_model_over_all_passages(
    beams: int, objective: FiDLikelihood, plain: PreTrainedModel, sequences: list[FiDSequence]
) -> None:
    end = objective.prompter.end_token
    config = GenerationConfig(max_new_tokens=24, num_beams=beams, eos_token_id=end, pad_token_id=end)
    for ours, sequence in zip(reader_of(objective, num_beams=beams).generate(sequences), sequences, strict=True):
        states = naive_states(plain, sequence)
        mask = torch.ones(states.last_hidden_state.shape[:2], dtype=torch.long)
        theirs = plain.generate(encoder_outputs=states, attention_mask=mask, generation_config=config)[0, 1:].tolist()
        assert ours == (theirs[: theirs.index(end)] if end in theirs else theirs)


def test_sampling_draws_and_with_a_narrow_nucleus_is_greedy(
    objective: FiDLikelihood, sequences: list[FiDSequence]
) -> None:
    greedy = reader_of(objective).generate(sequences)
    assert reader_of(objective, do_sample=True, top_p=1e-6).generate(sequences) == greedy
    assert reader_of(objective, do_sample=True, temperature=5.0).generate(sequences) != greedy


def test_passages_are_encoded_once_and_questions_answered_in_their_order(
    objective: FiDLikelihood, examples: list[Example], documents: list[Document]
) -> None:
    reader, tokens = reader_of(objective, num_beams=2), []
    pairs = list(zip(examples[:3], [documents[:3], documents[3:4], []], strict=True))
    objective.fid.model.get_encoder().register_forward_hook(
        lambda module, args, kwargs, output: tokens.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    answers = [answer.text for answer in reader.answer(*zip(*pairs, strict=True), progress=False)]
    lengths = [len(ids) for pair in pairs for ids in objective.prompter.encode(*pair).passages]
    assert sum(lengths) <= sum(tokens) <= 1.25 * sum(lengths)
    assert [reader.answer([example], [read], progress=False)[0].text for example, read in pairs] == answers


def test_gradient_checkpointing_recomputes_encoder_and_decoder_and_changes_no_gradient(
    path: str, sequences: list[FiDSequence]
) -> None:
    gradients, calls = [], []
    for checkpointing in (False, True):
        torch.manual_seed(5)
        model, prompter = load_encoder_decoder(path, FLAGS)
        objective = FiDLikelihood(model, prompter)
        parallelize(objective, checkpointing, compile=False)
        objective.train()
        count = dict.fromkeys(("encoder", "decoder"), 0)
        for side in count:
            stack = getattr(model, f"get_{side}")()
            first = next(m for m in stack.modules() if isinstance(m, nn.ModuleList))[0]
            norm = next(m for m in first.modules() if "Norm" in type(m).__name__)
            norm.register_forward_hook(lambda *_, side=side, count=count: count.update({side: count[side] + 1}))
        torch.manual_seed(6)
        objective(objective.batch(sequences))[0].backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        calls.append(count)
    assert all(calls[1][side] == 2 * calls[0][side] for side in ("encoder", "decoder"))
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def test_bfloat16_is_near_float32_and_float16_is_refused_for_t5_alone(
    path: str, kind: str, sequences: list[FiDSequence]
) -> None:
    objective = FiDLikelihood(*load_encoder_decoder(path, FLAGS)).eval()
    exact = loss(objective, sequences)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert loss(objective, sequences) == pytest.approx(exact, rel=0.02)
    refuse_overflow(objective.fid.model, torch.bfloat16)
    if kind == "t5":
        with pytest.raises(UserError, match="--fp16 true: T5's activations exceed"):
            refuse_overflow(objective.fid.model, torch.float16)
    else:
        refuse_overflow(objective.fid.model, torch.float16)


def test_a_model_that_cannot_take_what_is_asked_is_refused(encoder_path: str, bart_path: str, lm_path: str) -> None:
    for path, flags, message in (
        (f"bert::{encoder_path}", Flags(), r"--max_encoder_seq_length 512: .* takes at most 64 tokens"),
        (bart_path, Flags(max_encoder_seq_length=128), r"--max_decoder_seq_length 256: .* takes at most 128 tokens"),
        (lm_path, FLAGS, "cannot be loaded"),
        (f"bert::{lm_path}", FLAGS, r"the tokenizer lacks \[CLS\]"),
    ):
        with pytest.raises(UserError, match=message):
            load_encoder_decoder(path, flags)


def test_a_warm_started_decoder_begins_with_what_the_checkpoint_has(encoder_path: str, tmp_path: Path) -> None:
    model, _ = load_encoder_decoder(f"bert::{encoder_path}", FLAGS)
    decoder = model.get_decoder()
    layers = [layer for layer in decoder.modules() if hasattr(layer, "crossattention")]
    assert len(layers) == model.config.decoder.num_hidden_layers
    for layer in layers:  # it attends to passages as to its own text
        for name, weight in layer.attention.state_dict().items():
            torch.testing.assert_close(layer.crossattention.state_dict()[name], weight)
    states = 0.3 * torch.randn(50, model.config.decoder.hidden_size)  # as small as final states are
    transformed = decoder.cls.predictions.transform(states)  # a head that was lacking begins as the identity
    wanted = torch.nn.functional.layer_norm(states, states.shape[1:])
    assert torch.cosine_similarity(transformed, wanted).min() > 0.99
    new = {name for name, _ in decoder.named_parameters() if re.search(NEW_LAYERS, name)}
    assert new == {name for name, _ in decoder.named_parameters() if "crossattention." in name or ".transform." in name
                   or name == "cls.predictions.bias"}  # fmt: skip
    whole = BertForMaskedLM(BertConfig.from_pretrained(encoder_path))
    whole.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(encoder_path).save_pretrained(tmp_path)
    model, _ = load_encoder_decoder(f"bert::{tmp_path}", FLAGS)
    kept = model.get_decoder().cls.predictions.transform.state_dict()
    for name, weight in whole.cls.predictions.transform.state_dict().items():
        torch.testing.assert_close(kept[name], weight)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"num_beams": 0}, "--num_beams 0: must be at least 1"),
        ({"temperature": 0.0}, "--temperature 0.0: must be above 0"),
        ({"top_p": 1.5}, "--top_p 1.5: must be above 0"),
        ({"top_p": 0.5}, "--temperature and --top_p need --do_sample true"),
    ],
)
def test_impossible_generation_flags_are_refused(flags: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        GenerationArguments(**flags)


# ---------------------------------------------------------------- cross-attention


@pytest.fixture
def model(kind: str, objective: FiDLikelihood) -> PreTrainedModel:
    """With scores that differ from passage to passage."""
    with torch.no_grad():
        for parameter in objective.fid.model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(0.5 if kind == "t5" else 4.0)
    return objective.fid.model


def scores(objective: FiDLikelihood, sequences: Sequence[FiDSequence], kind: str = "plain") -> Tensor:
    return passage_scores(objective.fid.model, objective.batch(sequences), kind)


def by_hand(model: PreTrainedModel, sequence: FiDSequence, kind: str) -> Tensor:
    """Q_0 . K of each layer from the states that its projections were given, one head after the other. -> [K]"""
    model = copy.deepcopy(model)
    model.set_attn_implementation("eager")
    given: list[tuple[list[Tensor], int]] = []
    names = {"EncDecAttention": ("q", "k", "v", "n_heads"), "encoder_attn": ("q_proj", "k_proj", "v_proj", "num_heads"),
             "crossattention.self": ("query", "key", "value", "num_attention_heads")}  # fmt: skip
    for name, module in model.get_decoder().named_modules():
        for end, (*projections, heads) in names.items():
            if name.endswith(end):
                given.append(([], getattr(module, heads)))
                for part in projections:
                    getattr(module, part).register_forward_hook(
                        lambda module, args, output, kept=given[-1][0]: kept.append(output[0])
                    )
    assert len(given) == 2
    states = naive_states(model, sequence)
    model(encoder_outputs=states, decoder_input_ids=torch.tensor([[start_token(model)]]), use_cache=False)
    total = torch.zeros(states.last_hidden_state.shape[1], dtype=torch.float64)
    for (query, key, value), heads in given:
        width = query.shape[-1] // heads
        scale = 1.0 if model.config.model_type == "t5" else width**-0.5
        for head in range(heads):
            part = slice(head * width, (head + 1) * width)
            products = key[:, part] @ query[0, part] * scale  # [S]
            norm = value[:, part].norm(dim=-1)
            total += (products.softmax(0) * norm if kind == "value_norm" else products) / heads / len(given)
    return torch.stack([part.mean() for part in total.split([len(ids) for ids in sequence.passages])])


@pytest.mark.parametrize("score", ["plain", "value_norm"])
def test_scores_are_the_models_own_projections_multiplied_by_hand(
    score: str, objective: FiDLikelihood, model: PreTrainedModel, sequences: list[FiDSequence]
) -> None:
    expected = [by_hand(model, sequence, score) for sequence in sequences]
    observe(model)
    for row, one in zip(scores(objective, sequences, score), expected, strict=True):
        torch.testing.assert_close(row[: len(one)].double(), one, rtol=1e-4, atol=1e-5)
        assert (row[len(one) :] == ABSENT).all()
    assert float(expected[-1].detach().std()) > 1e-4


def test_a_score_depends_on_the_passages_beside_it_but_not_on_padding_or_their_order(
    objective: FiDLikelihood, model: PreTrainedModel, sequences: list[FiDSequence]
) -> None:
    observe(model)
    together = scores(objective, sequences)
    for row, sequence in zip(together, sequences, strict=True):
        alone = scores(objective, [sequence])[0]
        torch.testing.assert_close(row[: len(alone)], alone, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(scores(objective, turned(sequences))[3], together[3].flip(0), rtol=1e-4, atol=1e-5)
    part = scores(objective, [FiDSequence(sequences[3].passages[:2], [])])[0]
    assert (together[3, :2] - part).abs().max() > 1e-5


def test_observing_changes_no_output(
    objective: FiDLikelihood, model: PreTrainedModel, sequences: list[FiDSequence]
) -> None:
    decoder = {"decoder_input_ids": torch.tensor([[start_token(model), 5, 6]])}
    inputs = {"input_ids": torch.tensor([sequences[0].passages[0]])} | decoder
    before = model(**inputs).logits
    observe(model)
    torch.testing.assert_close(model(**inputs).logits, before)
    scores(objective, sequences)
    torch.testing.assert_close(model(**inputs).logits, before)


def test_means_are_over_each_passages_real_tokens() -> None:
    values = torch.tensor([[1.0, 3.0, 10.0, 20.0, 60.0], [5.0, ABSENT, ABSENT, ABSENT, ABSENT]])
    owners = torch.tensor([[0, 0, 1, 1, 1], [0, -1, -1, -1, -1]])
    assert mean_by_owner(values, owners).tolist() == [[2.0, 30.0], [5.0, ABSENT]]
