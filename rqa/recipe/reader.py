"""Training a reader over a frozen retriever, and whichever reader is named, ready to answer."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rqa.data import Document, Example
from rqa.endpoint.client import Endpoint, EndpointArguments, is_endpoint
from rqa.endpoint.roles import EndpointReader
from rqa.evaluation.answers import ReaderEvaluation
from rqa.evaluation.judge import JudgeArguments, judge_results
from rqa.models.causal_lm import CausalLMReader, load_causal_lm
from rqa.models.encoder_decoder import (
    NEW_LAYERS,
    WARM_START,
    EncoderDecoderArguments,
    FiD,
    FiDReader,
    load_encoder_decoder,
)
from rqa.models.loading import choose_collate, freeze_pooler, is_encoder_decoder, load_tokenizer, train_adapters
from rqa.models.reader import GenerationArguments
from rqa.objectives.sft import DecoderArguments, encode_examples
from rqa.prompts import FiDPromptArguments, Prompter
from rqa.recipe.run import Rows, Run, Scores, TrainingArguments
from rqa.retrieval.hybrid import RetrieverArguments, open_retriever
from rqa.retrieval.retriever import PassageRetriever
from rqa.runtime.errors import UserError
from rqa.runtime.parallelize import load_whole_weights
from rqa.training.loop import Batches

FASTER = 7  # new layers of `bert::` at one high rate with the others let the encoder's states fall together


@dataclass(kw_only=True)
class ReaderTraining(TrainingArguments, RetrieverArguments, JudgeArguments):
    """What runs that train a reader read from the command line."""


class ReaderRun(Run):
    """A run that trains a reader; its retriever is frozen."""

    flags: Any  # ReaderTraining, and what the objective's `load` and `reader` read

    def __init__(self, flags: Any, objective: type) -> None:
        """Files, the reader to train, and the retriever.

        Args:
            objective: The class of what is trained: `AnswerLikelihood` or `FiDLikelihood`.
        """
        self.retrieves = bool(flags.embedding_model) or flags.retriever == "bm25"
        if not self.retrieves and flags.retriever == "hybrid":
            raise UserError("--retriever hybrid: name its encoder, too (--embedding_model)")
        if not self.retrieves and flags.gen_gpt4eval:
            raise UserError(
                "--gen_gpt4eval true: there are no answers without a retriever; name one, or --retriever bm25"
            )
        if flags.model_name_or_path.startswith(WARM_START) and not flags.new_layers:
            flags.new_layers, flags.new_layers_learning_rate = NEW_LAYERS, FASTER * flags.learning_rate
        super().__init__(flags, "loss", train_answers=True, eval_answers=True)
        self.objective = objective.load(self.source, flags)
        self.model = self.objective.model
        train_adapters(self.model, flags)
        if self.model.config.is_encoder_decoder:
            freeze_pooler(self.model.get_encoder())
        self.retriever = None
        if self.retrieves:
            with flags.autocast():
                self.retriever = open_retriever(flags, flags.embedding_model, self.documents, self.eval)

    def finish(self, passages: Sequence[Sequence[Document]]) -> Scores:
        """Train, evaluate, test.

        Args:
            passages: Those of each training prompt.
        """
        flags, objective = self.flags, self.objective
        reader = objective.reader(flags)
        with flags.autocast():
            on_eval = ReaderEvaluation(self.retriever, self.eval, flags)
            on_test = ReaderEvaluation(self.retriever, self.test, flags)

        def evaluate(step: int) -> tuple[Scores, Rows]:
            with flags.autocast():
                return on_eval(objective, reader)

        def test() -> tuple[Scores, Rows]:
            load_whole_weights(self.model, type(objective).load(flags.output_dir, flags).model.state_dict())
            with flags.autocast():
                return on_test(objective, reader, warm_up=True)

        def publish(scores: Scores, rows: Rows) -> Scores:
            return judge_results(flags.output_dir, scores, rows, flags)[0]

        sequences = encode_examples(objective.prompter, self.train, passages)
        kept = list(sequences)

        def collate(indices: Sequence[int]) -> Any:
            numbers = [kept[i] for i in indices]
            return objective.batch([sequences[number] for number in numbers], numbers)

        batches = Batches(len(sequences), collate, flags)
        return self.run(objective, self.model, batches, evaluate, test, publish)


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
