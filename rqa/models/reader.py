"""Answers of models in this process: how they are generated, what each took, and the logits of given ones."""

import inspect
import itertools
import logging
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteriaList,
    TopPLogitsWarper,
)

from rqa.data import Document, Example
from rqa.models import loading
from rqa.models.attention import PACKED_ATTENTION
from rqa.models.loading import attention_of, batching_is_exact, evaluating, hidden_states, not_finite
from rqa.packing import AnswerBatch, pack, pad, token_budget_batches
from rqa.prompts import fitting
from rqa.runtime import cli
from rqa.runtime.errors import UserError, one_line
from rqa.runtime.flags import Arguments, flag
from rqa.runtime.parallelize import in_step, is_sharded

log = logging.getLogger(__name__)

NOT_FINITE = -2  # stands for the tokens of an answer some of whose logits were NaN or infinite
# Called between tokens with each answer of a batch as far as it has come; tells which ones nobody waits for any more.
Watch = Callable[[list[list[int]]], list[bool]]

LOOK_EVERY = 8  # steps until CUDA is asked whether all answers have ended, which makes it wait for Python


@dataclass(kw_only=True)
class GenerationArguments(Arguments):
    """How answers are generated."""

    num_beams: int = flag(1, "Beams of the search; 1 is greedy search.")
    do_sample: bool = flag(False, "Whether to sample tokens instead of taking the likeliest one.", rare=True)
    temperature: float = flag(1.0, "Sampling temperature.", rare=True)
    top_p: float = flag(1.0, "Total probability of the likeliest tokens, which are sampled from.", rare=True)
    generation_batch_tokens: int = flag(16384, "Tokens of a batch of prompts, at most, padding included.", rare=True)

    def check(self) -> None:
        self.check_bounds("num_beams", "generation_batch_tokens", at_least=1)
        self.check_bounds("temperature", above=0)
        self.check_bounds("top_p", above=0, at_most=1)
        if not self.do_sample and (self.temperature, self.top_p) != (1.0, 1.0):
            raise UserError("--temperature and --top_p need --do_sample true")

    def config(self, max_new_tokens: int, stop: Sequence[int], **options: Any) -> GenerationConfig:
        """These settings as `transformers` takes them; answers end at any of the stop tokens."""
        sampling = {"temperature": self.temperature, "top_p": self.top_p, "top_k": 0} if self.do_sample else {}
        search = {"num_beams": self.num_beams, "do_sample": self.do_sample, "max_new_tokens": max_new_tokens}
        return GenerationConfig(**search, **sampling, eos_token_id=list(stop), pad_token_id=stop[0], **options)

    def next_tokens(self, logits: Tensor) -> Tensor:
        """The likeliest tokens, or sampled ones as `config` has them sampled. [B, V] -> [B]"""
        if not self.do_sample:
            return logits.argmax(-1)
        odds = TopPLogitsWarper(self.top_p)(None, logits.float() / self.temperature).softmax(-1)  # [B, V]
        return (odds / torch.empty_like(odds).exponential_()).argmax(-1)


def until_end(ids: Sequence[int], ends: Sequence[int]) -> list[int]:
    """An answer's tokens before the first that ends it, or that is not there yet (-1)."""
    return list(itertools.takewhile(lambda token: token != -1 and token not in ends, ids))


def generate(
    model: PreTrainedModel, config: GenerationConfig, start: int, look: Watch | None = None, **inputs: Any
) -> Tensor:
    """What `model.generate` puts behind the `start` first tokens, by this configuration alone: no checkpoint's own."""
    theirs, model.generation_config = model.generation_config, GenerationConfig()
    spoiled: list[Tensor] = []  # of each step, which beams are. [B * beams]

    def watch(_: Tensor, scores: Tensor) -> Tensor:
        spoiled.append(~scores.amax(-1).isfinite())
        return scores.masked_fill(spoiled[-1][:, None], 0)  # or CUDA would fail to sample

    def stop(tokens: Tensor, *_: Any, **__: Any) -> Tensor:
        assert look
        ended = look([until_end(ids, config.eos_token_id) for ids in tokens[:, start:].tolist()])
        return torch.tensor(ended, device=tokens.device)

    try:
        looking = StoppingCriteriaList([stop] if look and config.num_beams == 1 else [])
        processors = LogitsProcessorList([watch])
        found = model.generate(
            **inputs, generation_config=config, logits_processor=processors, stopping_criteria=looking
        )[:, start:]
        return found.masked_fill(torch.stack(spoiled).any(0).view(len(found), -1).any(1, keepdim=True), NOT_FINITE)
    finally:
        model.generation_config = theirs


@dataclass(frozen=True)
class Answer:
    """A generated answer and what it took."""

    text: str
    num_tokens: int
    seconds: float | None = None  # of its batch; None: nothing was generated, as no prompt fits or it was kept
    batch_size: int = 1  # questions of that batch; only if it is 1 are the seconds what a user would have waited
    cut: bool = False  # whether it reached the limit of new tokens before its end


class LocalReader(ABC):
    """A reader in this process. Each kind says what a prompt is, what it costs and how answers are generated."""

    def __init__(self, model: nn.Module, prompter: Any, flags: GenerationArguments, filler: Any, most: int) -> None:
        self.model, self.prompter, self.flags = model, prompter, flags
        self.most = most  # tokens of an answer
        self.filler = filler  # the prompt for a sharded model when another process has more questions

    def encode(self, example: Example, passages: Sequence[Document]) -> Any:
        """The prompt of a question; raises `DoesNotFit`."""
        return self.prompter.encode(example, passages)

    @abstractmethod
    def cost(self, prompt: Any) -> int:
        """The tokens that a prompt adds to a batch."""

    @abstractmethod
    def generate(
        self, prompts: Sequence[Any], max_new_tokens: int | None = None, watch: Watch | None = None
    ) -> list[list[int]]:
        """Answers of one batch of prompts, each up to the token that ends it. [B] -> [B]"""

    def answer(
        self, examples: Sequence[Example], passages: Sequence[Sequence[Document]], progress: bool = True
    ) -> list[Answer]:
        """One answer for each question; one that does not fit is logged and gets an empty answer. [Q] -> [Q]"""
        fitted = fitting(self.encode, zip(examples, passages, strict=True), "it is left unanswered")
        return self.answer_prompts([fitted.get(number) for number in range(len(examples))], progress, examples)

    def warm_up(self, example: Example, passages: Sequence[Document]) -> None:
        """Begin an answer, so that no latency contains what only a first batch costs."""
        if fitted := fitting(self.encode, [(example, passages)], "it is left unanswered"):
            self.generate([fitted[0]], 4)  # tokens

    def answer_prompts(self, prompts: Sequence[Any], progress: bool, asking: Sequence[Example] = ()) -> list[Answer]:
        """One answer for each prompt, those of similar length together; empty where there is no prompt. [Q] -> [Q]"""
        answers = [Answer("", 0)] * len(prompts)
        asked = [index for index, prompt in enumerate(prompts) if prompt]
        costs = [self.cost(prompts[index]) for index in asked]
        batches = token_budget_batches(costs, self.flags.generation_batch_tokens, padded=True)
        with cli.progress(total=len(asked), desc="generate", unit="q", disable=not progress) as bar:
            for chosen in in_step(self.model, batches, filler=[]):
                batch = [asked[place] for place in chosen]
                started = time.perf_counter()
                generated = self.generate([prompts[index] for index in batch] or [self.filler])
                seconds = time.perf_counter() - started
                for index, ids in zip(batch, generated, strict=bool(batch)):
                    if NOT_FINITE in ids:
                        raise not_finite(self.model, "answer", asking[index].question if asking else "a prompt")
                    text, cut = self.prompter.decode(ids), len(ids) >= self.most  # without the token that ends it
                    answers[index] = Answer(text, len(ids), seconds, len(batch), cut)
                bar.update(len(batch))
        return answers


def answer_logits(model: PreTrainedModel, batch: AnswerBatch) -> Tensor:
    """Next-token logits of a decoder at the answers' positions; the output layer runs on no other token. -> [N, V]"""
    inputs = batch.tokens.inputs
    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        return model(**inputs, use_cache=False).logits.flatten(0, 1)[batch.positions]
    logits = model(**inputs, use_cache=False, logits_to_keep=batch.columns).logits  # [B, C, V], or [1, N, V]
    rows = batch.positions // inputs["input_ids"].shape[1]  # [N]
    return logits[0] if len(logits) == 1 else logits[rows, batch.column_of]


def read_prompts(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], length: int
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Read prompts as one packed row: the logits of their next tokens [B, V], and keys and values of each layer.

    These, [B, H_kv, length, d], are padded on the left up to the longest prompt, and have room for new tokens.
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
    """A step as a CUDA graph, or as it is where that fails; it is made once here, and must bear to be made again."""
    stream, mode, graph = torch.cuda.current_stream(), torch.cuda.get_sync_debug_mode(), torch.cuda.CUDAGraph()
    try:
        # What waits for the device raises here already: random numbers would not survive a capture that fails.
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
    """Answers questions over passages with a decoder, from prompts of token ids."""

    def __init__(self, model: Any, prompter: Any, flags: GenerationArguments = GenerationArguments()) -> None:
        prompter.arguments = loading.within_positions(model, prompter.arguments, "max_seq_length")
        super().__init__(model, prompter, flags, prompter.stop_ids, prompter.arguments.max_new_tokens)
        self.positions = loading.learned_positions(model)
        self.captures = model.device.type == "cuda"  # whether steps become CUDA graphs; until one cannot
        self.loop = self.most  # tokens that end an answer when it says them again

    def encode(self, example: Example, passages: Sequence[Document]) -> list[int]:
        return self.prompter.encode(example, passages).ids

    def cost(self, prompt: list[int]) -> int:
        return len(prompt) + self.most

    @cached_property
    def _reach(self) -> float | None:
        """How many tokens each sees; None: `generate` answers, as prompts cannot be packed or layers are not alike."""
        model, kept, config = self.model, [], self.model.config.get_text_config(decoder=True)
        kinds, window = set(getattr(config, "layer_types", None) or []), getattr(config, "sliding_window", None)
        keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
        if keeps_logits and attention_of(model) == PACKED_ATTENTION and batching_is_exact(model):
            hidden_states(model, pack([[0]]).to(model.device), kept=kept)
        if len(kept) != config.num_hidden_layers or kinds not in (set(), {"full_attention"}, {"sliding_attention"}):
            return None
        return math.inf if window is None or kinds == {"full_attention"} else window

    @torch.no_grad()
    @torch.compiler.set_stance("force_eager")  # or each layer would be compiled anew, as each has a cache of its own
    def generate(
        self, prompts: Sequence[list[int]], max_new_tokens: int | None = None, watch: Watch | None = None
    ) -> list[list[int]]:
        stop, most = self.prompter.stop_ids, max_new_tokens or self.most
        most = int(min(most, self.positions + 1 - max(map(len, prompts))))  # the last token is not read
        synced = is_sharded(self.model)  # then a process that is done steps on until all are
        with evaluating(self.model):
            if not synced and self.flags.num_beams == 1 and self._reach is not None:
                answers = self._decode(prompts, most, stop, self._reach, watch)
            else:
                turned = pad([prompt[::-1] for prompt in prompts]).to(self.model.device).inputs
                inputs = {name: value.flip(1) for name, value in turned.items()}  # padded on the left
                start, config = inputs["input_ids"].shape[1], self.flags.config(most, stop)
                answers = generate(self.model, config, start, watch, **inputs, synced_gpus=synced).tolist()  # [B, new]
        return [until_end(ids, stop) for ids in answers]

    def _decode(
        self, prompts: Sequence[list[int]], most: int, stop: Sequence[int], reach: float, watch: Watch | None = None
    ) -> list[list[int]]:
        """What `generate` gives without beams; -1 behind the end of the longest answer. -> [B, most]"""
        longest = max(map(len, prompts))
        length = -(-(longest + most) // 16) * 16  # CUDA's attention copies masks of other widths in each layer
        logits, states = read_prompts(self.model, prompts, length)
        tokens = torch.full((len(prompts), length), -1, device=logits.device)  # each in the column of its keys
        tokens[:, longest], spoiled = self.flags.next_tokens(logits), ~logits.amax(-1).isfinite()  # [B]
        columns, place = torch.arange(length, device=logits.device), tokens.new_tensor([longest])  # [L], [1]
        padding, ends = tokens.new_tensor([[longest - len(prompt)] for prompt in prompts]), tokens.new_tensor(stop)
        hidden = torch.full_like(tokens, -torch.inf, dtype=states[0][0].dtype)  # [B, L]
        options = {"cached": (states, place), "use_cache": False, "logits_to_keep": 1}

        def step() -> None:
            """Write the token behind `place`, and which rows are spoiled; a step may be made again."""
            seen = (columns >= padding) & (columns <= place) & (columns > place - reach)  # [B, L]
            inputs = {"input_ids": tokens.index_select(1, place), "position_ids": place - padding}
            mask = hidden.masked_fill(seen, 0)[:, None, None]  # [B, 1, 1, L]
            logits = self.model(**inputs, **options, attention_mask=mask).logits[:, -1]
            tokens.index_copy_(1, place + 1, self.flags.next_tokens(logits)[:, None])
            spoiled.logical_or_(~logits.amax(-1).isfinite())

        advance, look_every = step, LOOK_EVERY if self.captures else 1
        # Everything but cuDNN, whose kernels are built anew for each batch size and length.
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
