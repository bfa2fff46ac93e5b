"""Intervals, on data whose truth is known and against plain resampling; two runs side by side; the files of a run."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sacrebleu
from scipy import stats

from rqa.data import Document, Example, Turn
from rqa.evaluation.comparison import Difference, changed_sides, compare, headline, pair
from rqa.evaluation.metrics import bleu, bleu_samples, bleu_statistics, corpus_bleu
from rqa.evaluation.results import (
    difference_intervals,
    interval,
    markdown_table,
    mean_intervals,
    with_intervals,
    write_results,
)
from rqa.evaluation.retrieval import retrieval_rows
from rqa.runtime.errors import UserError


@pytest.mark.parametrize("rate", [0.2, 0.5, 0.85])
def test_about_95_of_100_intervals_hold_the_true_rate(rate: float) -> None:
    samples = (np.random.default_rng(1).random((75, 600)) < rate).astype(float)  # 600 evaluations of 75 questions
    low, high = mean_intervals(samples).T
    assert 0.91 < np.mean((low <= rate) & (rate <= high)) < 0.985
    assert np.mean(high - low) == pytest.approx(2 * 1.96 * np.sqrt(rate * (1 - rate) / 75), rel=0.06)


def test_about_95_of_100_paired_intervals_hold_the_true_difference() -> None:
    chance = np.random.default_rng(2)
    first = (chance.random((80, 600)) < 0.5).astype(float)
    second = np.where(chance.random((80, 600)) < 0.7, first, chance.random((80, 600)) < 0.9)  # mostly the same answers
    low, high = difference_intervals(second - first).T
    truth = 0.3 * (0.9 - 0.5)
    assert 0.91 < np.mean((low <= truth) & (truth <= high)) < 0.985


def test_a_pair_is_compared_question_by_question() -> None:
    chance = np.random.default_rng(5)
    hard = chance.random(60)  # some questions are harder than others, for both systems
    first, second = hard + 0.01 * chance.standard_normal(60), hard + 0.02 + 0.01 * chance.standard_normal(60)
    ((low, high),) = difference_intervals((second - first)[:, None])
    assert 0.01 < low < 0.02 < high < 0.03
    apart = mean_intervals(np.stack([first, second], axis=1))
    assert apart[0, 1] > apart[1, 0]  # unpaired, the same systems overlap


def test_intervals_are_those_of_scipys_bootstrap_at_every_call_and_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(3).random((40, 2)) ** 2
    ours = mean_intervals(values)
    for column, ends in zip(values.T, ours, strict=True):
        theirs = stats.bootstrap((column,), np.mean, n_resamples=10_000, method="percentile", rng=4)
        assert ends == pytest.approx(list(theirs.confidence_interval), abs=0.006)
    np.testing.assert_array_equal(mean_intervals(values), ours)
    monkeypatch.setattr("rqa.evaluation.results.CHUNK", 1000)  # a large file is resampled in bounded memory
    np.testing.assert_allclose(mean_intervals(values), ours, atol=0.01)


def test_intervals_lie_between_0_and_1_and_all_right_or_all_wrong_is_not_certainty() -> None:
    few = mean_intervals(np.random.default_rng(6).integers(0, 2, (9, 5)).astype(float))
    assert ((few >= 0) & (few <= 1)).all()
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
    assert bleu(statistics.sum(axis=0)) == corpus_bleu(answers, references) == pytest.approx(theirs.score / 100)
    assert samples.mean() == pytest.approx(theirs._mean / 100, abs=0.01)
    low, high = interval(samples)
    assert (high - low) / 2 == pytest.approx(theirs._ci / 100, rel=0.15)


def test_a_difference_tells_when_it_excludes_0_and_enough_questions_changed() -> None:
    for low, high, changed in [(0.01, 0.2, 6), (-0.2, -0.01, 40)]:
        assert Difference("f1", 0.5, 0.6, low, high, 50, changed).telling
    for low, high, changed in [(-0.01, 0.2, 40), (0.01, 0.2, 5), (0, 0, 0)]:
        assert not Difference("f1", 0.5, 0.6, low, high, 50, changed).telling


def row(question: str, **scores: float) -> dict[str, Any]:
    return Example(question, (Document(f"About {question}"),), "An answer.").to_json() | {"scores": scores}


def test_rows_are_paired_by_question_gold_history_and_answer_whatever_their_order() -> None:
    kinds = [
        Example("q", (Document("a", {"source": "1"}),)),
        Example("q", (Document("a", {"source": "2"}),)),
        Example("q", (Document("a", {"source": "1"}),), chat_history=(Turn("user", "before"),)),
        Example("q", (Document("a", {"source": "1"}),), "answer"),
        *(Example(f"q{i}", (Document(f"About {i}"),), "answer") for i in range(10)),
    ]
    first = [example.to_json() | {"scores": {"f1": float(i)}} for i, example in enumerate(kinds)]
    paired = pair(first, first[::-1])
    assert [a for a, _ in paired] == first
    assert all(a["scores"] == b["scores"] for a, b in paired)


def test_a_question_asked_twice_is_paired_twice_and_others_are_refused_by_name() -> None:
    twice = [row("q", f1=0), row("q", f1=1)]
    assert len(pair(twice, twice[::-1])) == 2
    with pytest.raises(UserError, match="1 only in A, such as 'q'"):
        pair(twice, twice[:1])
    with pytest.raises(UserError, match="1 only in B, such as 'r'"):
        pair([row("q", f1=0)], [row("q", f1=0), row("r", f1=0)])


def test_differences_are_those_of_the_means_with_scipys_interval() -> None:
    a, b = np.random.default_rng(0).random((2, 50))
    (found,) = compare([(row("q", f1=x), row("q", f1=y)) for x, y in zip(a, b, strict=True)])
    assert (found.first, found.second, found.questions, found.changed) == pytest.approx((a.mean(), b.mean(), 50, 50))
    theirs = stats.bootstrap((b - a,), np.mean, n_resamples=10_000, method="percentile", rng=1).confidence_interval
    assert (found.low, found.high) == pytest.approx(tuple(theirs), abs=0.01)


@pytest.mark.parametrize("lift", [0.0, 0.3])
def test_a_real_difference_is_told_from_chance_and_noise_is_not(lift: float) -> None:
    chance = np.random.default_rng(1)
    both = zip(chance.random(75), chance.standard_normal(75), strict=True)
    (found,) = compare([(row("q", f1=x), row("q", f1=x + lift + 0.2 * y)) for x, y in both])
    assert found.telling is (lift > 0)
    assert ("this is more than chance" in found.sentence()) is (lift > 0)
    assert ("this cannot be told from chance" in found.sentence()) is (lift == 0)


def test_the_same_run_twice_differs_in_nothing() -> None:
    rows = [row(str(i), f1=i / 7) | {"generated_answer": f"answer {i}"} for i in range(7)]
    differences = compare(pair(rows, rows))
    assert [found.name for found in differences] == ["f1", "gen/bleu"]
    for found in differences:
        assert (found.low, found.high, found.changed, found.telling) == (0, 0, 0, False)
        assert "is the same as A's" in found.sentence()


def test_bleu_is_compared_over_the_whole_corpus() -> None:
    first, second = (
        [row(str(i), f1=0.0) | {"generated_answer": text} for i in range(20)]
        for text in ("An apple pie today.", "An answer.")
    )
    found = {difference.name: difference for difference in compare(pair(first, second))}["gen/bleu"]
    assert found.first == corpus_bleu(["An apple pie today."] * 20, ["An answer."] * 20)
    assert found.second == corpus_bleu(["An answer."] * 20, ["An answer."] * 20)
    assert found.telling


def test_questions_that_changed_side_are_listed() -> None:
    scores = [(0, 1), (0.9, 0.5), (0.6, 0.4), (0, 0)]
    pairs = [(row(str(i), f1=a), row(str(i), f1=b)) for i, (a, b) in enumerate(scores)]
    gained, lost = changed_sides([*pairs, (row("4"), row("4", f1=1))], "f1")
    assert ([found["question"] for found in gained], [found["question"] for found in lost]) == (["0"], ["2"])


def test_the_headline_is_the_metric_named_or_the_usual_one() -> None:
    scores = {"retr/recall@1": 0.0, "retr/recall@4": 0.0, "gen/rougeL": 0.5}
    differences = compare([(row("q", **scores), row("q", **scores))])
    assert headline(differences, None).name == "retr/recall@4"
    assert headline(differences, "gen/rougeL").name == "gen/rougeL"
    with pytest.raises(UserError, match="--metric f1: not in both runs; choose one of retr/recall@1"):
        headline(differences, "f1")


def test_each_rate_has_its_own_number_of_questions() -> None:
    rows = [row(str(i), **{"gen/f1": i % 2}) for i in range(40)]
    for number in range(10):
        rows[number]["scores"]["retr/recall@1"] = 1.0
    details = with_intervals(rows)
    assert (details["test_gen/f1"]["value"], details["test_gen/f1"]["n"]) == (0.5, 40)
    assert (details["test_retr/recall@1"]["value"], details["test_retr/recall@1"]["n"]) == (1.0, 10)
    assert details["test_retr/recall@1"]["low"] < 0.7
    table = markdown_table({"test_gen/f1": 0.5, "test_gen/f1/avg_f1_ans": 0.5, "test_loss": 1.25}, details)
    assert "| test_gen/f1 | 0.500 | 0.350 to 0.650 | 40 |" in table
    assert "| test_loss | 1.25 | | |" in table
    assert "avg_f1_ans" not in table


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


def test_retrievers_are_evaluated_and_compared(
    data: Path, encoder_path: str, tmp_path: Path, run_line: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    files = ["--document_path", data / "documents.jsonl", "--eval_data_path", data / "train_w_qa.jsonl"]
    for retriever in ("bm25", "dense", "hybrid"):
        which = ["--embedding_model", "bm25" if retriever == "bm25" else encoder_path, "--retriever", retriever]
        output = tmp_path / retriever
        assert run_line("evaluate_retriever", *files, *which, "--output_dir", output, "--recall_at", 1, 3) == 0
        scores = json.loads((output / "score.json").read_text())
        assert {"test_retr/recall@1", "test_retr/recall@3", "test_retr/document_recall/recall3", "test_retr/mrr@10",
                "test_retr/ndcg@10", "test_retr/map@10", "test_retr/latency_p50_ms", "test_retr/latency_p99_ms",
                "test_retr/questions_per_second"} <= set(scores)  # fmt: skip
        assert json.loads((output / "all_args.json").read_text())["recall_at"] == [1, 3]
        assert "--fusion_weight" in (output / "report.html").read_text()
        assert len((output / "qrels.trec").read_text().splitlines()) == 16
        assert retriever != "bm25" or scores["test_retr/recall@3"] > 0.9
    capsys.readouterr()
    assert run_line("compare_runs", tmp_path / "dense", tmp_path / "bm25", "--show", 1) == 0
    said = capsys.readouterr().out
    assert said.rstrip().endswith("this is more than chance.")
    assert "gained by B in retr/recall@1:" in said
    assert 1 <= said.count("\n- ") <= 2
    assert run_line("compare_runs", tmp_path / "dense", tmp_path / "dense", "--metric", "retr/mrr@10") == 0
    assert "retr/mrr@10 is the same as A's" in capsys.readouterr().out


def test_a_retriever_is_not_scored_without_gold(
    data: Path, tmp_path: Path, run_line: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "questions.jsonl").write_text('{"question": "Why?"}\n')
    files = ["--document_path", data / "documents.jsonl", "--eval_data_path", tmp_path / "questions.jsonl"]
    out = tmp_path / "out"
    assert run_line("evaluate_retriever", "--embedding_model", "bm25", *files, "--output_dir", out) == 2
    assert "questions.jsonl: no question has 'gold_docs'" in capsys.readouterr().err
    assert not out.exists()


def test_what_cannot_be_compared_is_one_line(
    run_line: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, value in (("old", {"question": "q"}), ("good", row("q", f1=1.0)), ("other", row("r", f1=1.0))):
        Path(name).write_text(json.dumps(value))
    Path("empty").touch()
    for line, message in {
        "one": "name two runs, as in compare_runs A B; found 1",
        "absent absent": "absent: no such file",
        "old old": "old:1: has no 'question' with 'scores'; evaluate the run again",
        "empty empty": "empty: holds no predictions",
        "good other": "the runs answer different questions: 1 only in A",
        "good good --metric gen/f2": "--metric gen/f2: not in both runs; choose one of f1",
    }.items():
        assert run_line("compare_runs", *line.split()) == 2
        assert message in capsys.readouterr().err
