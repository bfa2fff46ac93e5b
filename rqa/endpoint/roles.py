"""Whichever reader is named, ready to answer: a decoder, an encoder-decoder, or a model behind a server."""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from rqa.data import Document, Example
from rqa.endpoint.client import Endpoint, EndpointArguments, is_endpoint
from rqa.models.causal_lm import CausalLMReader, load_causal_lm
from rqa.models.encoder_decoder import Fusion, FusionReader, load_fusion
from rqa.models.loading import choose_collate, is_encoder_decoder, load_tokenizer
from rqa.models.reader import Answer, GenerationArguments
from rqa.objectives.teacher import Pair
from rqa.prompts import DoesNotFit, FusionPromptArguments, PromptArguments, Prompter
from rqa.runtime import distributed
from rqa.runtime.errors import UserError

BYTES_PER_TOKEN = 3  # English prose has four to five, code and most other scripts about three: too early, not too late


class EstimatedTokens:
    """Stands where a `Prompter` expects a tokenizer, and only counts: a token every three bytes of UTF-8."""

    chat_template = None
    bos_token_id = None
    eos_token_id = 0
    eos_token = ""
    all_special_ids: tuple[int, ...] = ()
    added_tokens_decoder: dict[int, str] = {}  # noqa: RUF012

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """As many ids as the text is thought to have tokens; they mean nothing."""
        return [0] * -(-len(text.encode("utf-8", "replace")) // BYTES_PER_TOKEN)


def count_tokens(conversations: Sequence[Sequence[dict[str, str]]]) -> int:
    """About how many tokens conversations have, `{"role", "content"}` a turn."""
    return sum(len(EstimatedTokens().encode(turn["content"])) for turns in conversations for turn in turns)


def check_price(flag: str, price: Sequence[float]) -> None:
    """Raises:
    UserError: there are prices, and not two.
    """
    if len(price) not in (0, 2) or min(price, default=0) < 0:
        raise UserError(f"--{flag}: takes two numbers, dollars for a million tokens in and out")


def cost(asked: str, given: int, written: int, price: Sequence[float]) -> str:
    """What asking will take at most, in tokens and, at a price for a million in and out, in dollars."""
    dollars = f", at most ${(given * price[0] + written * price[1]) / 1e6:.2f}" if price else ""
    return f"{asked}, some {given:,} tokens in, at most {written:,} out{dollars}; what is kept already costs nothing"


log = logging.getLogger(__name__)


class EndpointReader:
    """Answers questions over passages by chat; the instruction is that of every other reader, the format the server's.

    Args:
        prompt: `max_seq_length` bounds what is sent, in tokens of the tokenizer or, without one, by estimate.
    """

    def __init__(
        self, endpoint: Endpoint, prompt: PromptArguments, tokenizer: PreTrainedTokenizerBase | None = None
    ) -> None:
        self.endpoint = endpoint
        self.prompter = Prompter(tokenizer or EstimatedTokens(), replace(prompt, chat_format="prefix"))

    def answer(self, examples: Sequence[Example], passages: Sequence[Sequence[Document]]) -> list[Answer]:
        """One answer at temperature 0 for each question, many asked at once. [Q] -> [Q]

        A question that does not fit by itself is reported and answered by nothing.
        """
        answers = [Answer("", 0)] * len(examples)
        asked = {}
        for number, (example, documents) in enumerate(zip(examples, passages, strict=True)):
            try:
                asked[number] = self.prompter.messages(example, documents)
            except DoesNotFit as error:
                log.warning("%s; it is left unanswered", error)
        replies = self.endpoint.ask(list(asked.values()), self.prompter.arguments.max_new_tokens, desc="generate")
        for number, reply in zip(asked, replies, strict=True):
            answers[number] = Answer(*reply)
        return answers

    def warm_up(self, example: Example, passages: Sequence[Document]) -> None:
        """Nothing: a server is asked no question twice, and may have to be paid."""


@dataclass
class ReaderPromptArguments(PromptArguments, FusionPromptArguments):
    """How a reader of any kind is asked."""


def open_reader(
    path: str,
    prompt: ReaderPromptArguments,
    generation: GenerationArguments,
    endpoint: EndpointArguments,
    device: torch.device,
    **options: Any,
) -> CausalLMReader | FusionReader | EndpointReader:
    """The reader at `path`: a directory, a hub name, or `openai::http://host:port/v1`.

    Args:
        options: Those of `load_model`.

    Raises:
        UserError: what a user can mend.
    """
    if is_endpoint(path):
        if generation != GenerationArguments():
            raise UserError("--num_beams, --do_sample: a server is asked for its likeliest answer; leave them out")
        return EndpointReader(Endpoint(path, endpoint), prompt)
    if is_encoder_decoder(path, options.get("trust_remote_code", False)):
        with distributed.in_turn():
            model, prompter = load_fusion(path, prompt, **options)
            model.to(device)
        collate = choose_collate(model.get_encoder(), prompter.tokenizer.pad_token_id)
        return FusionReader(Fusion(model), prompter, generation, collate)
    prompter = Prompter(load_tokenizer(path, options.get("trust_remote_code", False)), prompt)
    with distributed.in_turn():
        model = load_causal_lm(path, **options).to(device)
    return CausalLMReader(model, prompter, generation)


class EndpointScorer:
    """What `AnswerScorer` computes, from a server that returns the log-probabilities of a prompt.

    The server tokenizes prompt and answer in one piece: where its tokenizer merges across their border, scores differ
    slightly from those of a local model.
    """

    def __init__(self, endpoint: Endpoint, prompter: Prompter) -> None:
        self.endpoint = endpoint
        self.prompter = prompter
        self._warn_once = cache(log.warning)

    def __call__(self, pairs: Sequence[Pair]) -> Iterable[tuple[int, float]]:
        texts: dict[int, tuple[str, str]] = {}
        for position, pair in enumerate(pairs):
            try:
                texts[position] = self.prompter.text(pair.example, [pair.document], pair.example.gold_answer)
            except DoesNotFit as error:
                self._warn_once("%s; its documents are not told apart", str(error))
                yield position, 0.0
        scores = self.endpoint.answer_logprobs(*zip(*texts.values(), strict=True)) if texts else []
        yield from zip(texts, scores, strict=True)
