"""How a local reader generates: settings, prompts of similar length together, and what an answer took."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import nn
from tqdm import tqdm
from transformers import GenerationConfig

from rqa.packing import token_budget_batches
from rqa.runtime.errors import UserError
from rqa.runtime.parallelize import in_step

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
        if self.num_beams < 1:
            raise UserError(f"--num_beams {self.num_beams}: must be at least 1")
        if self.temperature <= 0:
            raise UserError(f"--temperature {self.temperature}: must be positive; --do_sample false is greedy")
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top_p {self.top_p}: must be above 0 and at most 1")
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
    """

    text: str
    num_tokens: int
    seconds: float | None = None


def answer_in_batches(
    model: nn.Module,
    prompts: Sequence[Prompt],
    lengths: Sequence[int],
    max_batch_tokens: int,
    generate: Callable[[Sequence[Prompt]], list[list[int]]],
    decode: Callable[[Sequence[int]], str],
    filler: Prompt,
    progress: bool,
) -> list[Answer]:
    """One answer for each prompt, those of similar length together; an empty prompt is answered by nothing. [Q] -> [Q]

    Args:
        lengths: Tokens that each prompt costs.
        generate: A batch of prompts -> the answers' token ids.
        filler: What a sharded model is asked when another process has more to ask.
    """
    answers = [Answer("", 0)] * len(prompts)
    asked = [index for index, prompt in enumerate(prompts) if prompt]
    batches = token_budget_batches([lengths[index] for index in asked], max_batch_tokens, padded=True)
    with tqdm(total=len(asked), desc="generate", unit="q", disable=not progress, leave=False) as bar:
        for chosen in in_step(model, batches, filler=[]):
            batch = [asked[number] for number in chosen]
            started = time.perf_counter()
            generated = generate([prompts[i] for i in batch] or [filler])
            seconds = time.perf_counter() - started
            for index, ids in zip(batch, generated, strict=bool(batch)):
                answers[index] = Answer(decode(ids), len(ids), seconds)
            bar.update(len(batch))
    return answers
