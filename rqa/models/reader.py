"""How a local reader generates: settings, prompts of similar length together, and what an answer took."""

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, PreTrainedModel, StaticCache

from rqa.data import Document, Example
from rqa.models.attention import PACKED_ATTENTION
from rqa.models.loading import attention_of, evaluating, hidden_states, packing_is_exact
from rqa.packing import pack, token_budget_batches
from rqa.prompts import fitting
from rqa.runtime import cli
from rqa.runtime.errors import UserError
from rqa.runtime.flags import Arguments, flag
from rqa.runtime.parallelize import in_step, is_sharded

WARM_UP_TOKENS = 4


@dataclass(kw_only=True)
class GenerationArguments(Arguments):
    """How answers are generated."""

    num_beams: int = flag(1, "Beams of the search; 1 is greedy search.")
    do_sample: bool = flag(False, "Whether to sample tokens instead of taking the likeliest one.", rare=True)
    temperature: float = flag(1.0, "Sampling temperature.", rare=True)
    top_p: float = flag(1.0, "Total probability of the likeliest tokens, which are sampled from.", rare=True)

    def check(self) -> None:
        self.check_bounds("num_beams", at_least=1)
        self.check_bounds("temperature", above=0)
        self.check_bounds("top_p", above=0, at_most=1)
        if not self.do_sample and (self.temperature, self.top_p) != (1.0, 1.0):
            raise UserError("--temperature and --top_p need --do_sample true")

    def config(self, max_new_tokens: int, stop: Sequence[int], **options: Any) -> GenerationConfig:
        """These settings as `transformers` takes them; answers end at any of the stop tokens."""
        sampling = {"temperature": self.temperature, "top_p": self.top_p, "top_k": 0} if self.do_sample else {}
        # What is not set here would come from the checkpoint's generation_config.json.
        unset = {"min_length": 0, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0}
        ends = {"max_new_tokens": max_new_tokens, "eos_token_id": list(stop), "pad_token_id": stop[0]}
        search = {"num_beams": self.num_beams, "do_sample": self.do_sample}
        return GenerationConfig(**search, **sampling, **unset, **ends, **options)


@dataclass(frozen=True)
class Answer:
    """A generated answer and what it took."""

    text: str
    num_tokens: int
    seconds: float | None = None  # of its batch; None: nothing was generated, as no prompt fits or it was kept
    batch_size: int = 1  # questions of that batch; only if it is 1 are the seconds what a user would have waited


class LocalReader(ABC):
    """A reader in this process. Each kind says what a prompt is, what it costs and how answers are generated."""

    def __init__(self, model: nn.Module, prompter: Any, flags: GenerationArguments, filler: Any) -> None:
        self.model, self.prompter, self.flags = model, prompter, flags
        self.filler = filler  # the prompt for a sharded model when another process has more questions
        self.max_batch_tokens = 16384  # what the prompts of one batch may cost together

    def encode(self, example: Example, passages: Sequence[Document]) -> Any:
        """The prompt of a question; raises `DoesNotFit`."""
        return self.prompter.encode(example, passages)

    @abstractmethod
    def cost(self, prompt: Any) -> int:
        """The tokens that a prompt adds to a batch."""

    @abstractmethod
    def generate(self, prompts: Sequence[Any], max_new_tokens: int | None = None) -> list[list[int]]:
        """Answers of one batch of prompts, each up to the token that ends it. [B] -> [B]"""

    def answer(
        self, examples: Sequence[Example], passages: Sequence[Sequence[Document]], progress: bool = True
    ) -> list[Answer]:
        """One answer for each question; one that does not fit is logged and gets an empty answer. [Q] -> [Q]"""
        return self.answer_prompts(self._prompts(examples, passages), progress)

    def warm_up(self, example: Example, passages: Sequence[Document]) -> None:
        """Begin an answer, so that no latency contains what only a first batch costs."""
        if any(prompts := self._prompts([example], [passages])):
            self.generate(prompts, WARM_UP_TOKENS)

    def answer_prompts(self, prompts: Sequence[Any], progress: bool) -> list[Answer]:
        """One answer for each prompt, those of similar length together; empty where there is no prompt. [Q] -> [Q]"""
        answers = [Answer("", 0)] * len(prompts)
        asked = [index for index, prompt in enumerate(prompts) if prompt]
        costs = [self.cost(prompts[index]) for index in asked]
        batches = token_budget_batches(costs, self.max_batch_tokens, padded=True)
        with cli.progress(total=len(asked), desc="generate", unit="q", disable=not progress) as bar:
            for chosen in in_step(self.model, batches, filler=[]):
                batch = [asked[place] for place in chosen]
                started = time.perf_counter()
                generated = self.generate([prompts[index] for index in batch] or [self.filler])
                seconds = time.perf_counter() - started
                for index, ids in zip(batch, generated, strict=bool(batch)):
                    answers[index] = Answer(self.prompter.decode(ids), len(ids), seconds, len(batch))
                bar.update(len(batch))
        return answers

    def _prompts(self, examples: Sequence[Example], passages: Sequence[Sequence[Document]]) -> list[Any]:
        fitted = fitting(self.encode, zip(examples, passages, strict=True), "it is left unanswered")
        return [fitted.get(number) for number in range(len(examples))]


class InPlaceCache(StaticCache):
    """Keys and values written in place; `transformers` otherwise copies all of them for each token."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        # Rotary embeddings leave float32 beside autocast's values, and the cache has one dtype.
        return super().update(key_states.to(value_states.dtype), value_states, *args, **kwargs)


def new_cache(model: PreTrainedModel, length: int) -> StaticCache | None:
    """An empty cache for so many tokens of each sequence; None if the model needs a cache of its own kind."""
    fits = model._can_compile_fullgraph  # private: transformers says nowhere else which models take a StaticCache
    return InPlaceCache(model.config, max_cache_len=length) if fits else None


def read_prompts(model: PreTrainedModel, prompts: Sequence[Sequence[int]], cache: StaticCache) -> None:
    """Put keys and values of all but each prompt's last token into an empty cache, from one packed row.

    `generate`, which would read a padded batch under a mask, goes on from there, with prompts padded on the left.
    """
    batch = pack([prompt[:-1] for prompt in prompts]).to(model.device)
    kept: list[tuple[Tensor, Tensor]] = []
    hidden_states(model, batch, kept=kept)
    if len(kept) != len(cache.layers):  # layers share their keys: `generate` reads the prompts itself
        return
    lengths = batch.lengths.tolist()
    for layer, states in enumerate(kept):
        rows = [x[0].transpose(0, 1).split(lengths) for x in states]  # of keys and of values: [L_i, H_kv, d] each
        padded = (pad_sequence(list(x), batch_first=True, padding_side="left") for x in rows)  # [B, L, H_kv, d]
        cache.update(*(x.transpose(1, 2) for x in padded), layer)


class CausalLMReader(LocalReader):
    """Answers questions over passages with a decoder, from prompts of token ids."""

    def __init__(self, model: Any, prompter: Any, flags: GenerationArguments = GenerationArguments()) -> None:
        super().__init__(model, prompter, flags, filler=prompter.stop_ids)

    def encode(self, example: Example, passages: Sequence[Document]) -> list[int]:
        return self.prompter.encode(example, passages).ids

    def cost(self, prompt: list[int]) -> int:
        return len(prompt) + self.prompter.arguments.max_new_tokens

    @cached_property
    def _packs(self) -> bool:
        """Whether prompts are read as one packed row, without padding."""
        return attention_of(self.model) == PACKED_ATTENTION and packing_is_exact(self.model)

    @torch.no_grad()
    @torch.compiler.set_stance("force_eager")  # or each layer would be compiled anew, as each has a cache of its own
    def generate(self, prompts: Sequence[list[int]], max_new_tokens: int | None = None) -> list[list[int]]:
        stop, most = self.prompter.stop_ids, max_new_tokens or self.prompter.arguments.max_new_tokens
        left = {"batch_first": True, "padding_side": "left"}
        ids = pad_sequence([torch.tensor(prompt) for prompt in prompts], padding_value=stop[0], **left)  # [B, L]
        mask = pad_sequence([torch.ones(len(prompt), dtype=torch.long) for prompt in prompts], **left)  # [B, L]
        config = self.flags.config(most, stop, disable_compile=True)
        synced = is_sharded(self.model)  # then a process that is done steps on until all are
        with evaluating(self.model):
            cache = new_cache(self.model, ids.shape[1] + most)
            plain = not synced and config.num_beams == 1 and min(map(len, prompts)) > 1
            if cache is not None and plain and self._packs:
                read_prompts(self.model, prompts, cache)
            options = {"generation_config": config, "synced_gpus": synced, "past_key_values": cache}
            inputs = {"input_ids": ids.to(self.model.device), "attention_mask": mask.to(self.model.device)}
            answers = self.model.generate(**inputs, **options)[:, ids.shape[1] :].tolist()  # [B, new]
        return [ids[: next((i for i, token in enumerate(ids) if token in stop), len(ids))] for ids in answers]
