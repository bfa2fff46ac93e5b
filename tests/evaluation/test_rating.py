"""Two runs side by side: blind, each rater's progress kept, and a file that compare_runs reads."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rqa.data import Document, Example, Turn
from rqa.endpoint.requests import BadRequest
from rqa.evaluation.ratings import Comparison, read_ratings
from rqa.runtime.errors import UserError


def row(question: str, answer: str, **others: Any) -> dict[str, Any]:
    passages = [Document("It holds it.", {"source": "s", "title": "Holder"}), Document("Bare.")]
    asked = Example(question, gold_answer="Gold.", chat_history=(Turn("user", "Before?"),)).to_json()
    found = {"retrieved_docs": [passage.to_json() for passage in passages]}
    return asked | found | {"scores": {"gen/f1": 1.0}, "generated_answer": answer} | others


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str, str]:
    """Two prediction files of 40 questions, whose answers say whose they are, and where ratings go."""
    monkeypatch.chdir(tmp_path)
    for name in "ab":
        rows = [row(f"q{number}", f"{name} says {number}") for number in range(40)]
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return "a.jsonl", "b.jsonl", "ratings.jsonl"


def rate(comparison: Comparison, rater: str, choose: Callable[[dict[str, Any]], str], times: int = 100) -> int:
    """Rate what is next, up to so many times. -> how often b was on the left"""
    item, lefts = comparison.next(rater)["item"], 0
    while item and times:
        lefts, times = lefts + item["left"]["answer"].startswith("b"), times - 1
        item = comparison.rate({"rater": rater, "number": item["number"], "choice": choose(item)})["item"]
    return lefts


def prefers_b(item: dict[str, Any]) -> str:
    return "left" if item["left"]["answer"].startswith("b") else "right"


def test_the_sides_are_random_for_each_rater_and_a_choice_is_that_of_the_system(runs: tuple[str, str, str]) -> None:
    comparison = Comparison(*runs)
    assert all(8 < rate(comparison, rater, prefers_b) < 32 for rater in ("Ann", "Bo"))  # of 40, at random
    chosen = [choice for _, raters in read_ratings(runs[2]).values() for choice in raters.values()]
    assert chosen == ["B"] * 80


def test_an_item_shows_both_answers_and_not_whose_they_are(runs: tuple[str, str, str]) -> None:
    item = Comparison(*runs).next("Ann")["item"]
    assert set(item) == {"number", "question", "chat_history", "gold_answer", "left", "right"}
    assert (item["gold_answer"], item["chat_history"]) == ("Gold.", [{"speaker": "user", "message": "Before?"}])
    passages = [{"title": "Holder", "text": "It holds it."}, {"title": "", "text": "Bare."}]
    assert item["left"] == {"answer": f"{item['left']['answer'][0]} says {item['question'][1:]}", "passages": passages}
    assert "jsonl" not in json.dumps(item)


def test_a_new_server_goes_on_where_each_rater_was(runs: tuple[str, str, str]) -> None:
    first = Comparison(*runs)
    begun = first.next("Ann")["item"]["question"]
    rate(first, "Ann", prefers_b, times=3)
    then, again = first.next("Ann"), Comparison(*runs)
    assert again.next(" Ann ") == then
    assert (then["done"], then["total"]) == (3, 40)
    assert (again.next("Bo")["done"], again.next("Bo")["item"]["question"]) == (0, begun)
    rate(again, "Ann", lambda _: "tie")
    assert Comparison(*runs).next("Ann") == {"done": 40, "total": 40, "item": None}


def test_a_second_rating_replaces_the_first(runs: tuple[str, str, str]) -> None:
    comparison = Comparison(*runs)
    number = comparison.next("Ann")["item"]["number"]
    done = [comparison.rate({"rater": "Ann", "number": number, "choice": each})["done"] for each in ("tie", "both_bad")]
    ((about, raters),) = read_ratings(runs[2]).values()
    assert (done, raters, about["A"], about["B"]) == ([1, 1], {"Ann": "both_bad"}, *runs[:2])


@pytest.mark.parametrize(
    ("wrong", "param"),
    [({"rater": value}, "rater") for value in (None, " ", 5)]
    + [({"number": value}, "number") for value in (None, "1", -1, 1.5, [], True)]
    + [({"choice": value}, "choice") for value in (None, "A", ["left"], {})],
)
def test_a_rating_that_says_something_else_is_refused_and_not_kept(
    runs: tuple[str, str, str], wrong: dict[str, Any], param: str
) -> None:
    comparison = Comparison(*runs)
    good = {"rater": "Ann", "number": comparison.next("Ann")["item"]["number"], "choice": "left"}
    with pytest.raises(BadRequest) as caught:
        comparison.rate(good | wrong)
    assert (caught.value.param, Path(runs[2]).read_text()) == (param, "")


def test_ratings_of_other_answers_or_systems_are_not_mixed(runs: tuple[str, str, str]) -> None:
    rate(Comparison(*runs), "Ann", prefers_b, times=1)
    with pytest.raises(UserError, match=r"--ratings_path ratings.jsonl: holds ratings of other systems or answers"):
        Comparison(runs[1], runs[0], runs[2])
    Path(runs[0]).write_text(Path(runs[0]).read_text().replace("a says", "a says again"))
    with pytest.raises(UserError, match="of other systems or answers; name another file"):
        Comparison(*runs)


def test_what_cannot_be_shown_or_written_is_found_at_the_start(runs: tuple[str, str, str]) -> None:
    with pytest.raises(OSError, match="absent"):
        Comparison(*runs[:2], "absent/ratings.jsonl")
    retrieved = row("q", "")
    del retrieved["generated_answer"]
    Path("r.jsonl").write_text(json.dumps(retrieved))
    with pytest.raises(UserError, match=r"r.jsonl: 'q' has no 'generated_answer'; name runs of bin/evaluate_rqa"):
        Comparison("r.jsonl", "r.jsonl", runs[2])


def test_compare_runs_reads_what_raters_said(
    runs: tuple[str, str, str], run_line: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    comparison = Comparison(*runs)
    rate(comparison, "Ann", prefers_b)
    rate(comparison, "Bo", prefers_b, times=5)
    assert run_line("compare_runs", "--ratings", runs[2], "--metric", "gen/f1") == 0
    told = capsys.readouterr()
    assert "A: a.jsonl\nB: b.jsonl\nquestions rated: 40 by Ann, 5 by Bo\n" in told.out
    assert "B's share of wins is 1.000 higher than A's" in told.out
    assert told.out.endswith("this is more than chance.\n")
    assert "--metric has no effect here: people's choices decide" in told.err
