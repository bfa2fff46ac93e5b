"""Evaluation of readers: answers over retrieved passages, scored and timed; in training also the gold answers' loss."""

import logging
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
import numpy as np
from torch import nn

from rqa.data import Answer, Document, Example
from rqa.evaluation.metrics import answer_statistics, bleu, faithfulness, right_answers, score_answer
from rqa.evaluation.results import Rows, Scores
from rqa.evaluation.retrieval import EvaluationArguments, find_passages, mean_scores, retrieval_rows
from rqa.evaluation.runtime import latencies, seconds
from rqa.models.loading import evaluating
from rqa.models.reader import LocalReader
from rqa.objectives.sft import encode_examples
from rqa.retrieval.retriever import PassageRetriever
from rqa.runtime import distributed
from rqa.runtime.parallelize import in_step

log = logging.getLogger(__name__)


def evaluate_answers(
    reader: LocalReader, examples: Sequence[Example], found: Sequence[Sequence[Document]], flags: EvaluationArguments,
    warm_up: bool = False,
) -> tuple[Scores, Rows]:  # fmt: skip
    """Answer over the retrieved passages only, never the gold ones, and score; each process answers its share.

    `reader` is anything that answers and warms up like a `LocalReader`; `warm_up` generates a short answer first, which
    is not timed. -> metrics by name, and one row per question: the example, its passages, the answer and the scores
    """
    read = [list(documents[: flags.embedding_max_num_to_retrieve]) for documents in found]
    mine = distributed.share(range(len(examples)))
    part: list[Answer] = []
    if warm_up:
        reader.warm_up(examples[0], read[0])
    duration = seconds(lambda: part.extend(reader.answer([examples[i] for i in mine], [read[i] for i in mine])))
    answers, duration = distributed.gather(part), max(distributed.total_by_rank(duration))
    replies = [answer for answer in answers if answer.num_tokens or answer.seconds is not None]  # of prompts that fit
    if few := sum(answer.cut or not answer.text for answer in replies):
        hint = "raise --max_new_tokens (of an encoder-decoder --max_decoder_seq_length)"
        log.warning("%d of %d replies were empty or cut; %s", few, len(replies), hint)
    rows = retrieval_rows(found, examples, flags.recall_at)
    for row, answer, passages in zip(rows, answers, read, strict=True):
        row |= {"retrieved_docs": row["retrieved_docs"][: len(passages)], "generated_answer": answer.text}
        texts = [passage.fmt_content for passage in passages]
        scores = score_answer(answer.text, *right_answers(row))
        scores |= {"faithfulness": faithfulness(answer.text, texts)}
        scores |= {"faithfulness_bigrams": faithfulness(answer.text, texts, 2)}
        row["scores"] |= {f"gen/{name}": value for name, value in scores.items()}
    metrics = mean_scores(rows)
    metrics["gen/bleu"] = bleu(np.sum(answer_statistics(rows), axis=0))
    metrics["gen/answer_words"] = sum(len(answer.text.split()) for answer in answers) / len(answers)
    return metrics | {f"gen/{name}": value for name, value in answer_speed(answers, duration).items()}, rows


def answer_speed(answers: Sequence[Answer], duration: float) -> Scores:
    """Throughput of answers given in `duration` seconds, and latencies: of single answers, or else of batches."""
    # Questions whose prompt did not fit, and answers kept from an earlier run, took no time and do not count.
    timed = [answer for answer in answers if answer.seconds is not None]
    if not timed:
        return {}
    tokens = sum(answer.num_tokens for answer in timed)
    speed = {"questions_per_second": len(timed) / duration, "tokens_per_second": tokens / duration}
    if all(answer.batch_size == 1 for answer in timed):
        return speed | latencies([answer.seconds for answer in timed])
    members = Counter((answer.seconds, answer.batch_size) for answer in timed)  # an answer's time is its batch's
    batches = [length for (length, size), count in members.items() for _ in range(count // size)]
    took = {f"batch_seconds_p{p}": float(np.percentile(batches, p)) for p in (50, 95)}
    return speed | took | {"questions_per_batch": len(timed) / len(batches)}


class ReaderEvaluation:
    """Evaluates a reader in training on one file; without a retriever only its loss, over the gold passages."""

    def __init__(self, retriever: PassageRetriever | None, examples: Sequence[Example], flags: Any) -> None:
        """Retrieve once. `flags` are `EvaluationArguments` with the loop's `per_device_eval_batch_size`."""
        self.examples, self.flags = examples, flags
        self.found = find_passages(retriever, examples, flags) if retriever and examples else None

    def __call__(self, objective: nn.Module, reader: LocalReader, warm_up: bool = False) -> tuple[Scores, Rows]:
        """`evaluate_answers` with the loss; objective and reader hold the same model."""
        if self.found is None:
            return {"loss": self.loss(objective, [list(example.gold_docs) for example in self.examples])}, []
        metrics, rows = evaluate_answers(reader, self.examples, self.found, self.flags, warm_up)
        k = self.flags.embedding_max_num_to_retrieve
        return {"loss": self.loss(objective, [documents[:k] for documents in self.found]), **metrics}, rows

    @torch.no_grad()
    def loss(self, objective: nn.Module, passages: Sequence[Sequence[Document]]) -> float:
        """Mean negative log-likelihood of the gold answers' tokens."""
        encoded = list(encode_examples(objective.prompter, self.examples, passages).values())
        sequences, filler, size = distributed.share(encoded), encoded[:1], self.flags.per_device_eval_batch_size
        parts = [sequences[i : i + size] for i in range(0, len(sequences), size)]
        sums = [0.0, 0.0]
        with evaluating(objective):
            for part in in_step(objective, parts, filler):
                batch = objective.batch(part).to(distributed.device())
                loss = float(objective(batch)[0])
                if part is not filler:
                    sums = [sums[0] + loss, sums[1] + batch.weight]
        loss, weight = distributed.total(sums)
        return loss / weight
