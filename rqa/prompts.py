"""Prompts: history, question and passages as token ids, cut in the same way in training and generation."""

import logging
import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence, Sized
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, TypeVar

from jinja2.exceptions import TemplateError

from rqa.data import Document, Example
from rqa.runtime.errors import UserError
from rqa.runtime.files import reading
from rqa.runtime.flags import Arguments, flag
from rqa.runtime.text import as_text, parse_json, without_thoughts

log = logging.getLogger(__name__)
warn_once = cache(log.warning)  # since a question may be encoded again with each of its documents

Encoded = TypeVar("Encoded")
Prompt = TypeVar("Prompt", bound=Sized)

LONGEST_WORD = 40  # most characters removed to cut at the end of a word; text without spaces is cut anywhere
ASSISTANT_SPEAKERS = {"assistant", "ai", "bot", "chatbot", "system", "agent", "gpt", "chatgpt", "model"}
INSTRUCTION = """\
Use the passages to answer the question. Reply with the answer alone.

{passages}

Question: {question}"""


class DoesNotFit(UserError):
    """Question and answer alone exceed the maximum length."""


def fitting(
    encode: Callable[..., Encoded], rows: Iterable[Any], consequence: str, say: Callable[[str], Any] = log.warning
) -> dict[int, Encoded]:
    """`encode(*row)` of each row that fits, by row number; each reason why a row does not fit is logged once."""
    encoded = {}
    say_once = cache(say)
    for number, row in enumerate(rows):
        try:
            encoded[number] = encode(*row)
        except DoesNotFit as error:
            say_once(f"{error}; {consequence}")
    return encoded


def retrieval_query(example: Example) -> str:
    """The text of a retriever's query: the chat history, then the question."""
    return "\n".join([*(turn.message for turn in example.chat_history), example.question])


def fill(template: str, fields: dict[str, str]) -> str:
    """The template with its placeholders replaced in one pass, since passages may contain braces."""
    return re.sub(rf"\{{({'|'.join(fields)})\}}", lambda match: fields[match[1]], template)


def read_template(path: str | None, default: str) -> str:
    """The template at `path`, which must have all placeholders of `default`; without a path, `default`."""
    if path is None:
        return default
    try:
        with reading(path) as file:
            text = file.read().decode("utf-8-sig").replace("\r\n", "\n")
    except UserError as error:
        raise UserError(f"--prompt_template {error}") from None
    if missing := [name for name in re.findall(r"\{\w+\}", default) if name not in text]:
        raise UserError(f"--prompt_template {path}: the placeholder {missing[0]} is missing")
    return text.rstrip("\n")


def cut(text: str, cap: int | None) -> str:
    """The first `cap` characters at most, cut at the end of a word."""
    if cap is None or len(text) <= cap:
        return text
    end = re.search(rf"\s\S{{0,{LONGEST_WORD}}}$", text[: cap + 1])
    return text[: end.start() if end else cap].rstrip()


def cut_passages(render: Callable[[int | None], Prompt], longest: int, budget: int) -> Prompt:
    """The prompt with passages cut to as many characters (at most `longest`) as the budget of tokens allows."""
    if len(prompt := render(None)) > budget:
        # Token counts are only nearly monotone in the cut, hence the loop after the bisection.
        cap = max(bisect_right(range(longest), budget, key=lambda cap: len(render(cap))) - 1, 0)
        while len(prompt := render(cap)) > budget and cap:
            cap -= 1
    return prompt


def cut_history(render: Callable[[Example], Prompt], example: Example, budget: int) -> tuple[Prompt, Example]:
    """The prompt with as many of the latest turns as the budget of tokens allows, and the example with these turns."""
    # A user's turn is removed with its reply: many chat templates reject a reply without a question.
    while len(prompt := render(example)) > budget and (history := example.chat_history):
        later = (place for place, turn in enumerate(history) if place and _role(turn.speaker) == "user")
        example = replace(example, chat_history=history[next(later, len(history)) :])
    return prompt, example


def _role(speaker: str) -> str:
    return "assistant" if re.split(r"[^a-z]", speaker.strip().lower())[0] in ASSISTANT_SPEAKERS else "user"


@dataclass(kw_only=True)
class ChatTemplateArguments(Arguments):
    """The chat template, local or on a server."""

    chat_template_kwargs: str = flag("{}", 'Variables for the chat template, such as {"enable_thinking": false}.')

    @property
    def template_options(self) -> dict[str, Any]:
        try:
            return parse_json(self.chat_template_kwargs)
        except ValueError as error:
            raise UserError(f"--chat_template_kwargs {self.chat_template_kwargs}: {error}; give an object") from None


@dataclass(kw_only=True)
class PromptArguments(ChatTemplateArguments):
    """The prompt."""

    chat_format: str = flag("prefix", "Format of turns: text prefixes or the chat template.", ["prefix", "template"])
    user_prefix: str = flag("USER:", "Text before a user's turn.")
    assistant_prefix: str = flag("ASSISTANT:", "Text before an assistant's turn.")
    sep_user: str = flag("\n", "Text after a user's turn.", rare=True)
    sep_sys: str = flag("", "Text after a reply; the end token is added unless it has a special token.", rare=True)
    prompt_template: str | None = flag(None, "Text file with {passages} and {question} that replaces the instruction.")
    max_seq_length: int = flag(2048, "Tokens of prompt and answer together, at most.")
    max_new_tokens: int = flag(256, "Tokens of a generated answer, at most.")

    def check(self) -> None:
        self.check_bounds("max_seq_length", "max_new_tokens", at_least=1)


@dataclass(frozen=True)
class TokenSequence:
    """Token ids of a prompt and its answer; `ids[answer_start:]` is the answer with its end of turn."""

    ids: list[int]
    answer_start: int
    cut_more: bool = False  # whether the prompt is cut more than in generation, since its answer is too long


@dataclass(frozen=True)
class _Prompt:
    """A prompt as chat messages, text and token ids."""

    messages: list[dict[str, str]]
    text: str
    ids: list[int]

    def __len__(self) -> int:
        return len(self.ids)


class Prompter:
    """Builds a decoder's prompts; the tokenizer may be one that only counts tokens."""

    length_flag = "--max_seq_length"  # the flag to raise when examples do not fit

    def __init__(self, tokenizer: Any, arguments: PromptArguments = PromptArguments()) -> None:
        self.tokenizer, self.arguments = tokenizer, arguments
        self.instruction = read_template(self.arguments.prompt_template, INSTRUCTION)
        self.as_text, self._options = as_text(tokenizer), self.arguments.template_options
        start = tokenizer.encode("", add_special_tokens=True)[:1]
        self._bos = start if start == [tokenizer.bos_token_id] else []
        self._end_of_reply, self.end_of_turn = self._find_end_of_turn()
        self.stop_ids = sorted({self.end_of_turn[-1], tokenizer.eos_token_id} - {None})  # tokens that end generation
        special = {token: added.content for token, added in tokenizer.added_tokens_decoder.items() if added.special}
        self._unsaid = {token for token, name in special.items() if without_thoughts(name)}  # not those around thoughts
        self._thinks = self._prompt(Example("?")).text.rstrip().endswith("<think>")  # prompts open the thoughts

    def encode(self, example: Example, passages: Sequence[Document], answer: str | None = None) -> TokenSequence:
        """Token ids of the prompt and, if given, of the answer and its end of turn; raises `DoesNotFit`.

        Training also reserves room for `max_new_tokens`, so that prompts are cut as in generation, or more if a longer
        answer needs it. Passages are cut first, to a common length; then the oldest turns are removed.
        """
        target = [] if answer is None else self.encode_answer(answer)
        prompt, cut_more = self._fit(example, passages, len(target))
        return TokenSequence(prompt.ids + target, len(prompt), cut_more)

    def text(self, example: Example, passages: Sequence[Document], answer: str) -> tuple[str, str]:
        """The prompt and the answer of `encode` as text, without the end of turn, for a server to tokenize."""
        return self._fit(example, passages, len(self.encode_answer(answer)))[0].text, self._answer_text(answer)

    def messages(self, example: Example, passages: Sequence[Document]) -> list[dict[str, str]]:
        """The prompt of `encode` as chat messages, for a server to format."""
        return self._fit(example, passages, 0)[0].messages

    def encode_answer(self, answer: str) -> list[int]:
        """Token ids of the answer and the end of turn."""
        return self.tokenizer.encode(self._answer_text(answer), add_special_tokens=False) + self.end_of_turn

    def decode(self, ids: Sequence[int]) -> str:
        """The answer's text from generated ids, without thoughts; "" if these never end."""
        reply = self.tokenizer.decode([token for token in ids if token not in self._unsaid])
        return without_thoughts("<think>" * self._thinks + reply)

    def _fit(self, example: Example, passages: Sequence[Document], target: int) -> tuple[_Prompt, bool]:
        """The longest prompt before an answer of `target` tokens, and whether generation would cut it less."""
        limit = self.arguments.max_seq_length
        longest = max((len(passage.fmt_content) for passage in passages), default=0)
        for room, cut_more in ((self.arguments.max_new_tokens, False), (target, True)):
            bare, kept = cut_history(self._prompt, example, limit - room)
            prompt = cut_passages(partial(self._prompt, kept, passages), longest, max(limit - room, len(bare)))
            if len(prompt) + target <= limit:
                return prompt, cut_more
        needed = f"question and answer alone take {len(bare) + target} tokens"
        raise DoesNotFit(f"{example.where or 'question'}: {needed}, more than --max_seq_length {limit}")

    def _prompt(self, example: Example, passages: Sequence[Document] = (), cap: int | None = None) -> _Prompt:
        style = self.arguments
        texts = [cut(passage.fmt_content, cap) for passage in passages]
        numbered = "\n\n".join(f"[{number}] {text}" for number, text in enumerate(texts, start=1) if text)
        fields = {"passages": self.as_text(numbered), "question": self.as_text(example.question)}
        turns = [(_role(turn.speaker), self.as_text(turn.message)) for turn in example.chat_history]
        turns += [("user", fill(self.instruction, fields))]
        messages = [{"role": role, "content": said} for role, said in turns]
        if style.chat_format == "template":
            text = self.apply_template(messages)
        else:
            before = {"user": style.user_prefix, "assistant": style.assistant_prefix}
            after = {"user": style.sep_user, "assistant": self._end_of_reply}
            text = "".join(f"{before[role]} {said}{after[role]}" for role, said in turns) + style.assistant_prefix
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        return _Prompt(messages, text, ids if ids[: len(self._bos)] == self._bos else self._bos + ids)

    def _answer_text(self, answer: str) -> str:
        before = " " if self.arguments.chat_format == "prefix" else ""
        return ("</think>\n\n" if self._thinks else before) + self.as_text(answer.strip())

    def apply_template(self, messages: list[dict[str, str]]) -> str:
        """The conversation rendered by the chat template; after a user's turn the prefix of a reply is added."""
        options = self._options | {"tokenize": False, "add_generation_prompt": messages[-1]["role"] == "user"}
        try:
            return self.tokenizer.apply_chat_template(messages, **options)
        except (TemplateError, TypeError, ValueError) as error:
            raise UserError(f"--chat_format template: rejects a conversation ({error}); use prefix") from None

    def _find_end_of_turn(self) -> tuple[str, list[int]]:
        """The text after a reply in the history, and the token ids after an answer: those up to a special one."""
        suffix = self.arguments.sep_sys
        if self.arguments.chat_format == "template":
            if not self.tokenizer.chat_template:
                raise UserError("--chat_format template: the tokenizer has no chat template; use --chat_format prefix")
            said = [{"role": "user", "content": "A question?"}, {"role": "assistant", "content": "An answer."}]
            suffix = self.apply_template(said).rpartition("An answer.")[2]
        elif self._options and self.tokenizer.chat_template:
            raise UserError("--chat_template_kwargs: has no effect without a chat template; add --chat_format template")
        ids = self.tokenizer.encode(suffix, add_special_tokens=False) if suffix else []
        special = {*self.tokenizer.all_special_ids, *self.tokenizer.added_tokens_decoder}
        if ends := [position for position, token in enumerate(ids, start=1) if token in special]:
            return suffix, ids[: ends[0]]
        if self.tokenizer.eos_token_id is None:
            raise UserError("--sep_sys: the tokenizer has no end token; give a special token that ends an answer")
        return suffix + self.tokenizer.eos_token, [*ids, self.tokenizer.eos_token_id]
