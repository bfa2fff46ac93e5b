"""Readers in this process: generation of answers."""

import inspect
import itertools
import logging
import math
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList, TopPLogitsWarper

from rqa.data import Answer, Document, Example
from rqa.models import loading
from rqa.models.attention import PACKED_ATTENTION
from rqa.models.loading import attention_of, batching_is_exact, evaluating, hidden_states, not_finite
from rqa.packing import pack, pad, token_budget_batches
from rqa.prompts import fitting
from rqa.runtime import cli, distributed
from rqa.runtime.errors import UserError, one_line
from rqa.runtime.flags import Arguments, flag
from rqa.runtime.parallelize import in_step, is_sharded

log = logging.getLogger(__name__)

NOT_FINITE = -2  # replaces all tokens of an answer with NaN or infinite logits
# Called between tokens with the unfinished answers of a batch; returns which ones can be abandoned.
Watch = Callable[[list[list[int]]], list[bool]]

LOOK_EVERY = 8  # steps between two checks whether all answers have ended, which make CUDA wait for Python


@dataclass(kw_only=True)
class GenerationArguments(Arguments):
    """Generation of answers."""

    num_beams: int = flag(1, "Beams of beam search; 1: greedy search.")
    do_sample: bool = flag(False, "Whether to sample tokens instead of taking the most likely one.", rare=True)
    temperature: float = flag(1.0, "Sampling temperature.", rare=True)
    top_p: float = flag(1.0, "Total probability of the most likely tokens to sample from.", rare=True)
    generation_batch_tokens: int = flag(16384, "Tokens of a batch of prompts, with padding, at most.", rare=True)

    def check(self) -> None:
        self.check_bounds("num_beams", "generation_batch_tokens", at_least=1)
        self.check_bounds("temperature", above=0)
        self.check_bounds("top_p", above=0, at_most=1)
        if not self.do_sample and (self.temperature, self.top_p) != (1.0, 1.0):
            raise UserError("--temperature and --top_p need --do_sample true")

    def config(self, max_new_tokens: int, stop: Sequence[int], **options: Any) -> GenerationConfig:
        """A `GenerationConfig` with these settings; answers end at any of the stop tokens."""
        sampling = {"temperature": self.temperature, "top_p": self.top_p, "top_k": 0} if self.do_sample else {}
        search = {"num_beams": self.num_beams, "do_sample": self.do_sample, "max_new_tokens": max_new_tokens}
        return GenerationConfig(**search, **sampling, eos_token_id=list(stop), pad_token_id=stop[0], **options)

    def next_tokens(self, logits: Tensor) -> Tensor:
        """The most likely tokens, or sampled ones, with the same settings as `config`. [B, V] -> [B]"""
        if not self.do_sample:
            return logits.argmax(-1)
        odds = TopPLogitsWarper(self.top_p)(None, logits.float() / self.temperature).softmax(-1)  # [B, V]
        return (odds / torch.empty_like(odds).exponential_()).argmax(-1)


def until_end(ids: Sequence[int], ends: Sequence[int]) -> list[int]:
    """An answer's tokens before the first stop token or the first unfilled place (-1)."""
    return list(itertools.takewhile(lambda token: token != -1 and token not in ends, ids))


def generate(
    model: PreTrainedModel, config: GenerationConfig, start: int, look: Watch | None = None, **inputs: Any
) -> Tensor:
    """Tokens of `model.generate` after the first `start`; the checkpoint's own generation settings are ignored."""
    theirs, model.generation_config = model.generation_config, GenerationConfig()
    spoiled: list[Tensor] = []  # for each step, which beams had logits that are not finite. [B * beams]

    def watch(_: Tensor, scores: Tensor) -> Tensor:
        spoiled.append(~scores.amax(-1).isfinite())
        return scores.masked_fill(spoiled[-1][:, None], 0)  # sampling on CUDA would fail

    def stop(tokens: Tensor, *_: Any, **__: Any) -> Tensor:
        assert look
        ended = look([until_end(ids, config.eos_token_id) for ids in tokens[:, start:].tolist()])
        return torch.tensor(ended, device=tokens.device)

    try:
        looking = StoppingCriteriaList([stop] if look and config.num_beams == 1 else [])
        processors = LogitsProcessorList([watch])
        new = model.generate(
            **inputs, generation_config=config, logits_processor=processors, stopping_criteria=looking
        )[:, start:]
        return new.masked_fill(torch.stack(spoiled).any(0).view(len(new), -1).any(1, keepdim=True), NOT_FINITE)
    finally:
        model.generation_config = theirs


class LocalReader(ABC):
    """A reader in this process; subclasses define prompts, their cost and generation."""

    def __init__(self, model: nn.Module, prompter: Any, flags: GenerationArguments, filler: Any, most: int) -> None:
        self.model, self.prompter, self.flags = model, prompter, flags
        self.most = most  # tokens of an answer, at most
        self.filler = filler  # a prompt to run a sharded model with while other processes have more questions

    def encode(self, example: Example, passages: Sequence[Document]) -> Any:
        """The prompt of a question; raises `DoesNotFit`."""
        return self.prompter.encode(example, passages)

    @abstractmethod
    def cost(self, prompt: Any) -> int:
        """Tokens that a prompt adds to a batch."""

    @abstractmethod
    def new_tokens(self, prompts: Sequence[Any], most: int, watch: Watch | None) -> list[list[int]]:
        """At most `most` tokens after each prompt of a batch; what follows a stop token does not count. [B] -> [B]"""

    @torch.no_grad()
    @torch.compiler.set_stance("force_eager")  # else each layer, with its own cache, would be compiled separately
    def generate(
        self, prompts: Sequence[Any], max_new_tokens: int | None = None, watch: Watch | None = None
    ) -> list[list[int]]:
        """Token ids of the answers to one batch of prompts, without stop tokens. [B] -> [B]"""
        with evaluating(self.model):
            answers = self.new_tokens(prompts, max_new_tokens or self.most, watch)
        return [until_end(ids, self.prompter.stop_ids) for ids in answers]

    def answer(self, examples: Sequence[Example], passages: Sequence[Sequence[Document]]) -> list[Answer]:
        """An answer for each question; a question that does not fit is logged and gets an empty answer. [Q] -> [Q]"""
        fitted = fitting(self.encode, zip(examples, passages, strict=True), "it gets an empty answer")
        return self.answer_prompts([fitted.get(number) for number in range(len(examples))], examples)

    def warm_up(self, example: Example, passages: Sequence[Document]) -> None:
        """Generate a few tokens, so that later latencies do not include the first batch's set-up."""
        if fitted := fitting(self.encode, [(example, passages)], "it gets an empty answer"):
            self.generate([fitted[0]], 4)  # tokens

    def answer_prompts(self, prompts: Sequence[Any], asking: Sequence[Example] = ()) -> list[Answer]:
        """An answer for each prompt, empty if the prompt is None; batches have similar lengths. [Q] -> [Q]"""
        answers = [Answer("", 0)] * len(prompts)
        present = [index for index, prompt in enumerate(prompts) if prompt]
        costs = [self.cost(prompts[index]) for index in present]
        batches = token_budget_batches(costs, self.flags.generation_batch_tokens, padded=True)
        with cli.progress(total=len(present), desc="generate", unit="q", disable=not distributed.is_main()) as bar:
            for chosen in in_step(self.model, batches, filler=[]):
                batch = [present[place] for place in chosen]
                started = time.perf_counter()
                generated = self.generate([prompts[index] for index in batch] or [self.filler])
                seconds = time.perf_counter() - started
                for index, ids in zip(batch, generated, strict=bool(batch)):
                    if NOT_FINITE in ids:
                        raise not_finite(self.model, "answer", asking[index].question if asking else "a prompt")
                    text, cut = self.prompter.decode(ids), len(ids) >= self.most  # `ids` has no stop token
                    answers[index] = Answer(text, len(ids), seconds, len(batch), cut)
                bar.update(len(batch))
        return answers


def read_prompts(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], length: int
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Read prompts as one packed row. -> the logits of their next tokens [B, V], and each layer's keys and values

    These have shape [B, H_kv, length, d]: padded on the left to the longest prompt, with room for new tokens.
    """
    batch, kept = pack(prompts).to(model.device), []
    ends = batch.starts + batch.lengths - 1  # [B]
    logits = model(**batch.inputs, use_cache=False, kept=kept, logits_to_keep=ends).logits[0]
    columns = batch.inputs["position_ids"][0] + (batch.lengths.max() - batch.lengths)[batch.owners]  # [T]

    def laid(states: Tensor, dtype: torch.dtype) -> Tensor:
        room = states.new_zeros((len(prompts), states.shape[1], length, states.shape[3]), dtype=dtype)
        room.transpose(1, 2)[batch.owners, columns] = states[0].transpose(0, 1).to(dtype)
        return room

    return logits, [(laid(keys, values.dtype), laid(values, values.dtype)) for keys, values in kept]


def in_graph(step: Callable[[], None]) -> Callable[[], None]:
    """The step as a CUDA graph, or unchanged if capture fails. Runs it at least once, so it must be repeatable."""
    stream, mode, graph = torch.cuda.current_stream(), torch.cuda.get_sync_debug_mode(), torch.cuda.CUDAGraph()
    try:
        # Raise for device syncs before the capture: a failed capture breaks the random generator.
        with warnings.catch_warnings():  # torch warns that this mode is a prototype
            warnings.simplefilter("ignore")
            torch.cuda.set_sync_debug_mode("error")
        step()
        torch.cuda.set_sync_debug_mode(mode)
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads may use the device
            step()
        return graph.replay
    except RuntimeError as error:
        log.warning("generation is slower here: no CUDA graph can be captured (%s)", one_line(error))
        torch.cuda.set_stream(stream)
        return step
    finally:
        torch.cuda.set_sync_debug_mode(mode)


class CausalLMReader(LocalReader):
    """Answers questions over passages with a decoder; prompts are token ids."""

    def __init__(self, model: Any, prompter: Any, flags: GenerationArguments = GenerationArguments()) -> None:
        prompter.arguments = loading.within_positions(model, prompter.arguments, "max_seq_length")
        super().__init__(model, prompter, flags, prompter.stop_ids, prompter.arguments.max_new_tokens)
        self.positions = loading.learned_positions(model)
        self.captures = model.device.type == "cuda"  # whether to capture CUDA graphs; until one fails
        self.loop = self.most  # an answer ends when it repeats this many tokens

    def encode(self, example: Example, passages: Sequence[Document]) -> list[int]:
        return self.prompter.encode(example, passages).ids

    def cost(self, prompt: list[int]) -> int:
        return len(prompt) + self.most

    @cached_property
    def _reach(self) -> float | None:
        """The attention window, infinite without one; None if `_decode` does not support the model."""
        model, kept, config = self.model, [], self.model.config.get_text_config(decoder=True)
        kinds, window = set(getattr(config, "layer_types", None) or []), getattr(config, "sliding_window", None)
        keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
        if keeps_logits and attention_of(model) == PACKED_ATTENTION and batching_is_exact(model):
            hidden_states(model, pack([[0]]).to(model.device), kept=kept)
        if len(kept) != config.num_hidden_layers or kinds not in (set(), {"full_attention"}, {"sliding_attention"}):
            return None
        return math.inf if window is None or kinds == {"full_attention"} else window

    def new_tokens(self, prompts: Sequence[list[int]], most: int, watch: Watch | None) -> list[list[int]]:
        most = int(min(most, self.positions + 1 - max(map(len, prompts))))  # the last token needs no position
        synced = is_sharded(self.model)  # sharded processes must keep stepping until all are done
        if not synced and self.flags.num_beams == 1 and self._reach is not None:
            return self._decode(prompts, most, self._reach, watch)
        flipped = pad([prompt[::-1] for prompt in prompts]).to(self.model.device).inputs
        inputs = {name: value.flip(1) for name, value in flipped.items()}  # padded on the left
        start, config = inputs["input_ids"].shape[1], self.flags.config(most, self.prompter.stop_ids)
        return generate(self.model, config, start, watch, **inputs, synced_gpus=synced).tolist()  # [B, new]

    def _decode(self, prompts: Sequence[list[int]], most: int, reach: float, watch: Watch | None) -> list[list[int]]:
        """New tokens without beam search, -1 where generation stopped before. -> [B, most]"""
        longest, stop = max(map(len, prompts)), self.prompter.stop_ids
        length = -(-(longest + most) // 16) * 16  # CUDA's attention would copy masks of other widths in each layer
        logits, states = read_prompts(self.model, prompts, length)
        tokens = torch.full((len(prompts), length), -1, device=logits.device)  # in the same columns as keys
        tokens[:, longest], spoiled = self.flags.next_tokens(logits), ~logits.amax(-1).isfinite()  # [B]
        columns, place = torch.arange(length, device=logits.device), tokens.new_tensor([longest])  # [L], [1]
        padding, ends = tokens.new_tensor([[longest - len(prompt)] for prompt in prompts]), tokens.new_tensor(stop)
        hidden = torch.full_like(tokens, -torch.inf, dtype=states[0][0].dtype)  # [B, L]
        options = {"cached": (states, place), "use_cache": False, "logits_to_keep": 1}

        def step() -> None:
            """Write the token after `place`, and mark rows whose logits are not finite; may be repeated."""
            seen = (columns >= padding) & (columns <= place) & (columns > place - reach)  # [B, L]
            inputs = {"input_ids": tokens.index_select(1, place), "position_ids": place - padding}
            mask = hidden.masked_fill(seen, 0)[:, None, None]  # [B, 1, 1, L]
            logits = self.model(**inputs, **options, attention_mask=mask).logits[:, -1]
            tokens.index_copy_(1, place + 1, self.flags.next_tokens(logits)[:, None])
            spoiled.logical_or_(~logits.amax(-1).isfinite())

        advance, look_every = step, LOOK_EVERY if self.captures else 1
        # All backends but cuDNN, which builds kernels for each batch size and length.
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
            for done in range(1, most):
                if done % look_every == 0:
                    new = tokens[:, longest : longest + done]
                    spans = new.unfold(1, min(self.loop, done), 1)  # [B, done - loop + 1, loop]
                    ended = (spans[:, :-1] == spans[:, -1:]).all(2).any(1) | torch.isin(new, ends).any(1)
                    if watch:
                        ended |= ended.new_tensor(watch([until_end(ids, stop) for ids in new.tolist()]))
                    if ended.all():
                        break
                place.fill_(longest + done - 1)
                if done == 1 and self.captures and not torch.is_autocast_enabled("cuda"):
                    advance = in_graph(step)
                    self.captures = advance is not step
                advance()
        return tokens[:, longest : longest + most].masked_fill(spoiled[:, None], NOT_FINITE).tolist()
