"""People's ratings of two systems: asked for blind, wins and their interval, agreement against published figures."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from rqa.data import Document, Example, Turn
from rqa.endpoint.requests import BadRequest
from rqa.evaluation.ratings import Comparison, agreement, preference, ratings_table, read_ratings
from rqa.runtime.errors import UserError
from rqa.runtime.files import write_jsonl

UNITS = st.lists(st.lists(st.sampled_from("abcd"), max_size=5), min_size=1, max_size=12)


def counted(units: Sequence[Sequence[str]]) -> np.ndarray:
    """How often each label was given to a unit. -> [N, C]"""
    labels = sorted({label for unit in units for label in unit})
    return np.array([[list(unit).count(label) for label in labels] for unit in units]).reshape(len(units), -1)


@pytest.mark.parametrize(
    ("observers", "alpha"),  # Krippendorff 2011, sections A, B and C; a space is a unit that an observer missed
    [
        (("0100000010", "1110010000"), 0.095),
        (("aabbdcccedda", "babbbccceddd"), 0.692),
        (("123321412   ", "1233224125 3", " 3332342251 ", "12332441251 "), 0.743),
    ],
)
def test_alpha_is_that_of_krippendorffs_examples(observers: tuple[str, ...], alpha: float) -> None:
    units = ["".join(unit).replace(" ", "") for unit in zip(*observers, strict=True)]
    assert agreement(counted(units))[1] == pytest.approx(alpha, abs=0.0005)


@given(UNITS)
def test_agreement_is_that_of_all_pairs_of_raters_counted_one_by_one(units: list[list[str]]) -> None:
    units = [unit for unit in units if len(unit) > 1]
    pairs = [(*both, 1 / (len(unit) - 1)) for unit in units for both in permutations(unit, 2)]
    labels = Counter(label for unit in units for label in unit)
    total = sum(labels.values())
    if not pairs:
        assert np.isnan(agreement(counted([["a"], [*units]]))).all()
        return
    alike = sum(weight for one, other, weight in pairs if one == other) / total
    apart = sum(labels[one] * labels[other] for one, other in permutations(labels, 2)) / (total * (total - 1))
    found = agreement(counted([*units, ["a"], []]))  # those of fewer than two raters do not count
    assert found == pytest.approx((alike, 1 - (1 - alike) / apart if apart else np.nan), nan_ok=True)


def test_the_wins_and_their_interval_are_those_of_scipys_bootstrap_over_questions() -> None:
    counts = np.random.default_rng(0).multinomial(3, (0.2, 0.5, 0.2, 0.1), 60)
    found, gaps = preference(counts), (counts[:, 1] - counts[:, 0]) / 3
    theirs = stats.bootstrap((gaps,), np.mean, n_resamples=10_000, method="percentile", rng=1).confidence_interval
    assert (found.low, found.high) == pytest.approx(tuple(theirs), abs=0.01)
    assert found.second - found.first == pytest.approx(gaps.mean())
    other = preference(counts[:, [1, 0, 2, 3]])
    assert (other.first, other.low, other.high) == pytest.approx((found.second, -found.high, -found.low))


def test_a_question_of_many_raters_counts_as_much_as_that_of_one() -> None:
    found = preference(np.array([[0, 9, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]]))
    assert (found.first, found.second, found.changed) == pytest.approx((1.25 / 3, 1.25 / 3, 2))


@pytest.mark.parametrize("wins", [5, 6])
def test_wins_of_one_system_alone_are_no_certainty_and_tell_where_a_sign_test_does(wins: int) -> None:
    found = preference(np.array([[0, 1, 0, 0]] * wins))
    assert found.significant == (stats.binomtest(wins, wins).pvalue < 0.05)
    assert found.low == pytest.approx(2 * stats.binomtest(wins, wins).proportion_ci(method="exact").low - 1)


def test_without_a_winner_or_a_second_rater_the_table_claims_nothing() -> None:
    table = ratings_table(np.array([[0, 0, 1, 0], [0, 0, 0, 1]]))
    assert "of all wins" not in table
    assert "| B wins - A wins | +0.000 | -0.842 to +0.842 |" in table
    assert "| Krippendorff's alpha | - | | 0 | 0 |" in table


def line(rater: str, question: str, choice: Any, **others: Any) -> dict[str, Any]:
    about = {"rater": rater, "question": question, "chat_history": [], "gold_answer": None, "choice": choice}
    return about | {"A": "out/a", "B": "out/b", "time": "2026-11-27T12:00:00+00:00"} | others


def test_a_file_of_ratings_is_told_by_wins_agreement_and_questions(
    tmp_path: Path, run_line: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [line("Ann", f"q{number}", "B" if number < 8 else "tie") for number in range(10)]
    rows += [line("Bo", f"q{number}", "B") for number in (0, 9)] + [line("Bo", "q1", "A"), line("Ann", "q9", "A")]
    rows += [line("Bo", "q1", "both_bad", time="later")]  # replaces the earlier one, as does Ann's
    write_jsonl(tmp_path / "ratings.jsonl", rows)
    assert run_line("compare_runs", "--ratings", tmp_path / "ratings.jsonl", "--show", 1, "--metric", "x") == 0
    said, warned = capsys.readouterr()
    assert "--metric has no effect here: people's ratings decide" in warned
    assert "A: out/a\nB: out/b\nquestions rated: 10 by Ann, 3 by Bo\n" in said
    for row in ("A wins | 0.050 |", "both bad | 0.050 |", "B wins, of all wins | 0.944 |", "B wins - A wins | +0.750 |",
                "two raters agree | 0.333 | | 6 | 3 |", "Krippendorff's alpha | -0.111 | | 6 | 3 |"):  # fmt: skip
        assert f"| {row}" in said
    assert "8 won by B:\n- q0\n\n0 lost by B\n" in said
    assert said.endswith("10 questions, 8 of them have a winner): this is significant.\n")


def test_ratings_that_cannot_be_read_are_one_line(
    tmp_path: Path, refused: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    good = line("Ann", "q", "A")
    for message, rows in {
        "r.jsonl: holds no ratings": [],
        "r.jsonl:1: field 'choice' must be one of A, B, tie, both_bad": [good | {"choice": ["A"]}],
        "r.jsonl:1: field 'rater' must be a non-empty string": [good | {"rater": " "}],
        "r.jsonl:1: field 'B' must be a non-empty string": [good | {"B": None}],
        "r.jsonl:1: field 'chat_history' must be a list": [good | {"chat_history": "hi"}],
        "r.jsonl:2: rates A: out/a, B: out/c, but earlier lines rate A: out/a, B: out/b": [good, good | {"B": "out/c"}],
    }.items():
        write_jsonl("r.jsonl", rows)
        refused(message, "compare_runs", "--ratings", "r.jsonl")
    refused("--ratings r.jsonl: names both runs itself; leave out x", "compare_runs", "x", "--ratings", "r.jsonl")


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
        write_jsonl(f"{name}.jsonl", [row(f"q{number}", f"{name} says {number}") for number in range(40)])
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
    [({"rater": value}, "rater") for value in (None, " ", 5, "A\x1b[2J")]
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
    with pytest.raises(UserError, match=r"--ratings_path ratings.jsonl: has ratings of other systems or answers"):
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
