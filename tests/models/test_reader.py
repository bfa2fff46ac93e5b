"""Batched generation against one prompt at a time."""

import logging
import math
import random
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
import pytest
from torch import Tensor
from torch.nn.functional import dropout
from transformers import AutoModelForCausalLM, GenerationConfig, TemperatureLogitsWarper, TopPLogitsWarper

from rqa.data import Document, Example
from rqa.models import reader as reading
from rqa.models.loading import load_causal_lm, load_tokenizer
from rqa.models.reader import CausalLMReader, GenerationArguments
from rqa.prompts import PromptArguments, Prompter
from rqa.runtime.errors import UserError

NEW_TOKENS = 8
_GREEDY: dict[tuple[int, ...], list[int]] = {}
both_formats = pytest.mark.parametrize("case", ["prefix", "template"], indirect=True)


class Case:
    """A reader, the model that it answers with as `transformers` loads it, and prompts of many lengths, in no order."""

    def __init__(self, path: str, prompter: Prompter, examples: list[Example], documents: list[Document]):
        self.reader = CausalLMReader(load_causal_lm(path), prompter)
        self.theirs = AutoModelForCausalLM.from_pretrained(path, attn_implementation="sdpa").eval()
        self.examples, self.passages = examples[:6], [documents[: (5 * i) % 4] for i in range(6)]
        self.prompts = [prompter.encode(*pair).ids for pair in zip(self.examples, self.passages, strict=True)]

    def greedy(self, prompt: Sequence[int], stop: Sequence[int] = ()) -> list[int]:
        """The likeliest next token, again and again, without cache, batch or `generate`; up to a stop token."""
        ids = list(prompt)
        if tuple(prompt) not in _GREEDY:
            for _ in range(NEW_TOKENS):
                with torch.no_grad():
                    ids.append(int(self.theirs(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
            _GREEDY[tuple(prompt)] = ids[len(prompt) :]
        found = _GREEDY[tuple(prompt)]
        return found[: next((i for i, token in enumerate(found) if token in stop), len(found))]

    @property
    def expected(self) -> list[list[int]]:
        return [self.greedy(prompt, self.reader.prompter.stop_ids) for prompt in self.prompts]


@pytest.fixture
def case(request: pytest.FixtureRequest, lm_path: str, examples: list[Example], documents: list[Document]) -> Case:
    style = getattr(request, "param", "prefix")
    flags = PromptArguments(chat_format=style, max_seq_length=256, max_new_tokens=NEW_TOKENS)
    return Case(lm_path, Prompter(load_tokenizer(lm_path), flags), examples, documents)


@both_formats
def test_a_batch_generates_what_one_prompt_at_a_time_does_without_the_dropout_of_training(case: Case) -> None:
    assert len({len(prompt) for prompt in case.prompts}) >= 4
    expected, model = case.expected, case.reader.model.train()
    model.model.norm.register_forward_hook(lambda module, _, states: dropout(states, 0.5, module.training))
    assert case.reader.generate(case.prompts) == expected
    assert all(module.training for module in model.modules())
    assert case.reader.generate(case.prompts[:1]) == expected[:1]
    assert len({tuple(ids) for ids in expected}) > 1


@both_formats
def test_generation_ends_at_any_stop_token_and_leaves_it_out(case: Case) -> None:
    free = [case.greedy(prompt) for prompt in case.prompts]
    for stop in ([free[0][3]], sorted({free[0][3], free[1][1]}), [free[2][0]]):
        case.reader.prompter.stop_ids = stop
        ours = case.reader.generate(case.prompts)
        assert ours == case.expected
        assert min(map(len, ours)) < NEW_TOKENS
    steps = []
    case.reader.model.lm_head.register_forward_hook(lambda *_: steps.append(1))
    case.reader.prompter.stop_ids = [free[0][2]]
    assert len(case.reader.generate(case.prompts[:1])[0]) + 1 == len(steps)  # and then no step is made any more


def test_a_step_that_a_graph_repeats_gives_the_same_answers(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph starts from the first step's inputs at the addresses that it was captured with, and is looked at late."""
    replays = []

    def in_graph(step: Callable[[], None]) -> Callable[[], None]:
        step()
        return lambda: replays.append(step())

    monkeypatch.setattr(reading, "in_graph", in_graph)
    case.reader.captures = True
    assert case.reader.generate(case.prompts) == case.expected
    assert len(replays) == NEW_TOKENS - 1
    case.reader.prompter.stop_ids = [case.greedy(case.prompts[0])[3], case.greedy(case.prompts[1])[1]]
    assert case.reader.generate(case.prompts) == case.expected


def test_a_step_that_cannot_be_captured_is_made_without_a_graph(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    state = {"stream": "main", "mode": 0}
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: state["stream"])
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: state.update(stream=stream))
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: state["mode"])
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: state.update(mode=mode))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay="replay"))

    @contextmanager
    def graph(graph: SimpleNamespace, **options: str) -> Iterator[None]:
        state["stream"] = "of the capture"  # and a capture that fails leaves it there
        yield
        state["stream"] = "main"

    def step() -> None:
        if state == fails_in:
            raise RuntimeError("not permitted")

    monkeypatch.setattr(torch.cuda, "graph", graph)
    for fails_in in ({"stream": "main", "mode": "error"}, {"stream": "of the capture", "mode": 0}, {}):
        assert reading.in_graph(step) == (step if fails_in else "replay")
        assert state == {"stream": "main", "mode": 0}
    assert len([message for message in caplog.messages if "not permitted" in message]) == 2


def test_tokens_are_sampled_as_often_as_temperature_and_top_p_say() -> None:
    logits, draws = torch.tensor([[0.0, 2.0, 1.0, 0.5, -1.0, 1.9]]), 20000
    for temperature, top_p in ((1.0, 1.0), (2.0, 0.7), (0.5, 0.9)):
        flags = GenerationArguments(do_sample=True, temperature=temperature, top_p=top_p)
        drawn = flags.next_tokens(logits.expand(draws, -1)).bincount(minlength=6) / draws
        warped = TemperatureLogitsWarper(temperature)(None, logits) if temperature != 1 else logits
        expected = TopPLogitsWarper(top_p)(None, warped).softmax(-1)[0]
        assert (drawn == 0).tolist() == (expected == 0).tolist()
        torch.testing.assert_close(drawn, expected, atol=0.015, rtol=0)


def test_decoding_is_greedy_whatever_the_checkpoint_prefers(case: Case) -> None:
    reader, likeliest = case.reader, case.expected[0][0]
    reader.flags = GenerationArguments(num_beams=2)
    beams = reader.generate(case.prompts)
    theirs = GenerationConfig(
        do_sample=True, temperature=5.0, top_p=0.9, max_length=20, num_beams=3, repetition_penalty=3.0, min_length=50,
        no_repeat_ngram_size=1, max_time=1e-9, suppress_tokens=[likeliest], begin_suppress_tokens=[likeliest],
        sequence_bias=[[[likeliest], -9.0]], bad_words_ids=[[likeliest]], length_penalty=-5.0, early_stopping=True,
        guidance_scale=3.0, forced_eos_token_id=5, num_return_sequences=2, return_dict_in_generate=True, min_p=0.9,
    )  # fmt: skip
    reader.model.generation_config = theirs
    assert reader.generate(case.prompts) == beams
    assert reader.model.generation_config is theirs  # which is saved with the model
    reader.flags = GenerationArguments()
    assert reader.generate(case.prompts) == case.expected
    vars(reader)["_reach"] = None  # as of a model that cannot be packed
    assert reader.generate(case.prompts) == case.expected


@pytest.mark.parametrize("way", [{}, {"do_sample": True}, {"num_beams": 3}, {"fallback": True}], ids=str)
def test_an_answer_from_numbers_that_are_not_finite_is_refused_by_model_and_question(
    way: dict[str, Any], case: Case
) -> None:
    reader, steps = case.reader, [0]
    if fallback := "fallback" in way:
        vars(reader)["_reach"] = None
    reader.flags = GenerationArguments(**{} if fallback else way)

    def spoil(module: torch.nn.Module, _: Any, logits: Tensor) -> Tensor:
        steps[0] += 1
        logits[..., 0] = -math.inf  # as of padding in the vocabulary
        if steps[0] == late:
            logits[..., -1:, :, 3] = value  # of the last question of a greedy step's batch
        return logits

    reader.model.lm_head.register_forward_hook(spoil)
    late, value = 0, 0.0
    assert len(reader.answer(case.examples, case.passages)) == 6
    for late, value in ((1, math.nan), (5, math.nan), (2, math.inf)):  # noqa: B007
        steps[0] = 0
        with pytest.raises(UserError, match=f"model {reader.model.name_or_path}: the answer of .* is not finite"):
            reader.answer(case.examples, case.passages)


def test_an_answer_is_cut_that_has_all_tokens_it_may_have_and_no_end(case: Case) -> None:
    whole, answers = case.expected, case.reader.answer(case.examples, case.passages)
    case.reader.prompter.stop_ids = [case.greedy(case.prompts[0])[3]]
    answers += case.reader.answer(case.examples[:1], case.passages[:1])
    assert [answer.cut for answer in answers] == [*(len(ids) == NEW_TOKENS for ids in whole), False]
    assert {answer.cut for answer in answers} == {True, False}


def test_answers_come_back_in_the_order_asked_from_batches_as_large_as_allowed(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, order, asked = case.reader, random.Random(1).sample(range(6), 6), []
    texts = [reader.prompter.decode(ids) for ids in case.expected]
    assert len(set(texts)) > 1
    generate = reader.generate
    monkeypatch.setattr(reader, "generate", lambda prompts: asked.append(prompts) or generate(prompts))
    for budget, sizes in ((1, {1}), (300, {1, 2, 3}), (16384, {6})):
        reader.flags = GenerationArguments(generation_batch_tokens=budget)
        asked.clear()
        answers = reader.answer([case.examples[i] for i in order], [case.passages[i] for i in order])
        assert [answer.text for answer in answers] == [texts[i] for i in order]
        assert {answer.batch_size for answer in answers} == {len(prompts) for prompts in asked} == sizes
        assert all(answer.seconds > 0 for answer in answers)
        for prompts in asked:  # padding counts
            assert len(prompts) == 1 or len(prompts) * (max(map(len, prompts)) + NEW_TOKENS) <= budget
    assert reader.answer([], []) == []


def test_a_question_that_does_not_fit_is_logged_and_gets_an_empty_answer(
    case: Case, caplog: pytest.LogCaptureFixture
) -> None:
    long, some = Example("Why is that so? " * 200, where="test.jsonl:9"), case.examples

    def texts(asked: list[Example]) -> list[str]:
        return [answer.text for answer in case.reader.answer(asked, [case.passages[1]] * len(asked))]

    alone = texts(some)
    with caplog.at_level(logging.WARNING, logger="rqa"):
        assert texts([long]) == [""]
        assert texts([*some[:2], long, *some[2:]]) == [*alone[:2], "", *alone[2:]]
    (message,) = {record.getMessage() for record in caplog.records if record.name.startswith("rqa")}
    assert re.match("test.jsonl:9: .*it gets an empty answer", message)
