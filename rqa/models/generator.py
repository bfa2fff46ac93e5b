"""Text from conversations, by a local model or a server: whoever asks need not know which."""

import json
import logging
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rqa.models.causal_lm import CausalLMReader, load_causal_lm
from rqa.models.endpoint import Endpoint, EndpointArguments, is_endpoint
from rqa.models.loading import load_tokenizer, model_fingerprint
from rqa.prompts import PromptArguments, Prompter
from rqa.prompts.estimate import count_tokens
from rqa.prompts.generation import Conversation
from rqa.runtime import distributed
from rqa.runtime.errors import UserError
from rqa.runtime.files import cache_root, fingerprint
from rqa.runtime.store import Store

log = logging.getLogger(__name__)

KEPT_AT_ONCE = 128  # conversations between two writes of the store: what an interruption costs at most


class TextGenerator(Protocol):
    """Whatever replies to conversations."""

    def generate(self, conversations: Sequence[Conversation]) -> list[str]:
        """The reply to each conversation, greedily; what an earlier run was told is not asked again. [Q] -> [Q]"""
        ...

    def count_tokens(self, conversations: Sequence[Conversation]) -> int:
        """The tokens of all conversations, by the model's tokenizer or by estimate."""
        ...


def open_generator(
    name: str, max_new_tokens: int, endpoint: EndpointArguments, device: torch.device, **options: Any
) -> TextGenerator:
    """The generator that a name means.

    Args:
        name: A directory, a hub name, or `openai::http://host:port/v1`.
        max_new_tokens: Tokens of a reply, at most.
        options: Those of `load_model`, for a local model.

    Raises:
        UserError: it cannot be loaded, or has no chat template.
    """
    if is_endpoint(name):
        return EndpointGenerator(Endpoint(name, endpoint), max_new_tokens)
    tokenizer = load_tokenizer(name, options.get("trust_remote_code", False))
    if not tokenizer.chat_template:
        raise UserError(
            f"--model_name_or_path {name}: has no chat template; take a model that was tuned to instructions"
        )
    return LocalGenerator(load_causal_lm(name, **options).to(device), tokenizer, max_new_tokens)


class EndpointGenerator:
    """A model behind an OpenAI-compatible server."""

    def __init__(self, endpoint: Endpoint, max_new_tokens: int) -> None:
        self.endpoint = endpoint
        self.max_new_tokens = max_new_tokens

    def generate(self, conversations: Sequence[Conversation]) -> list[str]:
        replies = self.endpoint.ask(conversations, self.max_new_tokens) if distributed.is_main() else []
        return distributed.from_main([reply.text for reply in replies])

    def count_tokens(self, conversations: Sequence[Conversation]) -> int:
        return count_tokens(conversations)


class LocalGenerator:
    """A decoder in this process, or a copy of it in each of several; conversations by its own chat template."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int) -> None:
        self.tokenizer = tokenizer
        arguments = PromptArguments(chat_format="template", max_new_tokens=max_new_tokens)
        self.reader = CausalLMReader(model, Prompter(tokenizer, arguments))
        self._limit = (getattr(model.config, "max_position_embeddings", None) or 10**9) - max_new_tokens
        self._store = Store(cache_root() / "generated.sqlite")
        self._identity = fingerprint(model_fingerprint(model, tokenizer), str(max_new_tokens))

    def generate(self, conversations: Sequence[Conversation]) -> list[str]:
        keys = [fingerprint(self._identity, json.dumps(turns)) for turns in conversations]
        waiting = dict(zip(keys, conversations, strict=True))
        kept = distributed.from_main(self._store.get(waiting))
        missing = [key for key in waiting if key not in kept]
        for start in range(0, len(missing), KEPT_AT_ONCE):
            log.info("generate: %d of %d conversations done", len(keys) - len(missing) + start, len(keys))
            part = missing[start : start + KEPT_AT_ONCE]
            kept |= zip(part, self._reply([waiting[key] for key in part]), strict=True)
            if distributed.is_main():
                self._store.put({key: kept[key] for key in part})
        return [kept[key] for key in keys]

    def count_tokens(self, conversations: Sequence[Conversation]) -> int:
        return sum(len(self._encode(turns)) for turns in conversations)

    def _reply(self, conversations: Sequence[Conversation]) -> list[str]:
        """Each process replies to its share; a conversation that is longer than the model can read, with nothing."""
        prompts = [self._encode(turns) for turns in distributed.share(conversations)]
        if longer := sum(len(prompt) > self._limit for prompt in prompts):
            log.warning("%d passages are longer than the model can read; nothing is made of them", longer)
        prompts = [prompt if len(prompt) <= self._limit else [] for prompt in prompts]
        answers = self.reader.answer_prompts(prompts, progress=distributed.is_main())
        return distributed.gather([answer.text for answer in answers])

    def _encode(self, turns: Conversation) -> list[int]:
        text = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        return self.tokenizer.encode(text, add_special_tokens=False)
