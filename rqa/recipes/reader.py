"""Training a reader, from files to scores: a kind of reader brings how it is built, an algorithm what it reads."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedModel

from rqa.data.documents import Document
from rqa.data.examples import Example
from rqa.evaluation.judge import JudgeArguments, judge_results
from rqa.evaluation.reader import ReaderEvaluation, TrainableReader, encode_examples
from rqa.evaluation.rqa import EvaluationArguments
from rqa.models.causal_lm import CausalLMReader, load_causal_lm
from rqa.models.encoder import EncoderArguments
from rqa.models.endpoint import RequestArguments
from rqa.models.fusion import FusionReader, load_fusion, refuse_overflow
from rqa.models.generation import GenerationArguments
from rqa.models.loading import freeze_pooler, load_tokenizer
from rqa.models.lora import train_adapters
from rqa.objectives.answer import AnswerLikelihood
from rqa.objectives.fusion import FusionLikelihood
from rqa.objectives.passages import PassageArguments, gold_and_retrieved
from rqa.prompts import FusionPromptArguments, FusionPrompter, PromptArguments, Prompter, retrieval_query
from rqa.recipes.files import DataArguments
from rqa.recipes.run import Rows, Run, Scores, begin, train_and_test
from rqa.retrieval.hits import PassageRetriever
from rqa.retrieval.index import IndexArguments
from rqa.retrieval.opening import RetrieverArguments, open_retriever
from rqa.runtime import distributed
from rqa.runtime.errors import UserError
from rqa.runtime.parallelize import load_whole_weights
from rqa.runtime.precision import autocast
from rqa.training.arguments import LoopArguments
from rqa.training.batches import Batches

SHARED_ARGUMENTS = (
    DataArguments,
    LoopArguments,
    EvaluationArguments,
    EncoderArguments,
    IndexArguments,
    RetrieverArguments,
    JudgeArguments,
    RequestArguments,
)

ChoosePassages = Callable[[Sequence[Example], PassageRetriever | None], list[list[Document]]]


@dataclass(frozen=True)
class ReaderKind:
    """How a kind of reader is built.

    Attributes:
        load: A directory or hub name -> its model, on the CPU, and what builds the model's inputs. Only the main
            process reads weights.
        assemble: Both, the model where it will run -> what is trained and evaluated.
    """

    load: Callable[[str, Run], tuple[PreTrainedModel, Any]]
    assemble: Callable[[PreTrainedModel, Any], TrainableReader]


def train_reader(
    data: DataArguments,
    loop: LoopArguments,
    evaluation: EvaluationArguments,
    encoder: EncoderArguments,
    index: IndexArguments,
    which: RetrieverArguments,
    judge: JudgeArguments,
    requests: RequestArguments,
    kind: ReaderKind,
    embedding_model: str | None,
    choose_passages: ChoosePassages,
    all_arguments: Sequence[Any],
) -> dict[str, float]:
    """Train, choose the best model by the eval file, score it on the test file.

    Args:
        requests: How the judge's server is asked.
        kind: What kind of reader is trained.
        embedding_model: The frozen retriever's encoder, or bm25; None, unless BM25 is asked for: nothing is retrieved,
            and evaluation is the loss on gold passages.
        choose_passages: The passages of each training prompt.
        all_arguments: Every dataclass, for `all_args.json`.

    Returns:
        The test file's scores; empty without one, or if a signal ended the run.

    Raises:
        UserError: what a user can mend.
    """
    retrieves = bool(embedding_model) or which.retriever == "bm25"
    if not retrieves and which.retriever == "hybrid":
        raise UserError("--retriever hybrid: name its encoder, too (--eval_embedding_model)")
    if not retrieves and judge.gen_gpt4eval:
        raise UserError("--gen_gpt4eval true: without a retriever nothing is answered; name one, or --retriever bm25")
    run = begin(data, loop, all_arguments, "loss")
    device, dtype, inputs = run.device, run.dtype, run.inputs
    model, prompter = kind.load(run.source, run)
    model.to(device)
    train_adapters(model, loop)
    if model.config.is_encoder_decoder:
        freeze_pooler(model.get_encoder())
    trained = kind.assemble(model, prompter)
    retriever, path = None, data.full_dataset_index_path
    with autocast(device, dtype):
        if retrieves:
            retriever = open_retriever(
                which, embedding_model, inputs.documents, encoder, index, path, device, inputs.eval, **run.options
            )
        passages = choose_passages(inputs.train, retriever)
        batch_size = loop.per_device_eval_batch_size
        on_eval = ReaderEvaluation(retriever, inputs.eval, evaluation, batch_size, device)
        on_test = ReaderEvaluation(retriever, inputs.test, evaluation, batch_size, device)

    def evaluate(step: int) -> tuple[Scores, Rows]:
        with autocast(device, dtype):
            return on_eval(trained)

    def test() -> tuple[Scores, Rows]:
        load_whole_weights(model, kind.load(loop.output_dir, run)[0].state_dict())
        with autocast(device, dtype):
            return on_test(trained, warm_up=True)

    def publish(scores: Scores, rows: Rows) -> Scores:
        return judge_results(loop.output_dir, scores, rows, judge, requests)[0]

    batches = reader_batches(trained, inputs.train, passages, loop)
    return train_and_test(run, trained.objective, model, batches, evaluate, test, publish)


def reader_batches(
    reader: TrainableReader, examples: Sequence[Example], passages: list[list[Document]], loop: LoopArguments
) -> Batches:
    """The prompts, and the answers to learn, of all examples that fit; each is known by its number in the file."""
    sequences = encode_examples(reader.objective.prompter, examples, passages)
    kept = list(sequences)

    def micro_batch(indices: Sequence[int]) -> Any:
        numbers = [kept[i] for i in indices]
        return reader.objective.batch([sequences[number] for number in numbers], numbers)

    return Batches(len(sequences), micro_batch, loop)


def decoder(prompt: PromptArguments, generation: GenerationArguments) -> ReaderKind:
    """Readers that are decoders: passages, question and answer are one sequence."""

    def load(path: str, run: Run) -> tuple[PreTrainedModel, Prompter]:
        prompter = Prompter(load_tokenizer(path, run.options["trust_remote_code"]), prompt)
        return load_causal_lm(path, empty=not distributed.is_main(), **run.options), prompter

    def assemble(model: PreTrainedModel, prompter: Prompter) -> TrainableReader:
        return TrainableReader(AnswerLikelihood(model, prompter), CausalLMReader(model, prompter, generation))

    return ReaderKind(load, assemble)


def fusion(prompt: FusionPromptArguments, generation: GenerationArguments) -> ReaderKind:
    """Readers that are encoder-decoders: passages are encoded one by one."""

    def load(path: str, run: Run) -> tuple[PreTrainedModel, FusionPrompter]:
        model, prompter = load_fusion(path, prompt, empty=not distributed.is_main(), **run.options)
        refuse_overflow(model, run.dtype)
        return model, prompter

    def assemble(model: PreTrainedModel, prompter: FusionPrompter) -> TrainableReader:
        objective = FusionLikelihood(model, prompter)
        return TrainableReader(objective, FusionReader(objective.fusion, prompter, generation, objective.collate))

    return ReaderKind(load, assemble)


@dataclass
class RetrievedArguments(PassageArguments):
    """Training on what a frozen retriever finds, mixed with gold passages."""

    embedding_model: str = field(kw_only=True, metadata={"help": "The frozen retriever: a directory or a hub name."})


def gold_and_retrieved_passages(
    own: RetrievedArguments, evaluation: EvaluationArguments, loop: LoopArguments
) -> ChoosePassages:
    """Gold and retrieved passages, at most one more than evaluation retrieves; all questions are asked at once."""

    def choose(examples: Sequence[Example], retriever: PassageRetriever | None) -> list[list[Document]]:
        assert retriever, "--embedding_model is required"
        k = evaluation.embedding_max_num_to_retrieve
        hits = retriever.retrieve_once([retrieval_query(example) for example in examples], k)
        pairs = zip(examples, retriever.documents_of(hits), strict=True)
        return [
            gold_and_retrieved(example, found, k + 1, own, f"{loop.seed}-{number}")
            for number, (example, found) in enumerate(pairs)
        ]

    return choose
