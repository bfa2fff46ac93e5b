"""Prompts: one function for training and generation, what is cut, what never is."""

import itertools
import re
from pathlib import Path

import pytest
from tokenizers import processors
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from rqa.data import Document, Example, Turn
from rqa.prompts import INSTRUCTION, DoesNotFit, PromptArguments, Prompter, retrieval_query
from rqa.runtime.errors import UserError

HISTORY = (
    Turn("User", "Tell me about the harbour of Arlen."),
    Turn("Assistant", "It is known for its trade."),
    Turn("User", "And the market of Brask?"),
    Turn("Assistant", "It is held each spring."),
)
ALTERNATING = (
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def clone(
    tokenizer: PreTrainedTokenizerBase, template: str | None = None, **options: object
) -> PreTrainedTokenizerBase:
    """A tokenizer of our own to change."""
    core = type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str())
    made = PreTrainedTokenizerFast(
        tokenizer_object=core, **{"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"} | options
    )
    made.chat_template = template if template is not None else tokenizer.chat_template
    return made


@pytest.fixture(scope="module")
def adds_bos(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A tokenizer that puts <s> in front of every text, as Llama's does."""
    made = clone(tokenizer, bos_token="<s>")
    bos = made.convert_tokens_to_ids("<s>")
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", bos)]
    )
    assert made.encode("text")[0] == bos
    assert bos not in made.encode("text", add_special_tokens=False)
    return made


@pytest.fixture(scope="module")
def example(examples: list[Example]) -> Example:
    return examples[0]


@pytest.fixture(scope="module")
def talked(example: Example) -> Example:
    return Example(example.question, example.gold_docs, example.gold_answer, HISTORY, where="train.jsonl:7")


def arguments(chat_format: str, **given: object) -> PromptArguments:
    return PromptArguments(**{"chat_format": chat_format, "max_new_tokens": 24} | given)


def passage_characters(text: str, passages: list[Document]) -> int:
    """How much of the passages a prompt shows; every passage shown must be a beginning of the real one."""
    body = text.partition("answer alone.\n\n")[2].partition("\n\nQuestion: ")[0]
    shown = re.split(r"(?:^|\n\n)\[(\d+)\] ", body)[1:]
    for number, part in zip(shown[::2], shown[1::2], strict=True):
        assert passages[int(number) - 1].fmt_content.startswith(part)
    return sum(map(len, shown[1::2]))


# ---------------------------------------------------------------- the text


def test_the_prefix_format_is_the_documented_text(
    tokenizer: PreTrainedTokenizerBase, talked: Example, documents: list[Document]
) -> None:
    style = arguments("prefix", user_prefix="U:", assistant_prefix="A:", sep_user="|u|", sep_sys="|s|")
    prompt = Prompter(tokenizer, style).encode(talked, documents[:2], "Copper.")
    assert tokenizer.decode(prompt.ids[: prompt.answer_start]) == (
        "U: Tell me about the harbour of Arlen.|u|A: It is known for its trade.|s|"
        "U: And the market of Brask?|u|A: It is held each spring.|s|"
        "U: Use the passages to answer the question. Reply with the answer alone.\n\n"
        f"[1] {documents[0].fmt_content}\n\n[2] {documents[1].fmt_content}\n\nQuestion: {talked.question}|u|A:"
    )
    assert tokenizer.decode(prompt.ids[prompt.answer_start :]) == " Copper.|s|<|endoftext|>"


def test_the_template_format_is_the_tokenizers_own(
    tokenizer: PreTrainedTokenizerBase, talked: Example, documents: list[Document]
) -> None:
    prompt = Prompter(tokenizer, arguments("template")).encode(talked, documents[:1], " Copper. ")
    request = INSTRUCTION.replace("{passages}", f"[1] {documents[0].fmt_content}").replace(
        "{question}", talked.question
    )
    messages = [
        {"role": role, "content": turn.message} for role, turn in zip(["user", "assistant"] * 2, HISTORY, strict=True)
    ] + [{"role": "user", "content": request}]
    theirs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert tokenizer.decode(prompt.ids[: prompt.answer_start]) == theirs
    messages.append({"role": "assistant", "content": "Copper."})
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    assert tokenizer.decode(prompt.ids) == whole.rstrip("\n")


@pytest.mark.parametrize("chat_format", ["prefix", "template"])
@pytest.mark.parametrize("length", [120, 160, 220, 2048])
@pytest.mark.parametrize("history", [0, 1, 4])
@pytest.mark.parametrize("count", [0, 1, 4])
def test_training_ids_are_the_generation_prompts_followed_by_the_answers(
    count: int,
    history: int,
    length: int,
    chat_format: str,
    tokenizer: PreTrainedTokenizerBase,
    example: Example,
    documents: list[Document],
) -> None:
    prompter = Prompter(tokenizer, arguments(chat_format, max_seq_length=length))
    asked = Example(example.question, chat_history=HISTORY[len(HISTORY) - history :])
    answer = "Arlen trades in copper."
    trained = prompter.encode(asked, documents[:count], answer)
    generated = prompter.encode(asked, documents[:count])
    assert len(prompter.encode_answer(answer)) <= 24
    assert trained.ids == generated.ids + prompter.encode_answer(answer)
    assert trained.answer_start == generated.answer_start == len(generated.ids)


@pytest.mark.parametrize("speaker", ["Assistant", "assistant", "AI", "system", "Agent 2", "bot"])
def test_the_assistants_turns_are_known_by_their_speaker(
    speaker: str, tokenizer: PreTrainedTokenizerBase, example: Example
) -> None:
    asked = Example(example.question, chat_history=(Turn("Human", "hi"), Turn(speaker, "hello")))
    text = tokenizer.decode(Prompter(tokenizer, arguments("prefix")).encode(asked, []).ids)
    assert text.startswith("USER: hi\nASSISTANT: helloUSER: Use")


# ---------------------------------------------------------------- what is cut


@pytest.mark.parametrize("chat_format", ["prefix", "template"])
@pytest.mark.parametrize("with_history", [False, True])
def test_at_every_length_question_and_answer_stay_whole_and_only_passages_are_cut(
    with_history: bool, chat_format: str, tokenizer: PreTrainedTokenizerBase, talked: Example, documents: list[Document]
) -> None:
    asked = talked if with_history else Example(talked.question, where=talked.where)
    passages = documents[:3]
    answer = "Arlen trades in copper."
    whole = Prompter(tokenizer, arguments(chat_format)).encode(asked, passages, answer)
    alone = Prompter(tokenizer, arguments(chat_format)).encode(Example(talked.question), [], answer)
    shown, kept_turns = [], []
    for length in [*range(len(alone.ids), len(whole.ids) + 30, 3), len(whole.ids) + 30]:
        prompter = Prompter(tokenizer, arguments(chat_format, max_seq_length=length))
        sequence = prompter.encode(asked, passages, answer)
        assert len(sequence.ids) <= length
        assert sequence.ids[sequence.answer_start :] == prompter.encode_answer(answer)
        text = tokenizer.decode(sequence.ids[: sequence.answer_start])
        assert f"\n\nQuestion: {talked.question}" in text
        assert text.startswith("USER: " if chat_format == "prefix" else "<|im_start|>user\n")
        turns = [turn.message in text for turn in asked.chat_history]
        assert turns == sorted(turns), "an older turn outlived a newer one"
        kept_turns.append(sum(turns))
        shown.append((sum(turns), passage_characters(text, passages)))
    assert sequence.ids == whole.ids
    assert kept_turns == sorted(kept_turns)
    assert shown[0] == (0, 0)
    assert shown[-1] == (len(asked.chat_history), sum(len(p.fmt_content) for p in passages))
    for (turns, before), (more_turns, after) in itertools.pairwise(shown):
        assert turns != more_turns or after >= before - 3  # token counts are only nearly monotone in the cut


@pytest.mark.parametrize("chat_format", ["prefix", "template"])
def test_passages_fill_the_room_that_there_is(
    chat_format: str, tokenizer: PreTrainedTokenizerBase, example: Example, documents: list[Document]
) -> None:
    longest_word = max(len(tokenizer.encode(" " + w)) for d in documents[:2] for w in d.fmt_content.split())
    for length in range(100, 138, 3):
        prompt = Prompter(tokenizer, arguments(chat_format, max_seq_length=length)).encode(example, documents[:2])
        assert length - 24 - 2 * (longest_word + 2) <= len(prompt.ids) <= length - 24


def test_passages_are_cut_at_word_ends(
    tokenizer: PreTrainedTokenizerBase, example: Example, documents: list[Document]
) -> None:
    words = documents[0].fmt_content.split()
    for length in range(100, 160):
        prompt = Prompter(tokenizer, arguments("prefix", max_seq_length=length)).encode(example, documents[:1])
        body = tokenizer.decode(prompt.ids).partition("answer alone.\n\n")[2].partition("\n\nQuestion: ")[0]
        shown = body.removeprefix("[1] ").split()
        assert shown == words[: len(shown)]


@pytest.mark.parametrize("chat_format", ["prefix", "template"])
@pytest.mark.parametrize("with_history", [False, True])
def test_what_cannot_fit_is_refused_with_its_line(
    with_history: bool, chat_format: str, tokenizer: PreTrainedTokenizerBase, talked: Example, documents: list[Document]
) -> None:
    asked = talked if with_history else Example(talked.question, where=talked.where)
    answer = "Arlen trades in copper."
    needed = len(Prompter(tokenizer, arguments(chat_format)).encode(Example(talked.question), [], answer).ids)
    Prompter(tokenizer, arguments(chat_format, max_seq_length=needed)).encode(asked, documents[:2], answer)
    with pytest.raises(DoesNotFit, match=rf"^train\.jsonl:7: .* {needed} tokens.*--max_seq_length {needed - 1}"):
        Prompter(tokenizer, arguments(chat_format, max_seq_length=needed - 1)).encode(asked, documents[:2], answer)


def test_cutting_the_history_never_leaves_an_answer_without_its_question(
    tokenizer: PreTrainedTokenizerBase, talked: Example, documents: list[Document]
) -> None:
    strict = clone(tokenizer, ALTERNATING)  # as Llama 2's, Mistral's and Gemma's templates do
    whole = len(Prompter(strict, arguments("template")).encode(talked, []).ids)
    texts = set()
    for length in range(whole + 24, 60, -2):
        prompter = Prompter(strict, arguments("template", max_seq_length=length))
        text = strict.decode(prompter.encode(talked, documents[:1]).ids)
        texts.add(tuple(turn.message in text for turn in HISTORY))
    assert texts == {(True,) * 4, (False, False, True, True), (False,) * 4}


# ---------------------------------------------------------------- what is inserted


@pytest.mark.parametrize("chat_format", ["prefix", "template"])
def test_placeholders_in_questions_and_passages_are_plain_text(
    chat_format: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    question = r"What does {passages} or {question} or {0} or {x!r} mean, and \1 and \g<0>?"
    passage = Document(r"The template has {question} and {passages} and \2.")
    prompt = Prompter(tokenizer, arguments(chat_format)).encode(Example(question), [passage])
    text = tokenizer.decode(prompt.ids)
    assert f"[1] {passage.page_content}\n\nQuestion: {question}" in text
    assert text.count(question) == text.count(passage.page_content) == 1


def test_the_retriever_is_asked_with_the_conversation(example: Example, talked: Example) -> None:
    assert retrieval_query(example) == example.question
    assert retrieval_query(talked).split("\n") == [*(turn.message for turn in HISTORY), example.question]


@pytest.mark.parametrize("prefix", ["USER:", "<s>USER:", "<s> USER:"])
def test_bos_stands_once_in_front(
    prefix: str, adds_bos: PreTrainedTokenizerBase, example: Example, documents: list[Document]
) -> None:
    prompter = Prompter(adds_bos, arguments("prefix", user_prefix=prefix))
    sequence = prompter.encode(example, documents[:2], "Copper.")
    assert sequence.ids[0] == adds_bos.bos_token_id
    assert sequence.ids.count(adds_bos.bos_token_id) == 1
    without = Prompter(adds_bos, arguments("prefix", user_prefix=prefix.removeprefix("<s>"))).encode(
        example, documents[:2], "Copper."
    )
    assert sequence.ids == without.ids


@pytest.mark.parametrize("start", ["", "{{ bos_token }}"])
def test_bos_stands_once_in_front_of_a_template(
    start: str, adds_bos: PreTrainedTokenizerBase, talked: Example, documents: list[Document]
) -> None:
    tokenizer = clone(adds_bos, start + adds_bos.chat_template, bos_token="<s>")
    ids = Prompter(tokenizer, arguments("template")).encode(talked, documents[:2], "Copper.").ids
    assert ids[0] == tokenizer.bos_token_id
    assert ids.count(tokenizer.bos_token_id) == 1


def test_no_bos_where_the_tokenizer_adds_none(tokenizer: PreTrainedTokenizerBase, example: Example) -> None:
    knows_bos = clone(tokenizer, bos_token="<s>")
    assert knows_bos.bos_token_id not in Prompter(knows_bos, arguments("prefix")).encode(example, []).ids


# ---------------------------------------------------------------- the end of a turn


@pytest.mark.parametrize(
    ("sep_sys", "text"),
    [
        ("", "<|endoftext|>"),
        ("<|im_end|>", "<|im_end|>"),
        ("\n<|im_end|>\n", "\n<|im_end|>"),
        ("\n", "\n<|endoftext|>"),
        (" ###", " ###<|endoftext|>"),
        ("<|endoftext|>", "<|endoftext|>"),
    ],
)
def test_every_answer_ends_with_one_special_token_at_which_generation_stops(
    sep_sys: str, text: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    prompter = Prompter(tokenizer, arguments("prefix", sep_sys=sep_sys))
    assert tokenizer.decode(prompter.end_of_turn) == text
    assert prompter.end_of_turn[-1] in prompter.stop_ids
    assert set(prompter.stop_ids) == {prompter.end_of_turn[-1], tokenizer.eos_token_id}
    assert prompter.decode(prompter.encode_answer(" An answer. ")[: -len(prompter.end_of_turn)]) == "An answer."


def test_the_chat_templates_end_of_turn_is_found(tokenizer: PreTrainedTokenizerBase) -> None:
    prompter = Prompter(tokenizer, arguments("template"))
    assert prompter.end_of_turn == [tokenizer.convert_tokens_to_ids("<|im_end|>")]
    assert set(prompter.stop_ids) == {prompter.end_of_turn[0], tokenizer.eos_token_id}


def test_a_tokenizer_without_an_end_needs_a_separator(tokenizer: PreTrainedTokenizerBase) -> None:
    endless = clone(tokenizer, eos_token=None)
    with pytest.raises(UserError, match="--sep_sys"):
        Prompter(endless, arguments("prefix"))
    prompter = Prompter(endless, arguments("prefix", sep_sys="<|im_end|>"))
    assert prompter.stop_ids == prompter.end_of_turn == [endless.convert_tokens_to_ids("<|im_end|>")]


# ---------------------------------------------------------------- what is refused


def test_a_prompt_template_replaces_the_instruction(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, example: Example, documents: list[Document]
) -> None:
    path = tmp_path / "template.txt"
    path.write_text("Q={question} {other} P={passages}\n", encoding="utf-8")
    prompter = Prompter(tokenizer, arguments("prefix", prompt_template=str(path)))
    text = tokenizer.decode(prompter.encode(example, documents[:1]).ids)
    assert text == f"USER: Q={example.question} {{other}} P=[1] {documents[0].fmt_content}\nASSISTANT:"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"Question: {question}", r"\{passages\}"),
        (b"Passages: {passages}", r"\{question\}"),
        (b"", r"\{passages\}"),
        (b"\xff{passages}{question}", "cannot be read"),
        (None, "cannot be read"),
    ],
)
def test_a_bad_prompt_template_is_named_by_its_path(
    content: bytes | None, reason: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    path = tmp_path / "template.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=reason) as caught:
        Prompter(tokenizer, arguments("prefix", prompt_template=str(path)))
    assert str(caught.value).startswith(f"--prompt_template {path}: ")
    assert "\n" not in str(caught.value)


def test_a_directory_is_no_prompt_template(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(UserError, match=re.escape(str(tmp_path))):
        Prompter(tokenizer, arguments("prefix", prompt_template=str(tmp_path)))


def test_a_template_that_refuses_is_a_users_error(tokenizer: PreTrainedTokenizerBase, example: Example) -> None:
    strict = clone(tokenizer, ALTERNATING)
    asked = Example(example.question, chat_history=(Turn("User", "hi"), Turn("User", "hello?")))
    with pytest.raises(UserError, match=r"--chat_format template.*roles must alternate"):
        Prompter(strict, arguments("template")).encode(asked, [])
    with pytest.raises(UserError, match=r"--chat_format template.*never"):
        Prompter(clone(tokenizer, "{{ raise_exception('never') }}"), arguments("template"))


def test_a_tokenizer_without_a_template_is_refused_for_the_template_format(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    plain = clone(tokenizer)
    plain.chat_template = None
    with pytest.raises(UserError, match="no chat template"):
        Prompter(plain, arguments("template"))
    Prompter(plain, arguments("prefix"))
