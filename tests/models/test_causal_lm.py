"""Batched generation against one prompt at a time."""

import logging
import random
from collections.abc import Sequence
from dataclasses import replace

import torch
import pytest
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from rqa.data import Document, Example
from rqa.models.causal_lm import load_causal_lm
from rqa.models.reader import CausalLMReader
from rqa.prompts import PromptArguments, Prompter

NEW_TOKENS = 8
_GREEDY: dict[tuple[int, ...], list[int]] = {}
both_formats = pytest.mark.parametrize("prompter", ["prefix", "template"], indirect=True)


@pytest.fixture(scope="module")
def theirs(lm_path: str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(lm_path, attn_implementation="sdpa").eval()


@pytest.fixture
def prompter(request: pytest.FixtureRequest, tokenizer: PreTrainedTokenizerBase) -> Prompter:
    style = getattr(request, "param", "prefix")
    return Prompter(tokenizer, PromptArguments(chat_format=style, max_seq_length=256, max_new_tokens=NEW_TOKENS))


@pytest.fixture
def reader(lm_path: str, prompter: Prompter) -> CausalLMReader:
    return CausalLMReader(load_causal_lm(lm_path), prompter)


@pytest.fixture
def prompts(prompter: Prompter, examples: list[Example], documents: list[Document]) -> list[list[int]]:
    """Of many lengths, in no order."""
    return [prompter.encode(example, documents[: (5 * i) % 4]).ids for i, example in enumerate(examples[:6])]


def greedy(model: PreTrainedModel, prompt: Sequence[int], stop: Sequence[int] = ()) -> list[int]:
    """The likeliest next token, again and again, without cache, batch or `generate`; up to a stop token."""
    ids = list(prompt)
    if tuple(prompt) not in _GREEDY:
        for _ in range(NEW_TOKENS):
            with torch.no_grad():
                ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        _GREEDY[tuple(prompt)] = ids[len(prompt) :]
    found = _GREEDY[tuple(prompt)]
    return found[: next((i for i, token in enumerate(found) if token in stop), len(found))]


@both_formats
def test_a_batch_generates_what_one_prompt_at_a_time_does(
    reader: CausalLMReader, theirs: PreTrainedModel, prompts: list[list[int]]
) -> None:
    assert len({len(prompt) for prompt in prompts}) >= 4
    stop = reader.prompter.stop_ids
    expected = [greedy(theirs, prompt, stop) for prompt in prompts]
    assert reader.generate(prompts) == expected
    assert reader.generate(prompts[:1]) == expected[:1]
    assert len({tuple(ids) for ids in expected}) > 1
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": stop, "pad_token_id": stop[0]}
    for prompt, ids in zip(prompts, expected, strict=True):
        output = theirs.generate(torch.tensor([prompt]), **options)[0, len(prompt) :].tolist()
        assert output[: len(ids)] == ids
        assert all(token in stop for token in output[len(ids) :])


@both_formats
def test_generation_ends_at_any_stop_token_and_leaves_it_out(
    reader: CausalLMReader, theirs: PreTrainedModel, prompts: list[list[int]]
) -> None:
    free = [greedy(theirs, prompt) for prompt in prompts]
    for stop in ([free[0][3]], sorted({free[0][3], free[1][1]}), [free[2][0]]):
        reader.prompter.stop_ids = stop
        ours = reader.generate(prompts)
        assert ours == [greedy(theirs, prompt, stop) for prompt in prompts]
        assert min(map(len, ours)) < NEW_TOKENS


def test_a_batch_ends_when_its_last_answer_does(
    reader: CausalLMReader, theirs: PreTrainedModel, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    reader.prompter.stop_ids = [greedy(theirs, prompts[0])[2]]
    calls = []
    forward = reader.model.forward
    monkeypatch.setattr(reader.model, "forward", lambda *a, **k: calls.append(1) or forward(*a, **k))
    reader.generate(prompts[:1])
    assert len(calls) <= 3


def test_decoding_is_greedy_whatever_the_checkpoint_prefers(
    reader: CausalLMReader, theirs: PreTrainedModel, prompts: list[list[int]]
) -> None:
    config = reader.model.generation_config
    config.do_sample, config.temperature, config.top_k, config.top_p = True, 5.0, 50, 0.9
    config.max_length, config.num_beams, config.repetition_penalty, config.no_repeat_ngram_size = 20, 3, 3.0, 1
    assert reader.generate(prompts) == [greedy(theirs, prompt, reader.prompter.stop_ids) for prompt in prompts]


def test_answers_come_back_in_the_order_asked_with_the_size_of_their_batch(
    reader: CausalLMReader, theirs: PreTrainedModel, examples: list[Example], documents: list[Document]
) -> None:
    passages = [documents[: (5 * i) % 4] for i in range(6)]
    prompts = [reader.prompter.encode(*pair).ids for pair in zip(examples, passages, strict=False)]
    texts = [reader.prompter.decode(greedy(theirs, prompt, reader.prompter.stop_ids)) for prompt in prompts]
    assert len(set(texts)) > 1
    order = random.Random(1).sample(range(6), 6)
    for budget, sizes in ((1, {1}), (300, {1, 2, 3}), (16384, {6})):
        reader.max_batch_tokens = budget
        answers = reader.answer([examples[i] for i in order], [passages[i] for i in order], progress=False)
        assert [answer.text for answer in answers] == [texts[i] for i in order]
        assert {answer.batch_size for answer in answers} == sizes
        assert all(answer.seconds > 0 for answer in answers)
    assert reader.answer([], [], progress=False) == []


def test_no_batch_holds_more_tokens_than_allowed_with_its_padding(
    reader: CausalLMReader, examples: list[Example], documents: list[Document], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []

    def generate(prompts: Sequence[Sequence[int]]) -> list[list[int]]:
        sizes.append(len(prompts) * (max(map(len, prompts)) + NEW_TOKENS))
        return [[] for _ in prompts]

    monkeypatch.setattr(reader, "generate", generate)
    reader.max_batch_tokens = 400
    reader.answer(examples, [documents[: 4 * (i % 5 == 0)] for i in range(len(examples))], progress=False)
    assert len(sizes) > 1
    assert max(sizes) <= 400


def test_the_mode_is_restored_and_answers_have_no_dropout(reader: CausalLMReader, prompts: list[list[int]]) -> None:
    reader.model.config.attention_dropout = 0.5
    for layer in reader.model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    expected = reader.model.eval() and reader.generate(prompts)
    for training in (True, False):
        reader.model.train(training)
        assert reader.generate(prompts) == expected
        assert all(module.training == training for module in reader.model.modules())


def test_a_question_that_does_not_fit_is_logged_and_gets_an_empty_answer(
    reader: CausalLMReader,
    examples: list[Example],
    documents: list[Document],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(logging.getLogger("rqa"), "propagate", True)  # an executable turns it off
    long = Example("Why is that so? " * 200, where="test.jsonl:9")

    def texts(asked: list[Example]) -> list[str]:
        return [answer.text for answer in reader.answer(asked, [documents[:1]] * len(asked), progress=False)]

    alone = texts(examples[:4])
    with caplog.at_level(logging.WARNING, logger="rqa"):
        assert texts([long]) == [""]
        assert texts([*examples[:2], long, *examples[2:4]]) == [*alone[:2], "", *alone[2:]]
    (message,) = {record.getMessage() for record in caplog.records if record.name.startswith("rqa")}
    assert message.startswith("test.jsonl:9: ")
    assert "unanswered" in message


@both_formats
def test_generation_gives_what_training_would_score_highest_after_the_same_prompt(
    reader: CausalLMReader, theirs: PreTrainedModel, examples: list[Example], documents: list[Document]
) -> None:
    prompter = Prompter(reader.prompter.tokenizer, replace(reader.prompter.arguments, max_seq_length=140))
    reader.prompter = prompter
    trained = prompter.encode(examples[0], documents[:4], examples[0].gold_answer)
    answer = reader.answer(examples[:1], [documents[:4]], progress=False)[0]
    prompt = trained.ids[: trained.answer_start]
    assert answer.text == prompter.decode(greedy(theirs, prompt, prompter.stop_ids))
