"""Times and machines."""

from dataclasses import replace

import torch
import numpy as np
import pytest
from transformers import GenerationConfig

from rqa.data import Document, Example
from rqa.endpoint.client import EndpointArguments
from rqa.endpoint.roles import ReaderPromptArguments, open_reader
from rqa.evaluation import runtime
from rqa.evaluation.answers import EvaluationArguments, evaluate_answers
from rqa.evaluation.retrieval import measure_speed
from rqa.evaluation.runtime import latencies, machine, machine_line, peak_memory, seconds
from rqa.models.reader import Answer, GenerationArguments
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


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(runtime, "time", clock)
    return clock


class SlowRetriever(LexicalRetriever):
    """Takes 20 ms for the first question that it is ever asked, then 2 ms a question."""

    def __init__(self, documents: list[Document], time: Clock) -> None:
        super().__init__(documents)
        self.time = time

    asked = 0

    def retrieve(self, queries: list[str], k: int) -> Hits:
        self.time.sleep(0.02 if not self.asked else 0.002 * len(queries))
        self.asked += len(queries)
        return super().retrieve(queries, k)


class Parrot:
    """Answers with the question, in two batches, the second slower; cold, it takes a second more.

    Args:
        untimed: Answers that it does not generate: the first so many.
    """

    def __init__(self, time: Clock, untimed: int = 0) -> None:
        self.time = time
        self.untimed = untimed
        self.cold = True

    def warm_up(self, example: Example, passages: list[Document]) -> None:
        self.time.sleep(float(self.cold))
        self.cold = False

    def answer(self, examples: list[Example], passages: list[list[Document]]) -> list[Answer]:
        self.time.sleep(0.05 + self.cold)
        timed = [Answer(example.question, 3, 0.01 * (1 + i % 2)) for i, example in enumerate(examples)]
        return [replace(answer, seconds=None) for answer in timed[: self.untimed]] + timed[self.untimed :]


def test_latencies_are_percentiles_in_milliseconds() -> None:
    durations = np.random.default_rng(0).random(1000)
    ordered = np.sort(durations) * 1000
    found = latencies(durations)
    assert found["latency_p50_ms"] == pytest.approx((ordered[499] + ordered[500]) / 2)
    assert found["latency_p95_ms"] == pytest.approx(ordered[949] + 0.05 * (ordered[950] - ordered[949]))
    assert list(found) == ["latency_p50_ms", "latency_p95_ms", "latency_p99_ms"]
    assert latencies([0.25])["latency_p99_ms"] == 250


def test_seconds_are_those_of_the_work(time: Clock) -> None:
    assert seconds(lambda: time.sleep(0.05)) == 0.05


def test_the_warm_up_is_no_part_of_the_latency(documents: list[Document], examples: list[Example], time: Clock) -> None:
    speed = measure_speed(SlowRetriever(documents, time), examples, 4)
    assert speed["retr/latency_p50_ms"] == pytest.approx(2)
    assert speed["retr/latency_p99_ms"] == pytest.approx(2)
    assert speed["retr/questions_per_second"] == pytest.approx(500)


def test_answers_are_timed_around_the_reader_alone(
    documents: list[Document], examples: list[Example], time: Clock
) -> None:
    found = [[document] for document in documents]
    metrics, rows = evaluate_answers(Parrot(time), examples, found, EvaluationArguments(), warm_up=True)
    assert metrics["gen/questions_per_second"] == pytest.approx(len(examples) / 0.05)
    assert metrics["gen/tokens_per_second"] == pytest.approx(3 * metrics["gen/questions_per_second"])
    assert metrics["gen/latency_p50_ms"] == pytest.approx(15)
    assert metrics["gen/latency_p99_ms"] == pytest.approx(20)
    words = [len(example.question.split()) for example in examples]
    assert metrics["gen/answer_words"] == pytest.approx(sum(words) / len(words))
    rates = [name for row in rows for name, value in row["scores"].items() if 0 <= value <= 1]
    assert len(rates) == sum(len(row["scores"]) for row in rows)
    assert metrics["gen/f1/avg_f1_ans"] == metrics["gen/f1"]  # LocalRQA's names
    assert metrics["gen/rouge/avg_rougeL_ans"] == metrics["gen/rougeL"]
    for name in rows[0]["scores"]:
        assert metrics[name] == pytest.approx(np.mean([row["scores"][name] for row in rows]))


def test_what_was_not_generated_now_enters_no_latency_and_no_throughput(
    documents: list[Document], examples: list[Example], time: Clock
) -> None:
    found = [[document] for document in documents]
    reader = Parrot(time, untimed=len(examples) - 2)
    metrics, rows = evaluate_answers(reader, examples, found, EvaluationArguments(), warm_up=True)
    assert metrics["gen/questions_per_second"] == pytest.approx(2 / 0.05)
    assert metrics["gen/tokens_per_second"] == pytest.approx(2 * 3 / 0.05)
    assert metrics["gen/latency_p50_ms"] == pytest.approx(15)
    assert len(rows) == len(examples)  # and yet each of them is scored
    reader.untimed = len(examples)
    metrics, _ = evaluate_answers(reader, examples, found, EvaluationArguments())
    assert not [name for name in metrics if "latency" in name or "per_second" in name]


def test_readers_warm_up_with_a_few_tokens(
    lm_path: str, t5_path: str, documents: list[Document], examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def note(self: GenerationArguments, max_new_tokens: int, *others: object, **options: object) -> GenerationConfig:
        asked.append(max_new_tokens)
        return config(self, max_new_tokens, *others, **options)

    config = GenerationArguments.config
    monkeypatch.setattr(GenerationArguments, "config", note)
    for path in (lm_path, t5_path):
        prompt = ReaderPromptArguments(max_new_tokens=7, max_decoder_seq_length=7)
        reader = open_reader(path, prompt, GenerationArguments(), EndpointArguments(), torch.device("cpu"))
        reader.warm_up(examples[0], documents[:1])
        reader.answer(examples[:1], [documents[:1]])
        reader.warm_up(Example("why " * 3000), documents[:1])  # fits nowhere
    assert asked == [4, 7] * 2


def test_the_machine_is_named_in_one_line() -> None:
    found = machine()
    assert found["torch"] == torch.__version__
    assert found["threads"] == torch.get_num_threads()
    line = machine_line(found)
    assert "\n" not in line
    assert found["cpu"] in line or found["gpu"] in line
    assert peak_memory()["host"] > 0.05


@pytest.mark.parametrize(
    ("flags", "message"),
    [({"recall_at": [4, 0]}, "--recall_at 0"), ({"embedding_max_num_to_retrieve": -1}, "--embedding_max_num")],
)
def test_flags_that_make_no_sense_are_refused(flags: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        EvaluationArguments(**flags)
