"""Times and machines."""

from dataclasses import dataclass, replace
from typing import Any

import torch
import numpy as np
import pytest

from rqa.data import Document, Example
from rqa.evaluation import runtime
from rqa.evaluation.answers import evaluate_answers
from rqa.evaluation.executables import EvaluationDataArguments, measure_speed
from rqa.evaluation.retrieval import EvaluationArguments
from rqa.evaluation.runtime import latencies, machine, machine_line, peak_memory, seconds
from rqa.models.reader import Answer, GenerationArguments
from rqa.recipe.system import ReaderArguments, load_reader
from rqa.retrieval.hybrid import LexicalRetriever
from rqa.retrieval.retriever import Hits
from rqa.runtime.errors import UserError


class Clock:
    """Stands for the `time` module: it moves only when somebody sleeps."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, duration: float) -> None:
        self.now += duration


@pytest.fixture(autouse=True)
def time(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(runtime, "time", clock)
    return clock


class SlowRetriever(LexicalRetriever):
    """Takes 20 ms for the first question that it is ever asked, then 2 ms a question."""

    asked = 0

    def retrieve(self, queries: list[str], k: int) -> Hits:
        runtime.time.sleep(0.02 if not self.asked else 0.002 * len(queries))
        self.asked += len(queries)
        return super().retrieve(queries, k)


@dataclass
class Parrot:
    """Answers with the question, all in 50 ms; cold, it takes a second more. Batches take 10 and 20 ms in turn."""

    batch_size: int = 1
    kept: int = 0  # answers that it does not generate: the first so many
    cold: bool = True

    def warm_up(self, example: Example, passages: list[Document]) -> None:
        runtime.time.sleep(float(self.cold))
        self.cold = False

    def answer(self, examples: list[Example], passages: list[list[Document]]) -> list[Answer]:
        runtime.time.sleep(0.05 + self.cold)
        took = [0.01 * (1 + i // self.batch_size % 2) for i in range(len(examples))]
        answers = [Answer(x.question, 3, t, self.batch_size) for x, t in zip(examples, took, strict=True)]
        return [replace(answer, seconds=None) for answer in answers[: self.kept]] + answers[self.kept :]


def test_latencies_are_percentiles_in_milliseconds() -> None:
    durations = np.random.default_rng(0).random(1000)
    ordered, found = np.sort(durations) * 1000, latencies(durations)
    assert found["latency_p50_ms"] == pytest.approx((ordered[499] + ordered[500]) / 2)
    assert found["latency_p95_ms"] == pytest.approx(ordered[949] + 0.05 * (ordered[950] - ordered[949]))
    assert list(found) == ["latency_p50_ms", "latency_p95_ms", "latency_p99_ms"]
    assert latencies([0.25])["latency_p99_ms"] == 250


def test_the_warm_up_is_no_part_of_a_time(documents: list[Document], examples: list[Example], time: Clock) -> None:
    assert seconds(lambda: time.sleep(0.05)) == 0.05
    speed = measure_speed(SlowRetriever(documents), examples, 4)
    assert speed["retr/latency_p50_ms"] == pytest.approx(2)
    assert speed["retr/latency_p99_ms"] == pytest.approx(2)
    assert speed["retr/questions_per_second"] == pytest.approx(500)


def test_answers_are_timed_around_the_reader_alone(documents: list[Document], examples: list[Example]) -> None:
    found = [[document] for document in documents]
    metrics, rows = evaluate_answers(Parrot(), examples, found, EvaluationArguments(), warm_up=True)
    assert metrics["gen/questions_per_second"] == pytest.approx(len(examples) / 0.05)
    assert metrics["gen/tokens_per_second"] == pytest.approx(3 * metrics["gen/questions_per_second"])
    assert metrics["gen/latency_p50_ms"] == pytest.approx(15)
    assert metrics["gen/latency_p99_ms"] == pytest.approx(20)
    assert metrics["gen/answer_words"] == pytest.approx(np.mean([len(x.question.split()) for x in examples]))
    assert all(0 <= value <= 1 for row in rows for value in row["scores"].values())
    assert metrics["gen/f1/avg_f1_ans"] == metrics["gen/f1"]  # LocalRQA's names
    assert metrics["gen/rouge/avg_rougeL_ans"] == metrics["gen/rougeL"]
    for name in rows[0]["scores"]:
        assert metrics[name] == pytest.approx(np.mean([row["scores"][name] for row in rows]))


def test_questions_answered_together_tell_the_time_of_a_batch_and_no_latency(
    documents: list[Document], examples: list[Example]
) -> None:
    found = [[document] for document in documents]
    metrics, _ = evaluate_answers(Parrot(batch_size=8), examples, found, EvaluationArguments(), warm_up=True)
    assert metrics["gen/questions_per_batch"] == 8
    assert metrics["gen/batch_seconds_p50"] == pytest.approx(0.01)  # of 10, 20 and 10 ms
    assert metrics["gen/batch_seconds_p95"] == pytest.approx(0.01 + 0.9 * 0.01)
    assert metrics["gen/questions_per_second"] == pytest.approx(24 / 0.05)
    assert not [name for name in metrics if "latency" in name]


def test_what_was_not_generated_now_enters_no_time(documents: list[Document], examples: list[Example]) -> None:
    found, kept = [[document] for document in documents], len(examples) - 2
    metrics, rows = evaluate_answers(Parrot(kept=kept), examples, found, EvaluationArguments(), warm_up=True)
    assert metrics["gen/questions_per_second"] == pytest.approx(2 / 0.05)
    assert metrics["gen/tokens_per_second"] == pytest.approx(2 * 3 / 0.05)
    assert metrics["gen/latency_p50_ms"] == pytest.approx(15)
    assert len(rows) == len(examples)  # and yet each of them is scored
    metrics, _ = evaluate_answers(Parrot(kept=len(examples)), examples, found, EvaluationArguments())
    assert not [name for name in metrics if "latency" in name or "per_" in name or "seconds" in name]


def test_readers_warm_up_with_a_few_tokens(
    lm_path: str, t5_path: str, documents: list[Document], examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, config = [], GenerationArguments.config
    monkeypatch.setattr(
        GenerationArguments, "config", lambda self, n, *a, **o: asked.append(n) or config(self, n, *a, **o)
    )
    for path in (lm_path, t5_path):
        reader: Any = load_reader(path, ReaderArguments(max_new_tokens=7, max_decoder_seq_length=7))
        reader.warm_up(examples[0], documents[:1])
        reader.answer(examples[:1], [documents[:1]])
        reader.warm_up(Example("why " * 3000), documents[:1])  # fits nowhere
    assert asked == [4, 7] * 2


def test_the_machine_is_named_in_one_line() -> None:
    found, line = machine(), machine_line(machine())
    assert (found["torch"], found["threads"]) == (torch.__version__, torch.get_num_threads())
    assert "\n" not in line
    assert found["cpu"] in line or found["gpu"] in line
    assert peak_memory()["host"] > 0.05


def test_flags_that_make_no_sense_are_refused() -> None:
    with pytest.raises(UserError, match="--recall_at 0"):
        EvaluationArguments(recall_at=[4, 0])
    with pytest.raises(UserError, match="--embedding_max_num"):
        EvaluationArguments(embedding_max_num_to_retrieve=-1)
    with pytest.raises(UserError, match="--max_examples -7"):
        EvaluationDataArguments(embedding_model="", document_path="", eval_data_path="", output_dir="", max_examples=-7)
