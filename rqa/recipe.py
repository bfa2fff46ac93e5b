"""Training a reader, from files to scores: a kind of reader brings how it is built, an algorithm what it reads."""

import json
import logging
import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, set_seed

from rqa.data import Document, Example, read_documents, read_examples
from rqa.endpoint.client import RequestArguments
from rqa.evaluation.answers import (
    EvaluationArguments,
    ReaderEvaluation,
    TrainableReader,
    encode_examples,
    find_passages,
)
from rqa.evaluation.judge import JudgeArguments, judge_results
from rqa.evaluation.report import DETAILS, PREDICTIONS, SCORES, write_report
from rqa.evaluation.results import write_results
from rqa.evaluation.retrieval import mean_scores, retrieval_rows
from rqa.models.causal_lm import CausalLMReader, load_causal_lm
from rqa.models.encoder import Encoder, EncoderArguments, load_encoder
from rqa.models.encoder_decoder import FusionReader, load_fusion, refuse_overflow
from rqa.models.loading import LoadingArguments, freeze_pooler, load_tokenizer, merged, train_adapters
from rqa.models.reader import GenerationArguments
from rqa.objectives.fid import FusionLikelihood
from rqa.objectives.sft import AnswerLikelihood
from rqa.objectives.swr import PassageArguments, gold_and_retrieved
from rqa.prompts import FusionPromptArguments, FusionPrompter, PromptArguments, Prompter, retrieval_query
from rqa.retrieval.hybrid import RetrieverArguments, open_retriever
from rqa.retrieval.index import IndexArguments
from rqa.retrieval.refresh import Refresher
from rqa.retrieval.retriever import PassageRetriever, Retriever
from rqa.runtime import distributed
from rqa.runtime.cli import log_to_file
from rqa.runtime.distributed import autocast, compute_dtype
from rqa.runtime.errors import UserError
from rqa.runtime.files import write_json, write_jsonl
from rqa.runtime.flags import given
from rqa.runtime.parallelize import load_whole_weights
from rqa.training.arguments import LoopArguments
from rqa.training.checkpoint import ARGUMENTS_FILE, checkpoint_to_resume, promote
from rqa.training.journal import continues
from rqa.training.loop import Batches, train

log = logging.getLogger(__name__)

ABOUT_THE_START = {"output_dir", "overwrite_output_dir", "resume_from_checkpoint"}


@dataclass
class DataArguments:
    """The model, the examples and the document database."""

    model_name_or_path: str = field(metadata={"help": "The model to train: a directory or a hub name."})
    train_file: str = field(metadata={"help": "Training examples, JSONL."})
    full_dataset_file_path: str = field(metadata={"help": "The document database: .jsonl, or LocalRQA's .pkl."})
    eval_file: str | None = field(default=None, metadata={"help": "Examples that choose the best model."})
    test_file: str | None = field(default=None, metadata={"help": "Examples for the final scores."})
    full_dataset_index_path: str | None = field(
        default=None, metadata={"help": "The index: built there if absent or stale; by default in memory."}
    )


@dataclass
class EvaluationDataArguments(LoadingArguments):
    """What to evaluate, on what."""

    embedding_model_name_or_path: str = field(
        metadata={"help": "The retriever's encoder: a directory or a hub name; bm25: BM25, without an encoder."}
    )
    document_path: str = field(metadata={"help": "The document database: .jsonl, or LocalRQA's .pkl."})
    eval_data_path: str = field(metadata={"help": "Examples, JSONL: with gold passages, and answers for a reader."})
    output_dir: str = field(metadata={"help": "Where scores, predictions and report go."})
    index_path: str | None = field(
        default=None, metadata={"help": "The index: built there if absent or stale; by default in memory."}
    )
    max_examples: int = field(default=0, metadata={"help": "Evaluate on so many questions, a fixed subset; 0: all."})


@dataclass(frozen=True)
class Inputs:
    """The document database and the examples of each split; empty where no file was given."""

    documents: list[Document]
    train: list[Example]
    eval: list[Example]
    test: list[Example]


def read_inputs(data: DataArguments, loop: LoopArguments, train_answers: bool, eval_answers: bool) -> Inputs:
    """Read every file of a run, before anything slow starts.

    Args:
        train_answers: Whether training examples must have answers.
        eval_answers: Whether those of the other files must.

    Raises:
        UserError: a file is missing or malformed.
    """
    held_out = [read_examples(path, eval_answers) if path else [] for path in (data.eval_file, data.test_file)]
    return Inputs(
        documents=read_documents(data.full_dataset_file_path),
        train=read_examples(data.train_file, train_answers),
        eval=subset(held_out[0], loop.eval_max_examples, loop.seed),
        test=held_out[1],
    )


def subset(examples: list[Example], size: int, seed: int) -> list[Example]:
    """A fixed seeded subset in file order; size 0: all."""
    if not 0 < size < len(examples):
        return examples
    return [examples[i] for i in sorted(random.Random(seed).sample(range(len(examples)), size))]


def open_output(loop: LoopArguments, all_arguments: Sequence[Any], checkpoint: Path | None = None) -> None:
    """Make the output directory, keep the arguments in it and log to it; say which differ from the checkpoint's."""
    output = Path(loop.output_dir)
    if distributed.is_main():
        output.mkdir(parents=True, exist_ok=True)
        if not checkpoint or not continues(checkpoint, loop):
            for name in (SCORES, DETAILS, PREDICTIONS):  # of a run that this one replaces
                (output / name).unlink(missing_ok=True)
        values = given(all_arguments)
        write_json(output / ARGUMENTS_FILE, values)
        log_to_file(str(output / "train.log"))
        if checkpoint:
            tell_changed_arguments(checkpoint, values)
    distributed.barrier()


def merge_adapters(loop: LoopArguments, kind: type[PreTrainedModel]) -> None:
    """If asked for, turn the adapters on top of the output directory into a plain model."""
    output = Path(loop.output_dir)
    if loop.merge_lora_on_save and distributed.is_main():
        with TemporaryDirectory(prefix=".model.", suffix=".tmp", dir=output) as directory:
            merged(output, kind).save_pretrained(directory)
            promote(Path(directory), output)
    distributed.barrier()


def tell_changed_arguments(checkpoint: Path, now: Mapping[str, Any]) -> None:
    """One line for the arguments that are not those which the checkpoint was made with."""
    try:
        then = json.loads((checkpoint / ARGUMENTS_FILE).read_text(encoding="utf-8"))
        names = [name for name in now if name in then and name not in ABOUT_THE_START and now[name] != then[name]]
    except (OSError, ValueError, TypeError):
        return
    if names:
        changes = ", ".join(f"--{name} {now[name]} (was {then[name]})" for name in names)
        log.warning("other arguments than those of %s: %s; the command line wins", checkpoint, changes)


Scores = dict[str, float]
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Run:
    """A run that has begun.

    Attributes:
        loop: The arguments of its loop.
        device: This process's device.
        dtype: What matrix products run in.
        checkpoint: Where to continue; None for a new run.
        source: Where the model to train is loaded from: the checkpoint, or what the user named.
        options: How every model of the run is loaded, as keyword arguments of `load_model`.
        inputs: Documents and examples.
    """

    loop: LoopArguments
    device: torch.device
    dtype: torch.dtype
    checkpoint: Path | None
    source: str
    options: dict[str, Any]
    inputs: Inputs


def begin(
    data: DataArguments,
    loop: LoopArguments,
    all_arguments: Sequence[Any],
    metric: str,
    train_answers: bool = True,
    eval_answers: bool = True,
) -> Run:
    """Join the process group, seed, read every file and open the output directory.

    Args:
        all_arguments: Every dataclass, for `all_args.json`.
        metric: What chooses the best model, unless the user said.
        train_answers: Whether training examples must have answers.
        eval_answers: Whether those of the other files must.

    Raises:
        UserError: what a user can mend.
    """
    device = distributed.start()
    dtype = compute_dtype(loop.bf16, loop.fp16, device)
    checkpoint = distributed.from_main(checkpoint_to_resume(loop) if distributed.is_main() else None)
    set_seed(loop.seed)
    inputs = read_inputs(data, loop, train_answers, eval_answers)
    open_output(loop, all_arguments, checkpoint)
    loop.metric_for_best_model = loop.metric_for_best_model or metric
    return Run(loop, device, dtype, checkpoint, str(checkpoint or data.model_name_or_path), loop.loading, inputs)


def train_and_test(
    run: Run,
    objective: nn.Module,
    model: PreTrainedModel,
    batches: Batches,
    evaluate: Callable[[int], tuple[Scores, Rows]],
    test: Callable[[], tuple[Scores, Rows]],
    publish: Callable[[Scores, Rows], Scores],
    before_step: Callable[[int], Mapping[str, float] | None] | None = None,
) -> Scores:
    """Train, choose the best model by the eval file, score it on the test file.

    Args:
        objective: As `train` takes it, with `before_step`.
        model: What may carry adapters.
        evaluate: Steps done -> scores by name on the eval file, and a row for each question.
        test: The same of the best model on the test file; called once, after training.
        publish: Writes the test file's scores and rows; returns the scores, with what it adds.

    Returns:
        The test file's scores; empty without one, or if a signal ended the run.
    """
    loop, inputs = run.loop, run.inputs

    def evaluate_and_keep(step: int) -> Scores:
        scores, rows = evaluate(step)
        if loop.write_predictions and distributed.is_main():
            write_jsonl(Path(loop.output_dir) / f"step-{step}-eval-predictions.jsonl", rows)
        return {f"eval_{name}": value for name, value in scores.items()}

    judge = evaluate_and_keep if inputs.eval and loop.eval_strategy != "no" else None
    state = train(objective, batches, loop, run.device, before_step, judge, run.checkpoint)
    if state.interrupted or not inputs.test:
        write_report(loop.output_dir)
    if state.interrupted:
        return {}
    scores, rows = test() if inputs.test else ({}, [])
    merge_adapters(loop, type(model))
    if inputs.test:
        scores = publish({f"test_{name}": value for name, value in scores.items()}, rows)
        log.info("test  %s", "  ".join(f"{name} {value:.4g}" for name, value in scores.items()))
    return scores


SHARED_ARGUMENTS = (DataArguments, LoopArguments, EvaluationArguments, EncoderArguments, IndexArguments)


@dataclass
class Training:
    """What an algorithm brings.

    Attributes:
        objective: The module to train; it holds the retriever's encoder.
        collate: Numbers of training examples -> one micro-batch.
        refresher: Keeps the live retriever's index fresh; None where nothing is retrieved in training.
    """

    objective: nn.Module
    collate: Callable[[Sequence[int]], Any]
    refresher: Refresher | None = None


def train_retriever(
    data: DataArguments,
    loop: LoopArguments,
    evaluation: EvaluationArguments,
    encoder: EncoderArguments,
    index: IndexArguments,
    prepare: Callable[[Sequence[Example], Retriever], Training],
    all_arguments: Sequence[Any],
    answers: bool = False,
) -> dict[str, float]:
    """Train, choose the best encoder by the eval file, score it on the test file.

    Args:
        prepare: The algorithm, made from the training examples and the live retriever.
        answers: Whether the training file must have answers.

    Returns:
        The test file's scores; empty without one, or if a signal ended the run.

    Raises:
        UserError: what a user can mend.
    """
    loop.eval_on_start = loop.eval_on_start is not False
    run = begin(data, loop, all_arguments, "retr/mrr@10", train_answers=answers, eval_answers=False)
    device, dtype, inputs = run.device, run.dtype, run.inputs
    with distributed.in_turn():
        retriever = Retriever(load_encoder(run.source, encoder, **run.options).to(device), inputs.documents, index)
    backbone = retriever.encoder.backbone
    train_adapters(backbone, loop)
    freeze_pooler(backbone)
    _ = retriever.encoder.collate  # found out here: a probe under the loop's autocast would leave it frozen weights
    with autocast(device, dtype):
        training = prepare(inputs.train, retriever)
        refresher = training.refresher
        if refresher and data.full_dataset_index_path and not run.checkpoint:
            retriever.open(data.full_dataset_index_path)  # of the weights before training; written at no other time
    require_whole_encoder(loop, refresher, retriever.encoder)

    judged = Retriever(retriever.encoder, inputs.documents, index)  # so that to evaluate changes nothing in training

    def measure(examples: Sequence[Example], index_path: str | None = None) -> tuple[Scores, Rows]:
        with autocast(device, dtype):
            if not (judged.encoder.passage_encoder and len(judged.index)):  # frozen passages are encoded once
                judged.open(index_path)
            found = find_passages(judged, examples, evaluation)
        rows = retrieval_rows(found, examples, evaluation.recall_at)
        return mean_scores([row["scores"] for row in rows]), rows

    def evaluate(step: int) -> tuple[Scores, Rows]:
        return measure(inputs.eval, None if step else data.full_dataset_index_path)

    def test() -> tuple[Scores, Rows]:
        if refresher:
            refresher.close()  # nothing is encoded beside the test
        best = load_encoder(loop.output_dir, empty=not distributed.is_main(), **run.options)
        load_whole_weights(retriever.encoder, best.state_dict())
        return measure(inputs.test)

    def publish(scores: Scores, rows: Rows) -> Scores:
        write_results(loop.output_dir, scores, rows)
        return scores

    batches = Batches(len(inputs.train), training.collate, loop)
    with closing(refresher) if refresher else nullcontext():
        return train_and_test(run, training.objective, backbone, batches, evaluate, test, publish, refresher)


def require_whole_encoder(loop: LoopArguments, refresher: Refresher | None, encoder: Encoder) -> None:
    """Some ways to keep the index cheap need the whole encoder, and on every process.

    Raises:
        UserError: `--fsdp` divides it, or `--use_lora` trains a part.
    """
    in_background = refresher is not None and refresher.arguments.refresh_async
    if encoder.passage_encoder and loop.use_lora:
        raise UserError("--train_query_encoder_only true: trains the whole encoder of questions; leave out --use_lora")
    flag = "refresh_async" if in_background else "train_query_encoder_only" if encoder.passage_encoder else ""
    if flag and loop.fsdp != "no":
        raise UserError(f"--{flag} true: needs the whole encoder on every process; leave out --fsdp")


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
