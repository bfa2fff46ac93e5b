"""A trained system: whichever reader is named, ready to answer over what a retriever finds."""

from dataclasses import dataclass

from rqa.data import Document, Example
from rqa.endpoint.client import Endpoint, EndpointArguments, is_endpoint
from rqa.endpoint.roles import EndpointReader
from rqa.models.causal_lm import CausalLMReader, load_causal_lm
from rqa.models.encoder_decoder import EncoderDecoderArguments, FiD, FiDReader, load_encoder_decoder
from rqa.models.loading import choose_collate, is_encoder_decoder, load_tokenizer
from rqa.models.reader import GenerationArguments
from rqa.objectives.sft import DecoderArguments
from rqa.prompts import FiDPromptArguments, Prompter
from rqa.retrieval.retriever import PassageRetriever
from rqa.runtime.errors import UserError


@dataclass(kw_only=True)
class ReaderArguments(EncoderDecoderArguments, FiDPromptArguments, DecoderArguments, EndpointArguments):
    """How a reader of any kind is asked."""


def load_reader(
    path: str,
    flags: ReaderArguments = ReaderArguments(),
) -> CausalLMReader | FiDReader | EndpointReader:
    """The reader at `path`, ready to answer: a directory, a hub name, or `openai::http://host:port/v1`."""
    if is_endpoint(path):
        if any(getattr(flags, name) != getattr(GenerationArguments, name) for name in vars(GenerationArguments())):
            raise UserError("--num_beams, --do_sample: a server is asked for its likeliest answer; leave them out")
        return EndpointReader(Endpoint(path, flags), flags)
    if is_encoder_decoder(path, flags.trust_remote_code):
        model, prompter = load_encoder_decoder(path, flags)
        collate = choose_collate(model.get_encoder(), prompter.tokenizer.pad_token_id)
        return FiDReader(FiD(model), prompter, flags, collate)
    prompter = Prompter(load_tokenizer(path, flags.trust_remote_code), flags)
    return CausalLMReader(load_causal_lm(path, flags), prompter, flags)


def answer(
    question: str, retriever: PassageRetriever, reader: CausalLMReader | FiDReader | EndpointReader, k: int = 3
) -> tuple[str, list[Document]]:
    """The reader's answer to a question over the k best passages, and those passages."""
    example = Example(question)
    (passages,) = retriever.documents_of(retriever.retrieve([question], k))
    return reader.answer([example], [passages])[0].text, passages
