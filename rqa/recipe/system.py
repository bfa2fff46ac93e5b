"""A trained system: a retriever, and a reader of any kind that answers over the passages it finds."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from rqa.data import Answer, Document, DocumentArguments, Example
from rqa.documents import read_documents
from rqa.endpoint.client import Endpoint, EndpointArguments, EstimatedTokens, is_endpoint
from rqa.models.encoder_decoder import FiD, FiDPromptArguments, FiDReader, load_encoder_decoder
from rqa.models.loading import load_causal_lm, load_config, load_tokenizer
from rqa.models.reader import CausalLMReader, GenerationArguments
from rqa.objectives.sft import DecoderArguments
from rqa.prompts import PromptArguments, Prompter, fitting
from rqa.retrieval.hybrid import RetrieverArguments, open_retriever
from rqa.retrieval.retriever import PassageRetriever
from rqa.runtime import distributed
from rqa.runtime.errors import UserError
from rqa.runtime.flags import flag


@dataclass(kw_only=True)
class ReaderArguments(FiDPromptArguments, DecoderArguments, EndpointArguments):
    """Prompt and generation flags of all kinds of readers."""


class EndpointReader:
    """A reader behind a server, asked by chat with the local readers' instruction.

    `max_seq_length` counts estimated tokens.
    """

    def __init__(self, endpoint: Endpoint, prompt: PromptArguments) -> None:
        self.endpoint = endpoint
        self.prompter = Prompter(EstimatedTokens(), replace(prompt, chat_format="prefix"))

    def answer(self, examples: Sequence[Example], passages: Sequence[Sequence[Document]]) -> list[Answer]:
        """Answer each question at temperature 0; one whose prompt is too long gets an empty answer. [Q] -> [Q]"""
        prompts = fitting(self.prompter.messages, zip(examples, passages, strict=True), "it gets an empty answer")
        replies = self.endpoint.ask(list(prompts.values()), self.prompter.arguments.max_new_tokens, desc="generate")
        answers = dict(zip(prompts, replies, strict=True))
        return [answers.get(number, Answer("", 0)) for number in range(len(examples))]

    def warm_up(self, example: Example, passages: Sequence[Document]) -> None:
        """Do nothing: a request to a server may cost money."""


Reader = CausalLMReader | FiDReader | EndpointReader


def load_reader(path: str, flags: ReaderArguments = ReaderArguments()) -> Reader:
    """Load a reader from a directory, a hub name, or `openai::http://host:port/v1`."""
    if is_endpoint(path):
        if any(getattr(flags, name) != getattr(GenerationArguments, name) for name in vars(GenerationArguments())):
            raise UserError("--num_beams, --do_sample: servers are asked at temperature 0; leave them out")
        return EndpointReader(Endpoint(path, flags, flags.template_options), flags)
    if load_config(path, flags.trust_remote_code).is_encoder_decoder:
        model, prompter = load_encoder_decoder(path, flags)
        return FiDReader(FiD(model), prompter, flags)
    prompter = Prompter(load_tokenizer(path, flags.trust_remote_code), flags)
    return CausalLMReader(load_causal_lm(path, flags), prompter, flags)


def answer(question: str, retriever: PassageRetriever, reader: Reader, k: int = 3) -> tuple[str, list[Document]]:
    """The reader's answer to a question over the k best passages, and those passages."""
    (passages,) = retriever.documents_of(retriever.retrieve([question], k))
    return reader.answer([Example(question)], [passages])[0].text, passages


@dataclass(kw_only=True)
class SystemArguments(DocumentArguments, ReaderArguments, RetrieverArguments):
    """The retriever and the reader."""

    embedding_model: str = flag(
        help="Encoder of the retriever: a directory or a hub name; bm25 names BM25, which needs no encoder.",
    )
    qa_model_name_or_path: str | None = flag(
        None, "Reader: a directory, a hub name, or openai::http://host:port/v1. Default: none, only passages are shown."
    )
    embedding_max_num_to_retrieve: int = flag(3, "Number of passages to retrieve and read for a question.")

    def check(self) -> None:
        self.check_bounds("embedding_max_num_to_retrieve", at_least=1)


def open_system(flags: SystemArguments) -> tuple[PassageRetriever, Reader | None]:
    """Load the retriever and the reader that the flags name."""
    distributed.start()
    documents = read_documents(flags.document_path)
    reader = load_reader(flags.qa_model_name_or_path, flags) if flags.qa_model_name_or_path else None
    return open_retriever(flags, flags.embedding_model, documents), reader
