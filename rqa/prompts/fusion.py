"""What a fusion-in-decoder reader sees: one prompt a passage, and the answer apart from them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from rqa.data.documents import Document
from rqa.data.examples import Example, Turn
from rqa.prompts.text import DoesNotFit, cut, fill, longest_that_fits, read_template
from rqa.runtime.errors import UserError, check_bounds

FUSION_TEMPLATE = "question: {question} context: {passage}"


@dataclass
class PassagePromptArguments:
    """How an encoder-decoder is asked, passage by passage."""

    prompt_template: str | None = field(
        default=None, metadata={"help": "A text file with {passage} and {question} that replaces the default prompt."}
    )
    max_encoder_seq_length: int = field(default=512, metadata={"help": "Tokens of question and one passage."})

    def __post_init__(self) -> None:
        check_bounds(self, *(name for name in vars(self) if name.endswith("seq_length")), at_least=2)


@dataclass
class FusionPromptArguments(PassagePromptArguments):
    """How long an encoder-decoder's answers are."""

    max_decoder_seq_length: int = field(default=256, metadata={"help": "Tokens of an answer, given or generated."})


@dataclass(frozen=True)
class FusionSequence:
    """Token ids of each passage's prompt, and of the answer with its end token."""

    passages: list[list[int]]
    answer: list[int]


class FusionPrompter:
    """Builds what a fusion-in-decoder reader sees: one prompt a passage, and the answer.

    Args:
        start_token: The token that the decoder starts from; an answer does not repeat it.

    Attributes:
        end_token: The token behind every answer.
    """

    length_flag = "--max_encoder_seq_length or --max_decoder_seq_length"

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, arguments: PassagePromptArguments, start_token: int | None = None
    ) -> None:
        self.tokenizer: Any = tokenizer  # the stubs of `transformers` know less than the documentation
        self.arguments = arguments
        self.start_token = start_token
        self.template = read_template(arguments.prompt_template, FUSION_TEMPLATE)
        ends = [token for token in (self.tokenizer.eos_token_id, self.tokenizer.sep_token_id) if token is not None]
        if not ends:
            raise UserError("--model_name_or_path: the tokenizer has neither an end token nor a separator")
        self.end_token: int = ends[0]

    def encode(self, example: Example, passages: Sequence[Document], answer: str | None = None) -> FusionSequence:
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
        return FusionSequence(prompts or [bare], target)

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
