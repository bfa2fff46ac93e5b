"""What a fusion-in-decoder reader sees: one prompt a passage, and the answer apart from them."""

import logging
import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from rqa.data import Document, Example, Turn
from rqa.runtime.errors import UserError
from rqa.runtime.flags import Arguments, flag

log = logging.getLogger(__name__)

Encoded = TypeVar("Encoded")
Prompt = TypeVar("Prompt", bound=Sized)

LONGEST_WORD = 40  # characters taken back to cut at a word's end; text without spaces is cut where it is


class DoesNotFit(UserError):
    """Question and answer alone are longer than the sequence may be."""


def fitting(
    encode: Callable[..., Encoded],
    rows: Iterable[Sequence[Any]],
    consequence: str,
    say: Callable[[str], object] = log.warning,
) -> dict[int, Encoded]:
    """`encode(*row)` of each row that fits, by the row's number; why another does not is said once, with its place.

    Args:
        consequence: What happens to what does not fit, such as "the example is left out".
        say: Takes the line; `functools.cache(log.warning)`, kept by the caller, says it once over many calls.
    """
    encoded: dict[int, Encoded] = {}
    reasons: dict[str, None] = {}
    for number, row in enumerate(rows):
        try:
            encoded[number] = encode(*row)
        except DoesNotFit as error:
            reasons[f"{error}; {consequence}"] = None
    for reason in reasons:
        say(reason)
    return encoded


def retrieval_query(example: Example) -> str:
    """The text that a retriever is asked with: what was said before, then the question."""
    return "\n".join([*(turn.message for turn in example.chat_history), example.question])


def fill(template: str, fields: dict[str, str]) -> str:
    """The template with its placeholders replaced in one pass: a passage may hold braces."""
    return re.sub(rf"\{{({'|'.join(fields)})\}}", lambda match: fields[match[1]], template)


def read_template(path: str | None, default: str) -> str:
    """The template at `path`, or the default, whose placeholders it must have.

    Raises:
        UserError: the file cannot be read or lacks a placeholder.
    """
    if path is None:
        return default
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompt_template {path}: cannot be read ({error})") from None
    for name in re.findall(r"\{(\w+)\}", default):
        if f"{{{name}}}" not in text:
            raise UserError(f"--prompt_template {path}: the placeholder {{{name}}} is missing")
    return text.rstrip("\n")


def longest_that_fits(render: Callable[[int | None], Prompt], longest: int, budget: int) -> Prompt:
    """The prompt with passages cut to as many characters as the budget of tokens allows.

    Args:
        render: Characters of a passage at most, or None -> a prompt, whose length is its tokens.
        longest: Characters of the longest passage.
    """
    prompt = render(None)
    if len(prompt) > budget:
        # Token counts are only nearly monotone in the cut, hence the walk down at the end.
        cap = max(bisect_right(range(longest), budget, key=lambda cap: len(render(cap))) - 1, 0)
        while len(prompt := render(cap)) > budget and cap:
            cap -= 1
    return prompt


def cut(text: str, cap: int | None) -> str:
    """At most `cap` characters, ending at a word's end."""
    if cap is None or len(text) <= cap:
        return text
    end = re.search(rf"\s\S{{0,{LONGEST_WORD}}}$", text[: cap + 1])
    return text[: end.start() if end else cap].rstrip()


INSTRUCTION = """\
Use the passages to answer the question. Reply with the answer alone.

{passages}

Question: {question}"""

ASSISTANT_SPEAKERS = {"assistant", "ai", "bot", "chatbot", "system", "agent", "gpt", "chatgpt", "model"}


@dataclass(kw_only=True)
class PromptArguments(Arguments):
    """How a question and its passages become a prompt."""

    chat_format: str = flag(
        "prefix", "Format of turns: by the prefixes, or by the tokenizer's chat template.", ["prefix", "template"]
    )
    user_prefix: str = flag("USER:", "Text before a user's turn.")
    assistant_prefix: str = flag("ASSISTANT:", "Text before an assistant's turn.")
    sep_user: str = flag("\n", "Text after a user's turn.", rare=True)
    sep_sys: str = flag("", "Text after an assistant's turn; empty: the end token alone.", rare=True)
    prompt_template: str | None = flag(None, "Text file with {passages} and {question} that replaces the instruction.")
    max_seq_length: int = flag(2048, "Tokens of prompt and answer together, at most.")
    max_new_tokens: int = flag(256, "Tokens of a generated answer, at most.")

    def check(self) -> None:
        self.check_bounds("max_seq_length", at_least=2)
        self.check_bounds("max_new_tokens", at_least=1)


@dataclass(frozen=True)
class TokenSequence:
    """Token ids of a prompt, and of the answer behind it: `ids[answer_start:]` is answer + end of turn."""

    ids: list[int]
    answer_start: int


@dataclass(frozen=True)
class _Prompt:
    """A prompt as (role, text) turns, as text, and as token ids."""

    turns: list[tuple[str, str]]
    text: str
    ids: list[int]

    def __len__(self) -> int:
        return len(self.ids)


class Prompter:
    """Builds prompts for one tokenizer in one format.

    Attributes:
        end_of_turn: Token ids behind every answer; the last one is a special token.
        stop_ids: Token ids at which generation ends.
        length_flag: What to raise when examples do not fit.
    """

    length_flag = "--max_seq_length"

    def __init__(self, tokenizer: PreTrainedTokenizerBase, arguments: PromptArguments | None = None) -> None:
        self.tokenizer: Any = tokenizer  # the stubs of `transformers` know less than the documentation
        self.arguments = arguments or PromptArguments()
        self.instruction = read_template(self.arguments.prompt_template, INSTRUCTION)
        if self.arguments.chat_format == "template" and not tokenizer.chat_template:
            raise UserError("--chat_format template: this tokenizer has no chat template; use --chat_format prefix")
        self.end_of_turn = self._find_end_of_turn()
        self.stop_ids = sorted({self.end_of_turn[-1], self.tokenizer.eos_token_id} - {None})

    def encode(self, example: Example, passages: Sequence[Document], answer: str | None = None) -> TokenSequence:
        """Token ids of the prompt and, when given, of the answer and its end of turn.

        Room for the answer is kept whether it is given or not, so that a prompt is cut alike in training and
        generation. Passages are cut first, at word boundaries and to one common length; then the oldest turns go.

        Raises:
            DoesNotFit: question and answer alone exceed `max_seq_length`.
        """
        target = [] if answer is None else self.encode_answer(answer)
        ids = self._fit(example, passages, len(target)).ids
        return TokenSequence(ids + target, len(ids))

    def text(self, example: Example, passages: Sequence[Document], answer: str) -> tuple[str, str]:
        """What `encode` gives as text: the prompt, and the answer without its end of turn. For a server to tokenize."""
        prompt = self._fit(example, passages, len(self.encode_answer(answer)))
        return prompt.text, self._answer_text(answer)

    def messages(self, example: Example, passages: Sequence[Document]) -> list[dict[str, str]]:
        """The same conversation as chat messages, for a server to format."""
        return [{"role": role, "content": text} for role, text in self._fit(example, passages, 0).turns]

    def _fit(self, example: Example, passages: Sequence[Document], target: int) -> _Prompt:
        """The longest prompt that leaves room for an answer of so many tokens."""
        limit = self.arguments.max_seq_length
        reserved = max(target, self.arguments.max_new_tokens)
        history = example.chat_history
        while len(bare := self._prompt(example, history, [])) > limit - reserved and history:
            history = _without_oldest(history)
        if len(bare) + target > limit:
            raise DoesNotFit(
                f"{example.where or 'question'}: question and answer alone take {len(bare) + target} tokens, "
                f"more than --max_seq_length {limit}"
            )
        budget = max(limit - reserved, len(bare))
        longest = max((len(passage.fmt_content) for passage in passages), default=0)
        return longest_that_fits(lambda cap: self._prompt(example, history, passages, cap), longest, budget)

    def encode_answer(self, answer: str) -> list[int]:
        """Token ids of the answer and the end of turn."""
        return self.tokenizer.encode(self._answer_text(answer), add_special_tokens=False) + self.end_of_turn

    def decode(self, ids: Sequence[int]) -> str:
        """The answer's text from generated ids."""
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()

    def _answer_text(self, answer: str) -> str:
        return (" " if self.arguments.chat_format == "prefix" else "") + answer.strip()

    def _prompt(
        self, example: Example, history: Sequence[Turn], passages: Sequence[Document], cap: int | None = None
    ) -> _Prompt:
        texts = [cut(passage.fmt_content, cap) for passage in passages]
        numbered = "\n\n".join(f"[{number}] {text}" for number, text in enumerate(texts, start=1) if text)
        request = fill(self.instruction, {"passages": numbered, "question": example.question})
        turns = [(_role(turn.speaker), turn.message) for turn in history] + [("user", request)]
        text = self._render_template(turns) if self.arguments.chat_format == "template" else self._render_prefix(turns)
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        bos = self.tokenizer.bos_token_id
        starts_with_bos = self.tokenizer.encode("", add_special_tokens=True)[:1] == [bos]
        return _Prompt(turns, text, ids if not starts_with_bos or ids[:1] == [bos] else [bos, *ids])

    def _render_prefix(self, turns: Sequence[tuple[str, str]]) -> str:
        style = self.arguments
        parts = [
            f"{style.user_prefix} {text}{style.sep_user}"
            if role == "user"
            else f"{style.assistant_prefix} {text}{style.sep_sys}"
            for role, text in turns
        ]
        return "".join(parts) + style.assistant_prefix

    def _render_template(self, turns: Sequence[tuple[str, str]], reply: str | None = None) -> str:
        messages = [{"role": role, "content": text} for role, text in turns]
        if reply is not None:
            messages.append({"role": "assistant", "content": reply})
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=reply is None)
        except TemplateError as error:
            raise UserError(
                f"--chat_format template: the tokenizer's template refuses a conversation ({error})"
            ) from None

    def _find_end_of_turn(self) -> list[int]:
        """What stands behind an answer, up to its first special token."""
        if self.arguments.chat_format == "template":
            reply = "An answer."
            suffix = self._render_template([("user", "A question?")], reply).rpartition(reply)[2]
        else:
            suffix = self.arguments.sep_sys
        ids = self.tokenizer.encode(suffix, add_special_tokens=False) if suffix else []
        special = {*self.tokenizer.all_special_ids, *self.tokenizer.added_tokens_decoder}
        for position, token in enumerate(ids):
            if token in special:
                return ids[: position + 1]
        if self.tokenizer.eos_token_id is None:
            raise UserError("--sep_sys: the tokenizer has no end token; name a special token that ends an answer")
        return [*ids, self.tokenizer.eos_token_id]


def _role(speaker: str) -> str:
    return "assistant" if re.split(r"[^a-z]", speaker.strip().lower())[0] in ASSISTANT_SPEAKERS else "user"


def _without_oldest(history: Sequence[Turn]) -> Sequence[Turn]:
    """The turns from the second one of a user on: many chat templates refuse a reply that nobody asked for."""
    later = (place for place, turn in enumerate(history) if place and _role(turn.speaker) == "user")
    return history[next(later, len(history)) :]


FID_TEMPLATE = "question: {question} context: {passage}"


@dataclass(kw_only=True)
class PassagePromptArguments(Arguments):
    """How an encoder-decoder is asked, passage by passage."""

    prompt_template: str | None = flag(
        None, "Text file with {passage} and {question} that replaces the default prompt."
    )
    max_encoder_seq_length: int = flag(512, "Tokens of the question and one passage, at most.")

    def check(self) -> None:
        self.check_bounds("max_encoder_seq_length", at_least=2)


@dataclass(kw_only=True)
class FiDPromptArguments(PassagePromptArguments):
    """How long an encoder-decoder's answers are."""

    max_decoder_seq_length: int = flag(256, "Tokens of an answer, given or generated, at most.")

    def check(self) -> None:
        self.check_bounds("max_decoder_seq_length", at_least=2)


@dataclass(frozen=True)
class FiDSequence:
    """Token ids of each passage's prompt, and of the answer with its end token."""

    passages: list[list[int]]
    answer: list[int]


class FiDPrompter:
    """Builds what a fusion-in-decoder reader sees: one prompt a passage, and the answer.

    Args:
        start_token: The token that the decoder starts from; an answer does not repeat it.

    Attributes:
        end_token: The token behind every answer.
    """

    length_flag = "--max_encoder_seq_length or --max_decoder_seq_length"

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        arguments: PassagePromptArguments | None = None,
        start_token: int | None = None,
    ) -> None:
        self.tokenizer: Any = tokenizer  # the stubs of `transformers` know less than the documentation
        self.arguments = arguments or FiDPromptArguments()
        self.start_token = start_token
        self.template = read_template(self.arguments.prompt_template, FID_TEMPLATE)
        ends = [token for token in (self.tokenizer.eos_token_id, self.tokenizer.sep_token_id) if token is not None]
        if not ends:
            raise UserError("--model_name_or_path: the tokenizer has neither an end token nor a separator")
        self.end_token: int = ends[0]

    def encode(self, example: Example, passages: Sequence[Document], answer: str | None = None) -> FiDSequence:
        """Token ids of each passage's prompt, and of the answer when given; without passages, of the question alone.

        A passage is cut at a word boundary; a question that is too long loses its oldest turns.

        Raises:
            DoesNotFit: the question by itself, or the answer, is too long.
        """
        limit = self.arguments.max_encoder_seq_length
        history = example.chat_history
        while len(bare := self._prompt(example, history, "")) > limit and history:
            history = history[1:]
        self._require(example, "question", len(bare), "encoder")
        target = [] if answer is None else self._encode_answer(answer)
        if target:
            self._require(example, "answer", len(target), "decoder")
        texts = [passage.fmt_content for passage in passages]
        prompts = [
            longest_that_fits(lambda cap, text=text: self._prompt(example, history, cut(text, cap)), len(text), limit)
            for text in texts
        ]
        return FiDSequence(prompts or [bare], target)

    def _require(self, example: Example, part: str, length: int, side: str) -> None:
        limit = getattr(self.arguments, f"max_{side}_seq_length")
        if length > limit:
            where, flag = example.where or "example", f"--max_{side}_seq_length {limit}"
            raise DoesNotFit(f"{where}: the {part} takes {length} tokens, more than {flag}")

    def decode(self, ids: Sequence[int]) -> str:
        """The answer's text from generated ids."""
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()

    def _encode_answer(self, answer: str) -> list[int]:
        ids = self.tokenizer(text_target=answer.strip())["input_ids"]
        ids = ids[1:] if ids[:1] == [self.start_token] else ids
        return ids if ids[-1:] == [self.end_token] else [*ids, self.end_token]

    def _prompt(self, example: Example, history: Sequence[Turn], passage: str) -> list[int]:
        question = "\n".join([*(turn.message for turn in history), example.question])
        return self.tokenizer.encode(fill(self.template, {"passage": passage, "question": question}))
