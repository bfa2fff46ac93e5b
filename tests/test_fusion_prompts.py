"""What a fusion-in-decoder reader sees: the whole question with each passage, and the answer apart from them."""

from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from rqa.data import Document, Example, Turn
from rqa.prompts import DoesNotFit, FiDPromptArguments, FiDPrompter
from rqa.runtime.errors import UserError

LIMIT = 40


@pytest.fixture
def prompter(t5_path: str) -> FiDPrompter:
    arguments = FiDPromptArguments(max_encoder_seq_length=LIMIT, max_decoder_seq_length=12)
    return FiDPrompter(AutoTokenizer.from_pretrained(t5_path), arguments)


def test_each_passage_stands_beside_the_question(
    prompter: FiDPrompter, examples: list[Example], documents: list[Document]
) -> None:
    short = [Document(f"Amber {number}.") for number in range(3)]
    encoded = prompter.encode(examples[0], short, examples[0].gold_answer)
    for ids, passage in zip(encoded.passages, short, strict=True):
        text = f"question: {examples[0].question} context: {passage.fmt_content}"
        assert ids == prompter.tokenizer(text)["input_ids"]
    assert encoded.answer == prompter.tokenizer(examples[0].gold_answer)["input_ids"]
    assert encoded.answer[-1] == prompter.tokenizer.eos_token_id
    assert prompter.encode(examples[0], short).answer == []
    assert prompter.decode(encoded.answer) == prompter.tokenizer.decode(encoded.answer[:-1])


def test_a_passage_is_cut_and_never_the_question_or_the_answer(prompter: FiDPrompter, examples: list[Example]) -> None:
    long = Document(" ".join(["The harbour of Arlen."] * 40))
    encoded = prompter.encode(examples[0], [long, Document("Wool.")], examples[0].gold_answer)
    assert LIMIT - 3 <= len(encoded.passages[0]) <= LIMIT
    bare = prompter.tokenizer(f"question: {examples[0].question} context:")["input_ids"]
    for ids in encoded.passages:
        assert ids[: len(bare) - 1] == bare[:-1]
        assert ids[-1] == prompter.tokenizer.eos_token_id
    assert encoded.answer == prompter.tokenizer(examples[0].gold_answer)["input_ids"]


def test_the_oldest_turns_go_first_and_a_question_that_is_too_long_is_refused(prompter: FiDPrompter) -> None:
    turns = (Turn("user", "Tell me of Brask and of Corvo and of Lund " * 3), Turn("assistant", "Salt."))
    example = Example("What does it trade in?", gold_answer="Salt.", chat_history=turns, where="train.jsonl:3")
    (ids,) = prompter.encode(example, [Document("Wool.")]).passages
    assert ids == prompter.tokenizer("question: Salt.\nWhat does it trade in? context: Wool.")["input_ids"]
    with pytest.raises(DoesNotFit, match=r"train.jsonl:3: the question takes \d+ tokens, more than .*encoder"):
        prompter.encode(replace(example, question="Why? " * 40), [])
    with pytest.raises(DoesNotFit, match=r"the answer takes \d+ tokens, more than --max_decoder_seq_length 12"):
        prompter.encode(example, [], "Because. " * 12)


def test_the_answer_does_not_repeat_the_decoders_start(encoder_path: str, bart_path: str) -> None:
    bert, bart = (AutoTokenizer.from_pretrained(path) for path in (encoder_path, bart_path))
    ours = FiDPrompter(bert, FiDPromptArguments(), start_token=bert.cls_token_id)
    assert ours.encode(Example("Why?"), [], "Salt.").answer == bert("Salt.")["input_ids"][1:]
    ours = FiDPrompter(bart, FiDPromptArguments(), start_token=bart.eos_token_id)
    assert ours.encode(Example("Why?"), [], "Salt.").answer == bart("Salt.")["input_ids"]


def test_a_template_replaces_the_prompt(t5_path: str, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(t5_path)
    (tmp_path / "template.txt").write_text("{passage} Now: {question}\n")
    arguments = FiDPromptArguments(prompt_template=str(tmp_path / "template.txt"))
    passage = Document("Salt in {question}.")
    (ids,) = FiDPrompter(tokenizer, arguments).encode(Example("Why?"), [passage]).passages
    assert ids == tokenizer("Salt in {question}. Now: Why?")["input_ids"]
    (tmp_path / "template.txt").write_text("{passages} {question}")
    with pytest.raises(UserError, match=r"the placeholder {passage} is missing"):
        FiDPrompter(tokenizer, arguments)


def test_without_any_end_token_there_is_one_line(t5_path: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(t5_path)
    tokenizer.eos_token = tokenizer.sep_token = None
    with pytest.raises(UserError, match="neither an end token nor a separator"):
        FiDPrompter(tokenizer, FiDPromptArguments())
