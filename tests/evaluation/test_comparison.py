"""Two runs side by side: who is paired with whom, and what the verdict says."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from rqa.data import Document, Example, Turn
from rqa.evaluation.comparison import changed_sides, compare, headline, pair
from rqa.evaluation.metrics import corpus_bleu
from rqa.evaluation.results import markdown_table, with_intervals, write_results
from rqa.evaluation.retrieval import retrieval_rows
from rqa.runtime.errors import UserError

Run = Callable[[str, dict[str, object]], int]


def row(question: str, **scores: float) -> dict[str, Any]:
    return Example(question, (Document(f"About {question}"),), "An answer.").to_json() | {"scores": scores}


def test_rows_are_paired_by_question_and_gold_whatever_their_order() -> None:
    first = [row(f"q{i}", f1=i / 10) for i in range(10)]
    second = [row(f"q{i}", f1=i / 10) for i in range(10)]
    random.Random(0).shuffle(second)
    assert all(a["question"] == b["question"] and a["scores"] == b["scores"] for a, b in pair(first, second))


def test_equal_questions_are_told_apart_by_gold_history_and_answer() -> None:
    kinds = [
        Example("q", (Document("a", {"source": "1"}),)),
        Example("q", (Document("a", {"source": "2"}),)),
        Example("q", (Document("a", {"source": "1"}),), chat_history=(Turn("user", "before"),)),
        Example("q", (Document("a", {"source": "1"}),), "answer"),
    ]
    first = [example.to_json() | {"scores": {"f1": float(i)}} for i, example in enumerate(kinds)]
    assert all(a["scores"] == b["scores"] for a, b in pair(first, first[::-1]))


def test_a_question_asked_twice_is_paired_twice() -> None:
    assert len(pair([row("q", f1=0), row("q", f1=1)], [row("q", f1=1), row("q", f1=0)])) == 2
    with pytest.raises(UserError, match="1 only in A, such as 'q'"):
        pair([row("q", f1=0), row("q", f1=1)], [row("q", f1=1)])


def test_other_questions_are_refused_by_name() -> None:
    with pytest.raises(UserError, match="1 only in B, such as 'r'"):
        pair([row("q", f1=0)], [row("q", f1=0), row("r", f1=0)])


def test_differences_are_those_of_the_means_with_scipys_interval() -> None:
    chance = np.random.default_rng(0)
    a, b = chance.random(50), chance.random(50)
    pairs = [(row(str(i), f1=x), row(str(i), f1=y)) for i, (x, y) in enumerate(zip(a, b, strict=True))]
    (found,) = compare(pairs)
    assert (found.first, found.second, found.questions, found.changed) == pytest.approx((a.mean(), b.mean(), 50, 50))
    theirs = stats.bootstrap((b - a,), np.mean, n_resamples=10_000, method="percentile", rng=1).confidence_interval
    assert (found.low, found.high) == pytest.approx(tuple(theirs), abs=0.01)


@pytest.mark.parametrize("lift", [0.0, 0.3])
def test_a_real_difference_is_told_from_chance_and_noise_is_not(lift: float) -> None:
    chance = np.random.default_rng(1)
    pairs = [(row(str(i), f1=x), row(str(i), f1=x + lift + 0.2 * y))
             for i, (x, y) in enumerate(zip(chance.random(75), chance.standard_normal(75), strict=True))]  # fmt: skip
    (found,) = compare(pairs)
    assert found.telling is (lift > 0)
    assert ("this is more than chance" in found.sentence()) is (lift > 0)
    assert ("this cannot be told from chance" in found.sentence()) is (lift == 0)


def test_the_same_run_twice_differs_in_nothing() -> None:
    rows = [row(str(i), f1=i / 7) | {"generated_answer": f"answer {i}"} for i in range(7)]
    for found in compare(pair(rows, rows)):
        assert (found.low, found.high, found.changed, found.telling) == (0, 0, 0, False)
        assert "is the same as A's" in found.sentence()


def test_bleu_is_compared_over_the_whole_corpus() -> None:
    first = [row(str(i), f1=0.0) | {"generated_answer": "An apple pie today."} for i in range(20)]
    second = [row(str(i), f1=0.0) | {"generated_answer": "An answer."} for i in range(20)]
    found = {difference.name: difference for difference in compare(pair(first, second))}["gen/bleu"]
    assert found.first == corpus_bleu(["An apple pie today."] * 20, ["An answer."] * 20)
    assert found.second == corpus_bleu(["An answer."] * 20, ["An answer."] * 20)
    assert found.telling


def test_questions_that_changed_side_are_listed() -> None:
    pairs = [
        (row(str(i), f1=a), row(str(i), f1=b)) for i, (a, b) in enumerate([(0, 1), (0.9, 0.5), (0.6, 0.4), (0, 0)])
    ]
    gained, lost = changed_sides(pairs, "f1")
    assert [found["question"] for found in gained] == ["0"]
    assert [found["question"] for found in lost] == ["2"]


def test_the_headline_is_the_metric_named_or_the_usual_one() -> None:
    scores = {"retr/recall@1": 0.0, "retr/recall@4": 0.0, "gen/rougeL": 0.5}
    differences = compare([(row("q", **scores), row("q", **scores))])
    assert headline(differences, None).name == "retr/recall@4"
    assert headline(differences, "gen/rougeL").name == "gen/rougeL"
    with pytest.raises(UserError, match="--metric f1: not in both runs; choose one of retr/recall@1"):
        headline(differences, "f1")


# ---------------------------------------------------------------- result files


def test_each_rate_has_its_own_number_of_questions() -> None:
    rows = [row(str(i), **{"gen/f1": i % 2}) for i in range(40)]
    for number in range(10):
        rows[number]["scores"]["retr/recall@1"] = 1.0
    details = with_intervals(rows)
    assert (details["test_gen/f1"]["value"], details["test_gen/f1"]["n"]) == (0.5, 40)
    assert (details["test_retr/recall@1"]["value"], details["test_retr/recall@1"]["n"]) == (1.0, 10)
    assert details["test_retr/recall@1"]["low"] < 0.7
    assert details["test_gen/f1"]["low"] < 0.5 < details["test_gen/f1"]["high"]
    table = markdown_table({"test_gen/f1": 0.5, "test_loss": 1.25}, details)
    assert "| test_gen/f1 | 0.500 | 0.350 to 0.650 | 40 |" in table
    assert "| test_loss | 1.25 | | |" in table


def test_results_say_on_which_machine_and_keep_every_question(tmp_path: Path, documents: list[Document]) -> None:
    rows = retrieval_rows([[documents[0]]], [Example("q", (documents[0],))], [1])
    write_results(tmp_path, {"test_retr/recall@1": 1.0}, rows)
    details = json.loads((tmp_path / "score_details.json").read_text())
    assert details["machine"]["cpu"]
    assert details["machine"]["threads"] == 1
    assert 0.05 < details["peak_memory_gib"]["host"] < 64
    (kept,) = [json.loads(line) for line in (tmp_path / "test-predictions.jsonl").open()]
    assert kept["scores"]["retr/recall@1"] == 1.0
    assert kept["retrieved_docs"] == [documents[0].to_json()]


# ---------------------------------------------------------------- executables


@pytest.fixture
def evaluated(data: Path, encoder_path: str, tmp_path: Path, run_executable: Run) -> Callable[[str, str], Path]:
    def evaluate(model: str, retriever: str) -> Path:
        output = tmp_path / retriever
        flags = {
            "embedding_model_name_or_path": model or encoder_path,
            "retriever": retriever,
            "document_path": data / "documents.jsonl",
            "eval_data_path": data / "train_w_qa.jsonl",
            "output_dir": output,
            "recall_at": [1, 3],
        }
        assert run_executable("evaluate_retriever", flags) == 0
        return output

    return evaluate


def test_retrievers_are_evaluated_and_compared(
    evaluated: Callable[[str, str], Path], run_line: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    outputs = [evaluated("bm25", "bm25"), evaluated("", "dense"), evaluated("", "hybrid")]
    for output in outputs:
        scores = json.loads((output / "score.json").read_text())
        assert {"test_retr/recall@1", "test_retr/recall@3", "test_retr/document_recall/recall3", "test_retr/mrr@10",
                "test_retr/ndcg@10", "test_retr/map@10", "test_retr/latency_p50_ms", "test_retr/latency_p99_ms",
                "test_retr/questions_per_second"} <= set(scores)  # fmt: skip
        assert json.loads((output / "all_args.json").read_text())["recall_at"] == [1, 3]
        assert "--fusion_weight" in (output / "report.html").read_text()
        assert len((output / "qrels.trec").read_text().splitlines()) == 16
    assert json.loads((outputs[0] / "score.json").read_text())["test_retr/recall@3"] > 0.9
    capsys.readouterr()
    assert run_line("compare_runs", outputs[1], outputs[0]) == 0
    said = capsys.readouterr().out
    assert said.rstrip().endswith("this is more than chance.")
    assert "gained by B in retr/recall@1:" in said
    assert run_line("compare_runs", outputs[1], outputs[1], "--metric", "retr/mrr@10") == 0
    assert "retr/mrr@10 is the same as A's" in capsys.readouterr().out


def test_a_retriever_is_not_scored_without_gold(
    data: Path, tmp_path: Path, run_executable: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "questions.jsonl").write_text('{"question": "Why?"}\n')
    flags = {"embedding_model_name_or_path": "bm25", "document_path": data / "documents.jsonl",
             "eval_data_path": tmp_path / "questions.jsonl", "output_dir": tmp_path / "out"}  # fmt: skip
    assert run_executable("evaluate_retriever", flags) == 2
    assert "questions.jsonl: no question has 'gold_docs'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        (["one"], "name two runs, as in compare_runs A B; found 1"),
        (["absent", "absent"], "absent: no such file"),
        (["old", "old"], "old:1: has no 'question' with 'scores'; evaluate the run again"),
        (["empty", "empty"], "empty: holds no predictions"),
        (["good", "other"], "the runs answer different questions: 1 only in A"),
        (["good", "good", "--metric", "gen/f2"], "--metric gen/f2: not in both runs; choose one of f1"),
    ],
)
def test_what_cannot_be_compared_is_one_line(
    runs: list[str], message: str, run_line: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {"old": {"question": "q"}, "good": row("q", f1=1.0), "other": row("r", f1=1.0)}
    for name, value in files.items():
        (tmp_path / name).write_text(json.dumps(value))
    (tmp_path / "empty").touch()
    assert (
        run_line("compare_runs", *(tmp_path / run if run in (*files, "empty", "absent") else run for run in runs)) == 2
    )
    assert message in capsys.readouterr().err
