"""Fusion-in-decoder, for T5, BART and a warm-started pair of BERTs: what the plain model gives, and nothing else."""

from collections.abc import Callable, Sequence
from pathlib import Path

from dataclasses import dataclass
import torch
import pytest
from torch import Tensor
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
from rqa.models.encoder_decoder import FiDReader, load_encoder_decoder, refuse_overflow
from rqa.models.reader import GenerationArguments
from rqa.objectives.fid import FusionLikelihood
from rqa.packing import pack
from rqa.models.encoder_decoder import EncoderDecoderArguments
from rqa.prompts import FiDPromptArguments, FiDSequence
from rqa.runtime.errors import UserError
from rqa.runtime.parallelize import parallelize

@dataclass(kw_only=True)
class Flags(EncoderDecoderArguments, FiDPromptArguments):
    """x"""


ARGUMENTS = Flags(max_encoder_seq_length=64, max_decoder_seq_length=24)
Load = Callable[..., FusionLikelihood]


@pytest.fixture(params=["t5", "bart", "bert"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def path(kind: str, t5_path: str, bart_path: str, encoder_path: str) -> str:
    return {"t5": t5_path, "bart": bart_path, "bert": f"bert::{encoder_path}"}[kind]


@pytest.fixture
def objective(path: str) -> FusionLikelihood:
    """Without dropout, in float64, with weights large enough that passages matter."""
    model, prompter = load_encoder_decoder(path, ARGUMENTS)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(3.0)
    return FusionLikelihood(model.double().eval(), prompter)


@pytest.fixture
def plain(objective: FusionLikelihood, tmp_path: Path) -> PreTrainedModel:
    """What `transformers` alone loads from the saved checkpoint."""
    objective.save_pretrained(tmp_path / "saved")
    return AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "saved", attn_implementation="eager").double().eval()


@pytest.fixture
def sequences(
    objective: FusionLikelihood, examples: Sequence[Example], documents: Sequence[Document]
) -> list[FiDSequence]:
    """Four questions over 1 to 4 passages of different lengths."""
    texts = [*documents[:3], Document(documents[4].page_content + " " + documents[5].page_content)]
    encode = objective.prompter.encode
    return [encode(example, texts[: n + 1], example.gold_answer) for n, example in enumerate(examples[:4])]


def loss(objective: FusionLikelihood, sequences: Sequence[FiDSequence]) -> float:
    return float(objective(objective.batch(sequences))[0].detach())


def naive_states(plain: PreTrainedModel, sequence: FiDSequence) -> BaseModelOutput:
    encoder = plain.get_encoder()
    states = [encoder(input_ids=torch.tensor([ids])).last_hidden_state for ids in sequence.passages]
    return BaseModelOutput(last_hidden_state=torch.cat(states, dim=1))


def naive_loss(plain: PreTrainedModel, sequence: FiDSequence) -> Tensor:
    """One passage after the other, nothing padded."""
    start = plain.generation_config.decoder_start_token_id or plain.config.decoder_start_token_id
    inputs = torch.tensor([[start, *sequence.answer[:-1]]])
    logits = plain(encoder_outputs=naive_states(plain, sequence), decoder_input_ids=inputs).logits[0]
    return -logits.log_softmax(-1)[range(len(sequence.answer)), sequence.answer].sum()


def test_with_one_passage_the_loss_is_the_plain_models(
    objective: FusionLikelihood, plain: PreTrainedModel, sequences: list[FiDSequence]
) -> None:
    (one,) = [sequence for sequence in sequences if len(sequence.passages) == 1]
    theirs = plain(input_ids=torch.tensor(one.passages), labels=torch.tensor([one.answer])).loss
    assert loss(objective, [one]) / len(one.answer) == pytest.approx(float(theirs.detach()), rel=1e-6)


def test_the_loss_and_its_gradient_are_those_of_one_passage_at_a_time(
    objective: FusionLikelihood, plain: PreTrainedModel, sequences: list[FiDSequence]
) -> None:
    ours = objective(objective.batch(sequences))[0]
    theirs = torch.stack([naive_loss(plain, sequence) for sequence in sequences]).sum()
    assert float(ours.detach()) == pytest.approx(float(theirs.detach()), rel=1e-6)
    ours.backward()
    theirs.backward()
    expected = {name: parameter.grad for name, parameter in plain.named_parameters()}
    largest = max(float(gradient.abs().max()) for gradient in expected.values() if gradient is not None)
    for name, parameter in objective.fusion.model.named_parameters():
        if "pooler" not in name:  # the loss is taken in float32
            assert (parameter.grad - expected[name]).abs().max() <= 1e-5 * largest, name


def test_permuting_passages_permutes_nothing(objective: FusionLikelihood, sequences: list[FiDSequence]) -> None:
    turned = [FiDSequence(sequence.passages[::-1], sequence.answer) for sequence in sequences]
    assert loss(objective, turned) == pytest.approx(loss(objective, sequences), rel=1e-6)
    other = [FiDSequence(sequence.passages[:1], sequence.answer) for sequence in sequences]
    assert abs(loss(objective, other) - loss(objective, sequences)) > 1e-3


def test_another_question_in_the_batch_and_its_padding_change_nothing(
    objective: FusionLikelihood, sequences: list[FiDSequence]
) -> None:
    together = loss(objective, sequences)
    assert together == pytest.approx(sum(loss(objective, [sequence]) for sequence in sequences), rel=1e-6)
    assert together == pytest.approx(loss(objective, sequences[::-1]), rel=1e-6)
    batch = objective.batch(sequences)
    assert batch.weight == sum(len(sequence.answer) for sequence in sequences)
    assert batch.num_tokens == batch.weight + sum(len(ids) for s in sequences for ids in s.passages)


def test_a_batch_pads_a_passage_by_a_quarter_at_most_and_bert_pads_none(
    objective: FusionLikelihood, kind: str, sequences: list[FiDSequence]
) -> None:
    assert (objective.collate is pack) == (kind == "bert")
    for part in objective.batch(sequences).parts:
        width = part.inputs["input_ids"].numel() // len(part.lengths)
        assert int(part.lengths.min()) >= 0.8 * width or objective.collate is pack


def test_the_saved_checkpoint_is_an_ordinary_one(
    objective: FusionLikelihood, plain: PreTrainedModel, sequences: list[FiDSequence]
) -> None:
    ours = objective.fusion.model.state_dict()
    assert plain.state_dict().keys() == ours.keys()
    for name, weight in plain.state_dict().items():
        torch.testing.assert_close(weight, ours[name].to(weight), msg=name)
    output, embedding = plain.get_output_embeddings().weight, plain.get_decoder().get_input_embeddings().weight
    assert output.data_ptr() == embedding.data_ptr()
    one = {"input_ids": torch.tensor([sequences[3].passages[0]]), "decoder_input_ids": torch.tensor([[2, 5, 6]])}
    torch.testing.assert_close(plain(**one).logits, objective.fusion.model(**one).logits, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("beams", [1, 3])
def test_generation_is_that_of_the_plain_model_over_all_passages(
    beams: int, objective: FusionLikelihood, plain: PreTrainedModel, sequences: list[FiDSequence]
) -> None:
    reader = FiDReader(objective.fusion, objective.prompter, GenerationArguments(num_beams=beams), objective.collate)
    end = objective.prompter.end_token
    config = GenerationConfig(max_new_tokens=24, num_beams=beams, eos_token_id=end, pad_token_id=end)
    for ours, sequence in zip(reader.generate(sequences), sequences, strict=True):
        states = naive_states(plain, sequence)
        mask = torch.ones(states.last_hidden_state.shape[:2], dtype=torch.long)
        theirs = plain.generate(encoder_outputs=states, attention_mask=mask, generation_config=config)[0, 1:].tolist()
        assert ours == (theirs[: theirs.index(end)] if end in theirs else theirs)


def test_sampling_draws_and_with_a_narrow_nucleus_is_greedy(
    objective: FusionLikelihood, sequences: list[FiDSequence]
) -> None:
    def generate(**arguments: object) -> list[list[int]]:
        return FiDReader(
            objective.fusion, objective.prompter, GenerationArguments(**arguments), objective.collate
        ).generate(sequences)

    greedy = generate()
    assert generate(do_sample=True, top_p=1e-6) == greedy
    assert generate(do_sample=True, temperature=5.0) != greedy


def test_passages_are_encoded_once_and_questions_answered_in_their_order(
    objective: FusionLikelihood, examples: list[Example], documents: list[Document]
) -> None:
    reader = FiDReader(objective.fusion, objective.prompter, GenerationArguments(num_beams=2), objective.collate)
    asked, passages = examples[:3], [documents[:3], documents[3:4], []]
    tokens: list[int] = []
    objective.fusion.model.get_encoder().register_forward_hook(
        lambda module, args, kwargs, output: tokens.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    answers = [answer.text for answer in reader.answer(asked, passages, progress=False)]
    prompts = [objective.prompter.encode(*pair) for pair in zip(asked, passages, strict=True)]
    lengths = [len(ids) for prompt in prompts for ids in prompt.passages]
    assert sum(lengths) <= sum(tokens) <= 1.25 * sum(lengths)
    alone = [reader.answer([pair[0]], [pair[1]], progress=False) for pair in zip(asked, passages, strict=True)]
    assert [answer.text for (answer,) in alone] == answers


def test_gradient_checkpointing_recomputes_encoder_and_decoder_and_changes_no_gradient(
    path: str, sequences: list[FiDSequence]
) -> None:
    gradients, calls = [], []
    for checkpointing in (False, True):
        torch.manual_seed(5)
        model, prompter = load_encoder_decoder(path, ARGUMENTS)
        objective = FusionLikelihood(model, prompter)
        parallelize(objective, torch.device("cpu"), checkpointing, compile=False)
        objective.train()
        count = dict.fromkeys(("encoder", "decoder"), 0)
        for side in count:
            stack = getattr(model, f"get_{side}")()
            first = next(m for m in stack.modules() if isinstance(m, torch.nn.ModuleList))[0]
            norm = next(m for m in first.modules() if "Norm" in type(m).__name__)
            norm.register_forward_hook(lambda *_, side=side, count=count: count.update({side: count[side] + 1}))
        torch.manual_seed(6)
        objective(objective.batch(sequences))[0].backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        calls.append(count)
    assert all(calls[1][side] == 2 * calls[0][side] for side in ("encoder", "decoder"))
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def test_bfloat16_is_near_float32(path: str, sequences: list[FiDSequence]) -> None:
    objective = FusionLikelihood(*load_encoder_decoder(path, ARGUMENTS)).eval()
    exact = loss(objective, sequences)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert loss(objective, sequences) == pytest.approx(exact, rel=0.02)


def test_float16_is_refused_for_t5_alone(path: str, kind: str) -> None:
    model, _ = load_encoder_decoder(path, ARGUMENTS)
    refuse_overflow(model, torch.bfloat16)
    if kind == "t5":
        with pytest.raises(UserError, match="--fp16 true: T5's activations exceed"):
            refuse_overflow(model, torch.float16)
    else:
        refuse_overflow(model, torch.float16)


def test_lengths_beyond_the_models_positions_are_refused(encoder_path: str, bart_path: str) -> None:
    with pytest.raises(UserError, match=r"--max_encoder_seq_length 512: .* takes at most 64 tokens"):
        load_encoder_decoder(f"bert::{encoder_path}", Flags())
    with pytest.raises(UserError, match=r"--max_decoder_seq_length 256: .* takes at most 128 tokens"):
        load_encoder_decoder(bart_path, Flags(max_encoder_seq_length=128))


def test_a_warm_started_decoder_attends_to_passages_as_to_its_own_text(encoder_path: str) -> None:
    model, _ = load_encoder_decoder(f"bert::{encoder_path}", ARGUMENTS)
    layers = [layer for layer in model.get_decoder().modules() if hasattr(layer, "crossattention")]
    assert len(layers) == model.config.decoder.num_hidden_layers
    for layer in layers:
        for name, weight in layer.attention.state_dict().items():
            torch.testing.assert_close(layer.crossattention.state_dict()[name], weight)


def test_the_head_that_a_warm_started_decoder_lacked_begins_as_the_identity(encoder_path: str) -> None:
    model, _ = load_encoder_decoder(f"bert::{encoder_path}", ARGUMENTS)
    states = 0.3 * torch.randn(50, model.config.decoder.hidden_size)  # as small as final states are
    transformed = model.get_decoder().cls.predictions.transform(states)
    wanted = torch.nn.functional.layer_norm(states, states.shape[1:])
    assert torch.cosine_similarity(transformed, wanted).min() > 0.99


def test_a_head_that_the_checkpoint_has_is_kept(encoder_path: str, tmp_path: Path) -> None:
    whole = BertForMaskedLM(BertConfig.from_pretrained(encoder_path))
    whole.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(encoder_path).save_pretrained(tmp_path)
    model, _ = load_encoder_decoder(f"bert::{tmp_path}", ARGUMENTS)
    weights = model.get_decoder().cls.predictions.transform.state_dict()
    for name, weight in whole.cls.predictions.transform.state_dict().items():
        torch.testing.assert_close(weights[name], weight)


def test_a_decoder_alone_is_no_encoder_decoder(lm_path: str) -> None:
    with pytest.raises(UserError, match="cannot be loaded"):
        load_encoder_decoder(lm_path, ARGUMENTS)
    with pytest.raises(UserError, match=r"the tokenizer lacks \[CLS\]"):
        load_encoder_decoder(f"bert::{lm_path}", ARGUMENTS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_beams": 0}, "--num_beams 0: must be at least 1"),
        ({"temperature": 0.0}, "--temperature 0.0: must be above 0"),
        ({"top_p": 1.5}, "--top_p 1.5: must be above 0"),
        ({"top_p": 0.5}, "--temperature and --top_p need --do_sample true"),
    ],
)
def test_impossible_generation_flags_are_refused(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        GenerationArguments(**arguments)
