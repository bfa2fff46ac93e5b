"""How long retrieval and answers take."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from rqa.data import Answer, Document, Example
from rqa.evaluation import runtime
from rqa.evaluation.answers import evaluate_answers
from rqa.evaluation.comparison import compare
from rqa.evaluation.executables import timed_retrieval
from rqa.evaluation.retrieval import EvaluationArguments
from rqa.evaluation.runtime import seconds
from rqa.models.encoder_decoder import FiDReader
from rqa.models.reader import CausalLMReader
from rqa.recipe.system import ReaderArguments, load_reader
from rqa.retrieval.hybrid import LexicalRetriever
from rqa.retrieval.reranking import RerankingRetriever
from rqa.retrieval.retriever import Hits

Answered = Callable[..., tuple[dict[str, float], list[dict[str, Any]]]]


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


def test_the_warm_up_is_no_part_of_a_time(documents: list[Document], examples: list[Example], time: Clock) -> None:
    assert seconds(lambda: time.sleep(0.05)) == 0.05
    hits, speed = timed_retrieval(SlowRetriever(documents), examples, 4)
    assert [speed[f"retr/{name}"] for name in ("latency_p50_ms", "latency_p99_ms")] == pytest.approx([2, 2])
    assert speed["retr/questions_per_second"] == pytest.approx(500)
    expected = LexicalRetriever(documents).retrieve([example.question for example in examples], 4)
    np.testing.assert_array_equal(hits.ids, expected.ids)


def test_the_latency_of_a_second_stage_stands_beside_that_of_the_first(
    documents: list[Document], examples: list[Example], time: Clock
) -> None:
    """The reranker takes 3 ms a pair."""
    ranker: Any = SimpleNamespace(score=lambda pairs: time.sleep(0.003 * len(pairs)) or np.zeros(len(pairs)))
    _, speed = timed_retrieval(RerankingRetriever(SlowRetriever(documents), ranker, 2), examples, 1)
    names = ("latency_p50_ms", "first_stage_latency_p50_ms", "reranking_latency_p50_ms", "questions_per_second")
    assert [speed[f"retr/{name}"] for name in names] == pytest.approx([8, 2, 6, 125])


@pytest.fixture
def answered(documents: list[Document], examples: list[Example]) -> Answered:
    """What a parrot's answers to all examples score and take."""
    found = [[document] for document in documents]
    return lambda parrot, **options: evaluate_answers(parrot, examples, found, EvaluationArguments(), **options)


def test_answers_are_timed_around_the_reader_alone(answered: Answered, examples: list[Example]) -> None:
    metrics, rows = answered(Parrot(), warm_up=True)
    speed = len(examples) / 0.05
    words = np.mean([len(example.question.split()) for example in examples])
    expected = {"gen/questions_per_second": speed, "gen/tokens_per_second": 3 * speed, "gen/answer_words": words,
                "gen/latency_p50_ms": 15, "gen/latency_p95_ms": 20, "gen/latency_p99_ms": 20,
                "gen/f1/avg_f1_ans": metrics["gen/f1"], "gen/rouge/avg_rougeL_ans": metrics["gen/rougeL"],
                **{name: np.mean([row["scores"][name] for row in rows]) for name in rows[0]["scores"]}}  # fmt: skip
    assert {name: metrics[name] for name in expected} == pytest.approx(expected)
    assert all(0 <= value <= 1 for row in rows for value in row["scores"].values())


def test_an_answer_is_scored_against_every_right_one_also_when_runs_are_compared(
    documents: list[Document], examples: list[Example], time: Clock
) -> None:
    asked = [replace(example, other_answers=("No.", example.question)) for example in examples]
    found = [[document] for document in documents]
    metrics, rows = evaluate_answers(Parrot(), asked, found, EvaluationArguments())
    wanted = {f"gen/{name}" for name in ("f1", "exact_match", "rouge1", "rouge2", "rougeL", "bleu")}
    assert {metrics[name] for name in wanted} == {1.0}
    assert {(difference.first, difference.second) for difference in compare([*zip(rows, rows, strict=True)])
            if difference.name in wanted} == {(1.0, 1.0)}  # fmt: skip


def test_questions_answered_together_tell_the_time_of_a_batch_and_no_latency(answered: Answered) -> None:
    metrics, _ = answered(Parrot(batch_size=8), warm_up=True)
    expected = {"gen/questions_per_batch": 8, "gen/questions_per_second": 24 / 0.05,
                "gen/batch_seconds_p50": 0.01, "gen/batch_seconds_p95": 0.019}  # fmt: skip
    assert {name: metrics[name] for name in expected} == pytest.approx(expected)  # of 10, 20 and 10 ms
    assert not [name for name in metrics if "latency" in name]


def test_what_was_not_generated_now_enters_no_time(answered: Answered, examples: list[Example]) -> None:
    metrics, rows = answered(Parrot(kept=len(examples) - 2), warm_up=True)
    expected = {"questions_per_second": 2 / 0.05, "tokens_per_second": 2 * 3 / 0.05, "latency_p50_ms": 15}
    assert {name: metrics[f"gen/{name}"] for name in expected} == pytest.approx(expected)
    assert len(rows) == len(examples)  # and yet each of them is scored
    metrics, _ = answered(Parrot(kept=len(examples)))
    assert not [name for name in metrics if "latency" in name or "per_" in name or "seconds" in name]


def test_replies_that_are_empty_or_cut_are_counted_and_questions_without_a_reply_are_not(
    documents: list[Document], examples: list[Example], time: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    told = [Answer("", 0), Answer("", 3), Answer("", 0, 0.1), Answer("It is", 3, 0.1, cut=True), Answer("Salt.", 3)]
    reader: Any = SimpleNamespace(answer=lambda *_: time.sleep(0.1) or told)
    evaluate_answers(reader, examples[:5], [documents[:1]] * 5, EvaluationArguments())
    assert [line for line in caplog.messages if "3 of 4 replies were empty or cut; raise --max_new_tokens" in line]
    caplog.clear()
    reader.answer = lambda *_: told[4:]
    evaluate_answers(reader, examples[:1], [[]], EvaluationArguments())
    assert not caplog.messages


def test_readers_warm_up_with_a_few_tokens(
    lm_path: str, t5_path: str, documents: list[Document], examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    for kind in (CausalLMReader, FiDReader):
        monkeypatch.setattr(kind, "generate", lambda self, prompts, n=7: asked.append(n) or [[0]] * len(prompts))
    for path in (lm_path, t5_path):
        reader: Any = load_reader(path, ReaderArguments(max_new_tokens=7, max_decoder_seq_length=7))
        reader.warm_up(examples[0], documents[:1])
        reader.answer(examples[:1], [documents[:1]])
        reader.warm_up(Example("why " * 3000), documents[:1])  # fits nowhere
    assert asked == [4, 7] * 2
