"""Intervals, on data whose truth is known and against plain resampling; two runs side by side; the files of a run."""

import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sacrebleu
from scipy import stats

from rqa.data import Document, Example, Turn
from rqa.evaluation.comparison import Difference, changed_sides, compare, headline, pair
from rqa.evaluation.metrics import bleu, bleu_samples, bleu_statistics
from rqa.evaluation.results import interval, markdown_table, mean_intervals, with_intervals
from rqa.runtime.errors import UserError


def test_intervals_are_those_of_scipys_bootstrap_at_every_call_and_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(3).random((40, 2)) ** 2
    ours = mean_intervals(values)
    for column, ends in zip(values.T, ours, strict=True):
        theirs = stats.bootstrap((column,), np.mean, n_resamples=10_000, method="percentile", rng=4)
        assert ends == pytest.approx(list(theirs.confidence_interval), abs=0.006)
    np.testing.assert_array_equal(mean_intervals(values), ours)
    monkeypatch.setattr("rqa.evaluation.results.CHUNK", 1000)  # a large file is resampled in bounded memory
    np.testing.assert_allclose(mean_intervals(values), ours, atol=0.01)


def test_all_right_or_all_wrong_is_not_certainty() -> None:
    ends = mean_intervals(np.stack([np.zeros(75), np.ones(75)], axis=1))
    for right, ours in zip((0, 75), ends, strict=True):
        theirs = stats.binomtest(right, 75).proportion_ci(method="exact")
        assert ours == pytest.approx([theirs.low, theirs.high])


def test_the_interval_of_bleu_is_that_of_sacrebleus_bootstrap() -> None:
    chance = random.Random(9)
    references = [" ".join(chance.choices("abcdef", k=12)) for _ in range(60)]
    answers = [" ".join(word if chance.random() < 0.8 else "x" for word in text.split()) for text in references]
    statistics = np.array([bleu_statistics(*pair) for pair in zip(answers, references, strict=True)])
    samples = bleu_samples(statistics)
    theirs = sacrebleu.BLEU().corpus_score(answers, [references], n_bootstrap=1000)
    assert bleu(statistics.sum(axis=0)) == pytest.approx(theirs.score / 100)
    assert samples.mean() == pytest.approx(theirs._mean / 100, abs=0.01)
    low, high = interval(samples)
    assert (high - low) / 2 == pytest.approx(theirs._ci / 100, rel=0.15)


@pytest.mark.parametrize(
    ("low", "high", "changed", "significant"),
    [(0.01, 0.2, 6, True), (-0.2, -0.01, 40, True), (-0.01, 0.2, 40, False), (0.01, 0.2, 5, False), (0, 0, 1, False)],
)
def test_a_difference_tells_when_it_excludes_0_and_enough_questions_changed(
    low: float, high: float, changed: int, significant: bool
) -> None:
    found = Difference("f1", 0.5, 0.6, low, high, 50, changed)
    verdict = "this is significant" if significant else "this is not significant"
    assert (found.significant, verdict in found.sentence()) == (significant, True)


def row(question: str, **scores: float) -> dict[str, Any]:
    return Example(question, (Document(f"About {question}"),), "An answer.").to_json() | {"scores": scores}


def test_rows_are_paired_by_question_gold_history_and_answer_whatever_their_order() -> None:
    one, two = Document("a", {"source": "1"}), Document("a", {"source": "2"})
    kinds = [Example("q", (one,)), Example("q", (two,)), Example("q", (one,), chat_history=(Turn("user", "before"),)),
             Example("q", (one,), "answer"), *(Example(f"q{i}", (one,), "answer") for i in range(10))]  # fmt: skip
    first = [example.to_json() | {"scores": {"f1": float(i)}} for i, example in enumerate(kinds)]
    assert pair(first, first[::-1]) == [(row, row) for row in first]


def test_a_question_asked_twice_is_paired_twice_and_others_are_refused_by_name() -> None:
    one, two, other = row("q", f1=0), row("q", f1=1), row("r")
    assert len(pair([one, two], [two, one])) == 2
    for first, second, message in (([one, two], [one], "A, such as 'q'"), ([one], [one, other], "B, such as 'r'")):
        with pytest.raises(UserError, match=f"1 only in {message}"):
            pair(first, second)


def test_differences_are_those_of_the_means_and_of_bleu_over_the_whole_corpus() -> None:
    scores, texts = np.random.default_rng(0).random((2, 20)), ("An apple pie today.", "An answer.")
    first, second = (
        [row(str(i), f1=score) | {"generated_answer": text} for i, score in enumerate(side)]
        for side, text in zip(scores, texts, strict=True)
    )
    found = {difference.name: difference for difference in compare(pair(first, second))}
    f1, total = found["f1"], found["gen/bleu"]
    assert [f1.first, f1.second, f1.questions, f1.changed] == pytest.approx([*scores.mean(axis=1), 20, 20])
    assert f1.low < f1.second - f1.first < f1.high
    theirs = sacrebleu.BLEU().corpus_score(texts[:1] * 20, [["An answer."] * 20]).score
    assert [total.first, total.second, total.significant] == pytest.approx([theirs / 100, 1, True])


def test_questions_that_changed_side_are_listed() -> None:
    scores = [(0, 1), (0.9, 0.5), (0.6, 0.4), (0, 0)]
    pairs = [(row(str(i), f1=a), row(str(i), f1=b)) for i, (a, b) in enumerate(scores)]
    gained, lost = changed_sides([*pairs, (row("4"), row("4", f1=1))], "f1")
    assert ([found["question"] for found in gained], [found["question"] for found in lost]) == (["0"], ["2"])


def test_the_headline_is_the_metric_named_or_the_usual_one() -> None:
    scores = {"retr/recall@1": 0.0, "retr/recall@4": 0.0, "gen/rougeL": 0.5}
    differences = compare([(row("q", **scores), row("q", **scores))])
    assert [headline(differences, name).name for name in (None, "gen/rougeL")] == ["retr/recall@4", "gen/rougeL"]


def test_each_rate_has_its_own_number_of_questions() -> None:
    rows = [row(str(i), **{"gen/f1": i % 2} | ({"retr/recall@1": 1.0} if i < 10 else {})) for i in range(40)]
    details = with_intervals(rows)
    found = {name: (rate["value"], rate["n"]) for name, rate in details.items()}
    assert found == {"test_gen/f1": (0.5, 40), "test_retr/recall@1": (1.0, 10)}
    assert details["test_retr/recall@1"]["low"] < 0.7
    table = markdown_table({"test_gen/f1": 0.5, "test_gen/f1/avg_f1_ans": 0.5, "test_loss": 1.25}, details)
    assert "| test_gen/f1 | 0.500 | 0.350 to 0.650 | 40 |" in table
    assert "| test_loss | 1.25 | | |" in table
    assert "avg_f1_ans" not in table


def test_retrievers_are_evaluated_by_sources_or_texts_on_a_machine_that_is_named_and_compared(
    data: Path, encoder_path: str, tmp_path: Path, run_line: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    asked = re.sub(r'"metadata": {"source": [^}]*}', '"metadata": {}', (data / "train_w_qa.jsonl").read_text())
    (tmp_path / "asked.jsonl").write_text(asked)
    files = ["--document_path", data / "documents.jsonl", "--eval_data_path", tmp_path / "asked.jsonl"]
    metrics = "recall@1 recall@3 document_recall/recall3 mrr@10 ndcg@10 map@10 latency_p50_ms latency_p99_ms"
    for retriever in ("bm25", "dense", "hybrid"):
        which = ["--embedding_model", "bm25" if retriever == "bm25" else encoder_path, "--retriever", retriever]
        output = tmp_path / retriever
        assert run_line("evaluate_retriever", *files, *which, "--output_dir", output, "--recall_at", 1, 3) == 0
        scores, details, flags = (
            json.loads((output / f"{name}.json").read_text()) for name in ("score", "score_details", "all_args")
        )
        assert {f"test_retr/{name}" for name in [*metrics.split(), "questions_per_second"]} <= set(scores)
        assert (flags["recall_at"], details["machine"]["threads"]) == ([1, 3], 1)
        assert details["machine"]["cpu"]
        assert 0.05 < details["peak_memory_gib"]["host"] < 64
        assert "--fusion_weight" in (output / "report.html").read_text()
        assert len((output / "qrels.trec").read_text().splitlines()) == 16
        rows = [json.loads(line) for line in (output / "test-predictions.jsonl").open()]
        assert [len(row["retrieved_docs"]) >= 3 for row in rows] == [True] * 16
        assert retriever != "bm25" or scores["test_retr/recall@3"] > 0.9
    assert "16 gold passages are not in the database" in capsys.readouterr().err
    assert run_line("compare_runs", tmp_path / "dense", tmp_path / "bm25", "--show", 1) == 0
    said = capsys.readouterr().out
    assert said.rstrip().endswith("this is significant.")
    assert "gained by B in retr/recall@1:" in said
    assert 1 <= said.count("\n- ") <= 2
    assert run_line("compare_runs", tmp_path / "dense", tmp_path / "dense", "--metric", "retr/mrr@10") == 0
    assert "retr/mrr@10 is the same as A's" in capsys.readouterr().out


def test_a_retriever_is_not_scored_without_gold(data: Path, tmp_path: Path, refused: Callable[..., None]) -> None:
    (tmp_path / "questions.jsonl").write_text('{"question": "Why?"}\n')
    files = ["--document_path", data / "documents.jsonl", "--eval_data_path", tmp_path / "questions.jsonl"]
    line = ["evaluate_retriever", "--embedding_model", "bm25", *files, "--output_dir", tmp_path / "out"]
    refused("questions.jsonl: no question has 'gold_docs'", *line)
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_compared_is_one_line(
    refused: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    good = row("q", f1=1.0)
    wrong = {"score": {"scores": {"f1": "1"}}, "answer": {"generated_answer": 5}, "gold": {"gold_answer": 5}}
    files = {"old": {"question": "q"}, "good": good, "other": row("r", f1=1.0)}
    for name, value in (files | {name: good | values for name, values in wrong.items()}).items():
        Path(name).write_text(json.dumps(value))
    Path("empty").touch()
    for line, message in {
        "one": "name two runs, as in compare_runs A B; found 1",
        "absent absent": "absent: no such file",
        "old old": "old:1: not a question with 'scores'; evaluate the run again",
        "score good": "score:1: not a question with 'scores'",
        "answer good": "answer:1: not a question with 'scores'",
        "gold good": "gold:1: field 'gold_answer' must be a string",
        "empty empty": "empty: holds no predictions",
        "good other": "the runs answer different questions, 1 only in A",
        "good good --metric gen/f2": "--metric gen/f2: not in both runs; choose one of f1",
    }.items():
        refused(message, "compare_runs", *line.split())
