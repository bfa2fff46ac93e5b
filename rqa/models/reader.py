"""How a local reader generates: settings, prompts of similar length together, and what an answer took."""

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from torch import nn
from tqdm import tqdm
from transformers import GenerationConfig

from rqa.data import Document, Example
from rqa.packing import token_budget_batches
from rqa.prompts import DoesNotFit
from rqa.runtime.errors import UserError, check_bounds
from rqa.runtime.parallelize import in_step

log = logging.getLogger(__name__)

Prompt = TypeVar("Prompt")

WARM_UP_TOKENS = 4


@dataclass
class GenerationArguments:
    """How answers are generated."""

    num_beams: int = field(default=1, metadata={"help": "Beams of the search; 1: greedy."})
    do_sample: bool = field(default=False, metadata={"help": "Sample instead of taking the likeliest token."})
    temperature: float = field(default=1.0, metadata={"help": "Of sampling."})
    top_p: float = field(default=1.0, metadata={"help": "Sample from the likeliest tokens of this total probability."})

    def __post_init__(self) -> None:
        check_bounds(self, "num_beams", at_least=1)
        check_bounds(self, "temperature", above=0)
        check_bounds(self, "top_p", above=0, at_most=1)
        if not self.do_sample and (self.temperature, self.top_p) != (1.0, 1.0):
            raise UserError("--temperature and --top_p need --do_sample true")

    def config(self, max_new_tokens: int, stop: Sequence[int], **options: Any) -> GenerationConfig:
        """These settings as `transformers` takes them; answers end at any of the stop tokens."""
        sampling = {"temperature": self.temperature, "top_p": self.top_p, "top_k": 0} if self.do_sample else {}
        return GenerationConfig(
            max_new_tokens=max_new_tokens,
            num_beams=self.num_beams,
            do_sample=self.do_sample,
            **sampling,
            min_length=0,  # what is not set here comes from the checkpoint's generation_config.json
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
            eos_token_id=list(stop),
            pad_token_id=stop[0],
            **options,
        )


@dataclass(frozen=True)
class Answer:
    """A generated answer and what it took.

    Attributes:
        text: The answer.
        num_tokens: Tokens generated.
        seconds: How long its batch took: what a user who asked it would have waited. None where nothing was generated:
            the question did not fit, or the answer was kept from an earlier run.
        batch_size: Questions that were answered together.
    """

    text: str
    num_tokens: int
    seconds: float | None = None
    batch_size: int = 1


class LocalReader(ABC, Generic[Prompt]):
    """A reader in this process; each kind says what a prompt is, what it costs and how answers are generated.

    Attributes:
        model: May be in training, its mode is restored.
        max_batch_tokens: What the prompts of one batch may cost together.
    """

    def __init__(
        self,
        model: nn.Module,
        prompter: Any,
        arguments: GenerationArguments | None = None,
        max_batch_tokens: int = 16384,
    ) -> None:
        self.model = model
        self.prompter = prompter
        self.arguments = arguments or GenerationArguments()
        self.max_batch_tokens = max_batch_tokens

    @property
    @abstractmethod
    def filler(self) -> Prompt:
        """What a sharded model is asked when another process has more to ask."""

    @abstractmethod
    def encode(self, example: Example, passages: Sequence[Document]) -> Prompt:
        """The prompt of a question; raises `DoesNotFit`."""

    @abstractmethod
    def cost(self, prompt: Prompt) -> int:
        """The tokens that a prompt adds to a batch."""

    @abstractmethod
    def generate(self, prompts: Sequence[Prompt], max_new_tokens: int | None = None) -> list[list[int]]:
        """Answers of one batch of prompts, up to the token that ends them. [B] -> [B]

        Args:
            max_new_tokens: Of each; by default as many as an answer may have.
        """

    def answer(
        self, examples: Sequence[Example], passages: Sequence[Sequence[Document]], progress: bool = True
    ) -> list[Answer]:
        """One answer for each question. [Q] -> [Q]

        A question that does not fit by itself is reported and answered by nothing.
        """
        return self.answer_prompts([self._prompt(*pair) for pair in zip(examples, passages, strict=True)], progress)

    def warm_up(self, example: Example, passages: Sequence[Document]) -> None:
        """Begin an answer, so that what only a first batch costs is in no latency."""
        if prompt := self._prompt(example, passages):
            self.generate([prompt], WARM_UP_TOKENS)

    def answer_prompts(self, prompts: Sequence[Prompt | None], progress: bool) -> list[Answer]:
        """One answer for each prompt, those of similar length together; no prompt, nothing for an answer. [Q] -> [Q]"""
        answers = [Answer("", 0)] * len(prompts)
        asked = {index: prompt for index, prompt in enumerate(prompts) if prompt}
        numbers = list(asked)
        batches = token_budget_batches(list(map(self.cost, asked.values())), self.max_batch_tokens, padded=True)
        with tqdm(total=len(asked), desc="generate", unit="q", disable=not progress, leave=False) as bar:
            for chosen in in_step(self.model, batches, filler=[]):
                batch = [numbers[place] for place in chosen]
                started = time.perf_counter()
                generated = self.generate([asked[index] for index in batch] or [self.filler])
                seconds = time.perf_counter() - started
                for index, ids in zip(batch, generated, strict=bool(batch)):
                    answers[index] = Answer(self.prompter.decode(ids), len(ids), seconds, len(batch))
                bar.update(len(batch))
        return answers

    def _prompt(self, example: Example, passages: Sequence[Document]) -> Prompt | None:
        try:
            return self.encode(example, passages)
        except DoesNotFit as error:
            log.warning("%s; it is left unanswered", error)
            return None
