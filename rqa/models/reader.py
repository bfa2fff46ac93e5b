"""Whichever reader is named, ready to answer: a decoder, an encoder-decoder, or a model behind a server."""

from dataclasses import dataclass
from typing import Any

import torch

from rqa.models.causal_lm import CausalLMReader, load_causal_lm
from rqa.models.endpoint import Endpoint, EndpointArguments, is_endpoint
from rqa.models.endpoint_reader import EndpointReader
from rqa.models.fusion import Fusion, FusionReader, load_fusion
from rqa.models.generation import GenerationArguments
from rqa.models.loading import choose_collate, is_encoder_decoder, load_tokenizer
from rqa.prompts import FusionPromptArguments, PromptArguments, Prompter
from rqa.runtime import distributed
from rqa.runtime.errors import UserError


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
