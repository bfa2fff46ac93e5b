"""Fusion-in-decoder, for T5, BART and a warm-started pair of BERTs: what the plain model gives, and nothing else.

Scores of passages are the model's own cross-attention: queries and keys by its own projections.
"""

import copy
import re
from contextlib import nullcontext
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path

import torch
import pytest
from torch import Tensor, nn
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, BertForMaskedLM, GenerationConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from rqa.data import Document, Example
from rqa.models.encoder_decoder import NEW_LAYERS, FiDReader, FiDSequence, load_encoder_decoder, observe, passage_scores
from rqa.models.reader import GenerationArguments
from rqa.objectives.fid import FiDArguments, FiDLikelihood
from rqa.packing import pack
from rqa.runtime.errors import UserError
from rqa.runtime.parallelize import parallelize

Flags = partial(FiDArguments, embedding_model="bm25")
FLAGS = Flags(dtype="float32", max_encoder_seq_length=64, max_decoder_seq_length=24)


class Case:
    """A reader without dropout, in float64, with weights so large that passages matter, and what it is asked."""

    def __init__(self, kind: str, path: str, directory: Path, examples: list[Example], documents: list[Document]):
        self.kind, self.path, self.directory = kind, path, directory
        self.model, prompter = load_encoder_decoder(path, FLAGS)
        with torch.no_grad():
            for parameter in self.model.parameters():
                if parameter.ndim == 2:
                    parameter.mul_(3.0 if kind == "t5" else 12.0)
        self.objective = FiDLikelihood(self.model.double().eval(), prompter)
        texts = [*documents[:3], Document(documents[4].page_content + " " + documents[5].page_content)]
        asked = enumerate(examples[:4], start=1)  # over 1 to 4 passages of different lengths
        self.sequences = [prompter.encode(example, texts[:n], example.gold_answer) for n, example in asked]

    @cached_property
    def plain(self) -> PreTrainedModel:
        """What `transformers` alone loads from the saved checkpoint."""
        self.objective.save_pretrained(self.directory)
        return AutoModelForSeq2SeqLM.from_pretrained(self.directory, attn_implementation="eager").double().eval()

    def loss(self, sequences: list[FiDSequence]) -> float:
        return float(self.objective(self.objective.batch(sequences))[0].detach())

    def reader(self, **flags: object) -> FiDReader:
        ours = self.objective
        return FiDReader(ours.fid, ours.prompter, GenerationArguments(**flags))

    def scores(self, sequences: list[FiDSequence], kind: str = "plain") -> Tensor:
        return passage_scores(self.model, self.objective.batch(sequences), kind)


@pytest.fixture(params=["t5", "bart", "bert"])
def case(request: pytest.FixtureRequest, tmp_path: Path, examples: list[Example], documents: list[Document]) -> Case:
    kind, get = request.param, request.getfixturevalue
    path = f"bert::{get('encoder_path')}" if kind == "bert" else get(f"{kind}_path")
    return Case(kind, path, tmp_path, examples, documents)


def turned(sequences: list[FiDSequence]) -> list[FiDSequence]:
    return [FiDSequence(sequence.passages[::-1], sequence.answer) for sequence in sequences]


def naive_states(plain: PreTrainedModel, sequence: FiDSequence) -> BaseModelOutput:
    """One passage after the other, nothing padded."""
    states = [plain.get_encoder()(input_ids=torch.tensor([ids])).last_hidden_state for ids in sequence.passages]
    return BaseModelOutput(last_hidden_state=torch.cat(states, dim=1))


def start_of(model: PreTrainedModel) -> int:
    return model.generation_config.decoder_start_token_id or model.config.decoder_start_token_id


def naive_loss(plain: PreTrainedModel, sequence: FiDSequence) -> Tensor:
    inputs = torch.tensor([[start_of(plain), *sequence.answer[:-1]]])
    logits = plain(encoder_outputs=naive_states(plain, sequence), decoder_input_ids=inputs).logits[0]
    return -logits.log_softmax(-1)[range(len(sequence.answer)), sequence.answer].sum()


def test_the_loss_and_its_gradient_are_those_of_one_passage_at_a_time(case: Case) -> None:
    one = case.sequences[0]
    theirs = case.plain(input_ids=torch.tensor(one.passages), labels=torch.tensor([one.answer])).loss
    assert case.loss([one]) / len(one.answer) == pytest.approx(float(theirs.detach()), rel=1e-6)
    ours = case.objective(case.objective.batch(case.sequences))[0]
    theirs = torch.stack([naive_loss(case.plain, sequence) for sequence in case.sequences]).sum()
    assert float(ours.detach()) == pytest.approx(float(theirs.detach()), rel=1e-6)
    ours.backward()
    theirs.backward()
    expected = {name: parameter.grad for name, parameter in case.plain.named_parameters()}
    largest = max(float(gradient.abs().max()) for gradient in expected.values() if gradient is not None)
    for name, parameter in case.model.named_parameters():
        if "pooler" not in name:  # the loss is taken in float32
            assert (parameter.grad - expected[name]).abs().max() <= 1e-5 * largest, name


def test_all_passages_decide_the_loss_in_any_order_and_little_is_padded(case: Case) -> None:
    together = case.loss(case.sequences)
    assert case.loss(turned(case.sequences)) == pytest.approx(together, rel=1e-6)
    other = [FiDSequence(sequence.passages[:1], sequence.answer) for sequence in case.sequences]
    assert abs(case.loss(other) - together) > 1e-3
    batch = case.objective.batch(case.sequences, [7, 5, 6, 9])
    assert batch.indices == (7, 5, 6, 9)
    assert batch.weight == sum(len(sequence.answer) for sequence in case.sequences)
    assert batch.num_tokens == batch.weight + sum(len(ids) for s in case.sequences for ids in s.passages)
    assert (case.objective.fid.collate is pack) == (case.kind == "bert")
    for part in batch.parts:  # a passage is padded by a quarter at most
        width = part.inputs["input_ids"].numel() // len(part.lengths)
        assert int(part.lengths.min()) >= 0.8 * width or case.kind == "bert"


def test_generation_is_that_of_the_plain_model_over_all_passages(case: Case) -> None:
    end, plain = case.objective.prompter.end_token, case.plain  # saved before the checkpoint's own wishes, below
    wishes = {"suppress_tokens": [*range(9, 30)], "min_length": 9, "max_time": 1e-9, "decoder_start_token_id": 7}
    case.model.generation_config.update(**wishes, forced_bos_token_id=8, length_penalty=-5.0, no_repeat_ngram_size=1)
    for beams in (1, 3):
        answers = case.reader(num_beams=beams).generate(case.sequences)
        config = GenerationConfig(max_new_tokens=24, num_beams=beams, eos_token_id=end, pad_token_id=end)
        for ours, sequence in zip(answers, case.sequences, strict=True):
            states = naive_states(plain, sequence)
            mask = torch.ones(states.last_hidden_state.shape[:2], dtype=torch.long)
            output = plain.generate(encoder_outputs=states, attention_mask=mask, generation_config=config)
            theirs = output[0, 1:].tolist()
            assert ours == (theirs[: theirs.index(end)] if end in theirs else theirs)


def test_an_answer_that_is_not_finite_is_refused_by_model_and_question(
    case: Case, examples: list[Example], documents: list[Document]
) -> None:
    case.model.get_output_embeddings().weight.data[3] = torch.nan
    for flags in ({}, {"num_beams": 2}, {"do_sample": True}):
        asked = re.escape(repr(examples[0].question[:60]))
        with pytest.raises(UserError, match=f"model .*{case.path.removeprefix('bert::')}: the answer of {asked}"):
            case.reader(**flags).answer(examples[:1], [documents[:2]])


def test_sampling_draws_and_with_a_narrow_nucleus_is_greedy(case: Case) -> None:
    greedy = case.reader().generate(case.sequences)
    assert case.reader(do_sample=True, top_p=1e-6).generate(case.sequences) == greedy
    assert case.reader(do_sample=True, temperature=5.0).generate(case.sequences) != greedy


def test_passages_are_encoded_once_and_questions_answered_in_their_order(
    case: Case, examples: list[Example], documents: list[Document]
) -> None:
    reader, tokens = case.reader(num_beams=2), []
    pairs = list(zip(examples[:3], [documents[:3], documents[3:4], []], strict=True))
    case.model.get_encoder().register_forward_hook(
        lambda module, args, kwargs, output: tokens.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    answers = [answer.text for answer in reader.answer(*zip(*pairs, strict=True))]
    lengths = [len(ids) for pair in pairs for ids in case.objective.prompter.encode(*pair).passages]
    assert sum(lengths) <= sum(tokens) <= 1.25 * sum(lengths)
    assert [reader.answer([example], [read])[0].text for example, read in pairs] == answers


def test_gradient_checkpointing_recomputes_encoder_and_decoder_and_changes_no_gradient(case: Case) -> None:
    gradients, calls = [], []
    for checkpointing in (False, True):
        torch.manual_seed(5)
        model, prompter = load_encoder_decoder(case.path, FLAGS)
        objective = FiDLikelihood(model, prompter)
        parallelize(objective, checkpointing, compile=False, shard=False, dtype=torch.float32)
        objective.train()
        count = dict.fromkeys(("encoder", "decoder"), 0)
        for side in count:
            stack = getattr(model, f"get_{side}")()
            first = next(m for m in stack.modules() if isinstance(m, nn.ModuleList))[0]
            norm = next(m for m in first.modules() if "Norm" in type(m).__name__)
            norm.register_forward_hook(lambda *_, side=side, count=count: count.update({side: count[side] + 1}))
        torch.manual_seed(6)
        objective(objective.batch(case.sequences))[0].backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        calls.append(count)
    assert all(calls[1][side] == 2 * calls[0][side] for side in ("encoder", "decoder"))
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def test_bfloat16_is_near_float32_and_float16_is_refused_for_t5_alone(case: Case) -> None:
    wide, low = (FiDLikelihood(*load_encoder_decoder(case.path, replace(FLAGS, dtype=name))).eval()
                 for name in ("float32", "bfloat16"))  # fmt: skip
    batch = wide.batch(case.sequences)
    assert float(low(batch)[0].detach()) == pytest.approx(float(wide(batch)[0].detach()), rel=0.02)
    refused = pytest.raises(UserError, match="--fp16 true: T5's activations overflow")
    for dtype in (torch.bfloat16, torch.float16):
        with refused if case.kind == "t5" and dtype is torch.float16 else nullcontext():
            load_encoder_decoder(case.path, type("Mixed", (FiDArguments,), {"precision": dtype})(**vars(FLAGS)))


def test_what_a_model_has_no_positions_for_is_cut_and_what_it_cannot_be_is_refused(
    encoder_path: str, bart_path: str, lm_path: str, caplog: pytest.LogCaptureFixture
) -> None:
    for path, limit in ((f"bert::{encoder_path}", 64), (bart_path, 128)):
        arguments = load_encoder_decoder(path, Flags())[1].arguments
        assert (arguments.max_encoder_seq_length, arguments.max_decoder_seq_length) == (limit, limit)
        assert f"is lowered to {limit} tokens" in caplog.text
    for path, flags, message in (
        (lm_path, FLAGS, "cannot be loaded"),
        (f"bert::{lm_path}", FLAGS, r"the tokenizer lacks \[CLS\]"),
    ):
        with pytest.raises(UserError, match=message):
            load_encoder_decoder(path, flags)


def test_a_warm_started_decoder_begins_with_what_the_checkpoint_has(encoder_path: str, tmp_path: Path) -> None:
    decoder = load_encoder_decoder(f"bert::{encoder_path}", FLAGS)[0].get_decoder()
    layers = [layer for layer in decoder.modules() if hasattr(layer, "crossattention")]
    assert len(layers) == decoder.config.num_hidden_layers
    for layer in layers:  # it attends to passages as to its own text
        for name, weight in layer.attention.state_dict().items():
            torch.testing.assert_close(layer.crossattention.state_dict()[name], weight)
    states = 0.3 * torch.randn(50, decoder.config.hidden_size)  # as small as final states are
    transformed = decoder.cls.predictions.transform(states)  # a head that was lacking begins as the identity
    wanted = torch.nn.functional.layer_norm(states, states.shape[1:])
    assert torch.cosine_similarity(transformed, wanted).min() > 0.99
    made = [name for name, _ in decoder.named_parameters() if re.search("crossattention|transform|cls.*bias", name)]
    assert made == [name for name, _ in decoder.named_parameters() if re.search(NEW_LAYERS, name)]
    whole = BertForMaskedLM.from_pretrained(encoder_path)
    whole.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(encoder_path).save_pretrained(tmp_path)
    decoder = load_encoder_decoder(f"bert::{tmp_path}", FLAGS)[0].get_decoder()
    kept = decoder.cls.predictions.transform.state_dict()
    for name, weight in whole.cls.predictions.transform.state_dict().items():
        torch.testing.assert_close(kept[name], weight)


def by_hand(model: PreTrainedModel, sequence: FiDSequence, kind: str) -> Tensor:
    """Q_0 . K of each layer from the states that its projections were given, one head after the other. -> [K]"""
    model = copy.deepcopy(model)
    model.set_attn_implementation("eager")
    names = {"EncDecAttention": ("q", "k", "v", "n_heads"), "encoder_attn": ("q_proj", "k_proj", "v_proj", "num_heads"),
             "crossattention.self": ("query", "key", "value", "num_attention_heads")}  # fmt: skip
    given: list[tuple[list[Tensor], int]] = []
    for name, module in model.get_decoder().named_modules():
        for *projections, heads in [parts for end, parts in names.items() if name.endswith(end)]:
            given.append(([], getattr(module, heads)))
            for part in projections:
                hook = lambda _, args, output, states=given[-1][0]: states.append(output[0])  # noqa: E731
                getattr(module, part).register_forward_hook(hook)
    assert len(given) == 2
    read = naive_states(model, sequence)
    model(encoder_outputs=read, decoder_input_ids=torch.tensor([[start_of(model)]]), use_cache=False)
    total = torch.zeros(read.last_hidden_state.shape[1], dtype=torch.float64)
    for (query, key, value), heads in given:
        width = query.shape[-1] // heads
        scale = 1.0 if model.config.model_type == "t5" else width**-0.5
        for head in range(heads):
            part = slice(head * width, (head + 1) * width)
            scores = key[:, part] @ query[0, part] * scale  # [S]
            norm = value[:, part].norm(dim=-1)
            total += (scores.softmax(0) * norm if kind == "value_norm" else scores) / heads / len(given)
    return torch.stack([part.mean() for part in total.split([len(ids) for ids in sequence.passages])])


@pytest.mark.parametrize("kind", ["plain", "value_norm"])
def test_scores_are_the_models_own_projections_multiplied_by_hand(kind: str, case: Case) -> None:
    expected = [by_hand(case.model, sequence, kind) for sequence in case.sequences]
    observe(case.model)
    for row, one in zip(case.scores(case.sequences, kind), expected, strict=True):
        torch.testing.assert_close(row[: len(one)].double(), one, rtol=1e-4, atol=1e-5)
        assert (row[len(one) :] == float("-inf")).all()
    assert float(expected[-1].detach().std()) > 1e-4


def test_a_score_depends_on_the_passages_beside_it_but_not_on_their_order_and_changes_no_loss(case: Case) -> None:
    before = case.loss(case.sequences)
    observe(case.model)
    together = case.scores(case.sequences)
    assert case.loss(case.sequences) == pytest.approx(before, rel=1e-6)
    torch.testing.assert_close(case.scores(turned(case.sequences))[3], together[3].flip(0), rtol=1e-4, atol=1e-5)
    part = case.scores([FiDSequence(case.sequences[3].passages[:2], [])])[0]
    assert (together[3, :2] - part).abs().max() > 1e-5
