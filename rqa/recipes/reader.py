"""Training a decoder reader, from files to scores. SFT and SwR differ only in the passages of a training prompt."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from rqa.data.documents import Document
from rqa.data.examples import Example
from rqa.evaluation.results import write_results
from rqa.evaluation.rqa import EvaluationArguments, evaluate_answers, find_passages
from rqa.models.causal_lm import CausalLMReader, load_causal_lm
from rqa.models.encoder import EncoderArguments, load_encoder
from rqa.models.loading import evaluating, load_tokenizer
from rqa.models.lora import train_adapters
from rqa.objectives.answer import AnswerLikelihood
from rqa.packing import AnswerBatch
from rqa.prompts import DoesNotFit, PromptArguments, Prompter, TokenSequence
from rqa.recipes.files import DataArguments, merge_adapters, open_output, read_inputs
from rqa.retrieval.index import IndexArguments
from rqa.retrieval.retriever import Retriever
from rqa.runtime import distributed
from rqa.runtime.errors import UserError
from rqa.runtime.files import write_jsonl
from rqa.runtime.parallelize import in_step, load_whole_weights
from rqa.runtime.precision import autocast, compute_dtype
from rqa.training.arguments import LoopArguments
from rqa.training.batches import Batches
from rqa.training.checkpoint import checkpoint_to_resume
from rqa.training.loop import train

log = logging.getLogger(__name__)

SHARED_ARGUMENTS = (
    DataArguments,
    LoopArguments,
    PromptArguments,
    EvaluationArguments,
    EncoderArguments,
    IndexArguments,
)

ChoosePassages = Callable[[Sequence[Example], Retriever | None], list[list[Document]]]


def train_reader(
    data: DataArguments,
    loop: LoopArguments,
    prompt: PromptArguments,
    evaluation: EvaluationArguments,
    encoder: EncoderArguments,
    index: IndexArguments,
    embedding_model: str | None,
    choose_passages: ChoosePassages,
    all_arguments: Sequence[Any],
) -> dict[str, float]:
    """Train, choose the best model by the eval file, score it on the test file.

    Args:
        embedding_model: The frozen retriever; None: nothing is retrieved, and evaluation is the loss on gold passages.
        choose_passages: The passages of each training prompt.
        all_arguments: Every dataclass, for `all_args.json`.

    Returns:
        The test file's scores; empty without one, or if a signal ended the run.

    Raises:
        UserError: what a user can mend.
    """
    device = distributed.start()
    checkpoint = distributed.from_main(checkpoint_to_resume(loop) if distributed.is_main() else None)
    set_seed(loop.seed)
    inputs = read_inputs(data, loop, train_answers=True, eval_answers=True)
    open_output(loop.output_dir, all_arguments, checkpoint)
    loop.metric_for_best_model = loop.metric_for_best_model or "loss"

    options = {"flash": loop.use_flash_attention, "trust_remote_code": loop.trust_remote_code}
    dtype = compute_dtype(loop.bf16, loop.fp16, device)
    source = str(checkpoint or data.model_name_or_path)
    prompter = Prompter(load_tokenizer(source, loop.trust_remote_code), prompt)
    with distributed.in_turn():
        model = load_causal_lm(source, **options).to(device)
    train_adapters(model, loop)
    objective = AnswerLikelihood(model, prompter)
    retriever = None
    if embedding_model:
        retriever = Retriever(load_encoder(embedding_model, encoder, **options).to(device), inputs.documents, index)
    with autocast(device, dtype):
        if retriever:
            retriever.open(data.full_dataset_index_path)
        passages = choose_passages(inputs.train, retriever)
        evaluate = ReaderEvaluation(objective, retriever, inputs.eval, evaluation, loop)
        test = ReaderEvaluation(objective, retriever, inputs.test, evaluation, loop)

    sequences = encode_examples(prompter, inputs.train, passages)
    kept = list(sequences)

    def micro_batch(indices: Sequence[int]) -> AnswerBatch:
        numbers = [kept[i] for i in indices]
        return objective.batch([sequences[number] for number in numbers], numbers)

    def evaluate_and_keep(step: int) -> dict[str, float]:
        with autocast(device, dtype):
            metrics, rows = evaluate()
        if loop.write_predictions and distributed.is_main():
            write_jsonl(Path(loop.output_dir) / f"step-{step}-eval-predictions.jsonl", rows)
        return {f"eval_{name}": value for name, value in metrics.items()}

    state = train(
        objective,
        Batches(len(sequences), micro_batch, loop),
        loop,
        device,
        evaluate=evaluate_and_keep if inputs.eval and loop.eval_strategy != "no" else None,
        checkpoint=checkpoint,
    )
    if state.interrupted:
        return {}
    scores = {}
    if inputs.test:
        with distributed.in_turn():
            load_whole_weights(model, load_causal_lm(loop.output_dir, **options).state_dict())
        with autocast(device, dtype):
            metrics, rows = test()
        scores = {f"test_{name}": value for name, value in metrics.items()}
        write_results(loop.output_dir, scores, rows)
        log.info("test  %s", "  ".join(f"{name} {value:.4g}" for name, value in scores.items()))
    merge_adapters(loop, type(model))
    return scores


class ReaderEvaluation:
    """Measures a reader on one file: the loss of the gold answers, and answers over what the retriever finds.

    Passages are found once, when this is made: the retriever is frozen. Without one, only the loss is measured, over
    the gold passages.
    """

    def __init__(
        self,
        objective: AnswerLikelihood,
        retriever: Retriever | None,
        examples: Sequence[Example],
        arguments: EvaluationArguments,
        loop: LoopArguments,
    ) -> None:
        self.objective = objective
        self.reader = CausalLMReader(objective.model, objective.prompter)
        self.examples = examples
        self.arguments = arguments
        self.batch_size = loop.per_device_eval_batch_size
        self.found = find_passages(retriever, examples, arguments) if retriever and examples else None

    def __call__(self) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Metrics by name, and one row a question."""
        if self.found is None:
            return {"loss": self.loss([list(example.gold_docs) for example in self.examples])}, []
        k = self.arguments.embedding_max_num_to_retrieve
        metrics, rows = evaluate_answers(self.reader, self.examples, self.found, self.arguments)
        return {"loss": self.loss([documents[:k] for documents in self.found]), **metrics}, rows

    @torch.no_grad()
    def loss(self, passages: Sequence[Sequence[Document]]) -> float:
        """Mean negative log-likelihood of the gold answers' tokens."""
        encoded = encode_examples(self.objective.prompter, self.examples, passages)
        sequences = distributed.share(list(encoded.values()))
        parts = [sequences[i : i + self.batch_size] for i in range(0, len(sequences), self.batch_size)]
        filler = list(encoded.values())[:1]
        sums = [0.0, 0.0]
        with evaluating(self.objective):
            for part in in_step(self.objective, parts, filler):
                batch = self.objective.batch(part).to(self.reader.model.device)
                loss = float(self.objective(batch)[0])
                if part is not filler:
                    sums = [sums[0] + loss, sums[1] + batch.weight]
        loss, weight = distributed.total(sums)
        return loss / weight


def encode_examples(
    prompter: Prompter, examples: Sequence[Example], passages: Sequence[Sequence[Document]]
) -> dict[int, TokenSequence]:
    """Prompts with their gold answers, by the example's number; one that does not fit is reported and left out.

    Raises:
        UserError: none fits.
    """
    sequences = {}
    for number, (example, documents) in enumerate(zip(examples, passages, strict=True)):
        try:
            sequences[number] = prompter.encode(example, documents, example.gold_answer)
        except DoesNotFit as error:
            log.warning("%s; the example is left out", error)
    if not sequences:
        raise UserError("--max_seq_length: no example fits; raise it")
    return sequences
