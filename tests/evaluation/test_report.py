"""The page that people look at: what stands on it, and that it is whole."""

import itertools
import json
import math
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from rqa.data.documents import Document
from rqa.data.examples import Example, Turn
from rqa.evaluation.charts import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, line_chart, ticks
from rqa.evaluation.report import write_report
from rqa.evaluation.results import write_results
from rqa.evaluation.retrieval import retrieval_rows

VOID = {"meta", "br", "input", "link", "img"}


class Page(HTMLParser):
    """The text and elements of a page; fails on a tag that is closed wrongly."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("style", "script"):
            self.text += data

    def with_class(self, name: str) -> int:
        return sum(name in (attributes.get("class") or "").split() for _, attributes in self.elements)


def page_of(directory: Path) -> Page:
    return Page((directory / "report.html").read_text(encoding="utf-8"))


@pytest.fixture
def rows(documents: list[Document]) -> list[dict[str, Any]]:
    """Gold found in the second place, and gold missed."""
    examples = [
        Example("What <b>does</b> Arlen & Co trade in?", (documents[0],), "Copper.", (Turn("user", "Hello there"),)),
        Example("When?", (documents[9],), "Later."),
    ]
    found = [[documents[1], documents[0]], [documents[2], documents[3]]]
    rows = retrieval_rows(found, examples, [1, 4])
    for row, answer, f1 in zip(rows, ("<script>alert(1)</script>", ""), (1.0, 0.0), strict=True):
        row["generated_answer"] = answer
        row["scores"] |= {"gen/f1": f1}
    return rows


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """What a trainer leaves before it is tested."""
    history = [{"step": step, "loss": 2 / step, "learning_rate": 1e-4, "kl": 0.5 / step} for step in range(1, 11)]
    history += [{"step": step, "index_refreshed": 1.0} for step in (4, 8)]
    history += [{"step": step, "eval_loss": 1.0, "eval_retr/recall@4": 0.5} for step in (5, 10)]
    state = {"log_history": history, "best_model_checkpoint": "checkpoint-5"}
    (tmp_path / "trainer_state.json").write_text(json.dumps(state))
    (tmp_path / "all_args.json").write_text(
        json.dumps({"model_name_or_path": "a/model", "learning_rate": 1e-4, "endpoint_api_key": "sk-1"})
    )
    (tmp_path / "checkpoint-10").mkdir()
    return tmp_path


def test_a_page_shows_scores_with_intervals_curves_arguments_machine_and_questions(
    run: Path, rows: list[dict[str, Any]]
) -> None:
    write_results(run, {"test_loss": 1.25, "test_retr/recall@4": 0.5, "test_gen/tokens_per_second": 654321.0}, rows)
    page = page_of(run)
    details = json.loads((run / "score_details.json").read_text())["scores"]
    for name in ("retr/recall@4", "gen/f1"):
        row = details[f"test_{name}"]
        assert name in page.text
        assert f"{row['low']:.3f} to {row['high']:.3f}" in page.text
    for text in ("a/model", "--learning_rate", "tokens_per_second", "654,321", "1.25", "torch", "Kl", "Hello there"):
        assert text in page.text, text
    assert "sk-1" not in page.text
    assert page.with_class("tiles") == 1
    assert sum(tag == "svg" for tag, _ in page.elements) == 4  # loss, recall, learning rate, the objective's own kl
    assert page.with_class("best") == page.with_class("saved") == 4
    assert page.with_class("refreshed") == 8
    assert "With 2 questions it is up to" in page.text


def test_gold_passages_are_marked_and_missed_ones_named(run: Path, rows: list[dict[str, Any]]) -> None:
    write_results(run, {}, rows)
    page = page_of(run)
    sides = [attributes["data-side"] for _, attributes in page.elements if "data-side" in attributes]
    assert sides == ["right", "wrong"]
    assert (page.with_class("passage"), page.with_class("gold")) == (5, 2)
    assert page.text.count("missed") == 1
    assert "(none)" in page.text


def test_what_a_model_says_is_text_and_never_markup(run: Path, rows: list[dict[str, Any]]) -> None:
    write_results(run, {}, rows)
    page = page_of(run)
    assert "<script>alert(1)</script>" in page.text
    assert "What <b>does</b> Arlen & Co trade in?" in page.text
    assert sum(tag == "script" for tag, _ in page.elements) == 1


def test_a_page_needs_no_network_and_follows_the_readers_scheme(run: Path, rows: list[dict[str, Any]]) -> None:
    write_results(run, {}, rows)
    text = (run / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"""(src|href)\s*=|@import|url\(|fetch\(""", text)
    assert "prefers-color-scheme: dark" in text
    assert 'name="viewport"' in text


def test_a_run_without_a_test_file_has_its_curves(run: Path) -> None:
    write_report(run)
    page = page_of(run)
    assert "Training" in page.text
    assert "Scores" not in page.text
    assert page.with_class("example") == 0


def test_an_evaluation_has_no_curves(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    write_results(tmp_path / "new", {}, rows)
    page = page_of(tmp_path / "new")
    assert "Training" not in page.text
    assert page.with_class("example") == 2


def test_a_long_test_file_is_cut_and_says_so(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    write_results(tmp_path, {}, rows * 150)
    page = page_of(tmp_path)
    assert page.with_class("example") == 200
    assert "The first 200 of 300." in page.text


# ---------------------------------------------------------------- charts


def points(svg: str, number: int = 0) -> list[tuple[float, float]]:
    (line,) = (e for e in ElementTree.fromstring(svg).iter("polyline") if e.get("class") == f"line line-{number}")
    return [tuple(map(float, pair.split(","))) for pair in line.get("points").split()]


def test_points_stand_where_their_values_say() -> None:
    svg = line_chart(
        {"loss": [(0, 0.0), (5, 2.5), (10, 10.0)], "other": [(10, 5.0)]},
        {"best": [5], "saved": [10, 99], "refreshed": [0]},
    )
    left, right, top, bottom = LEFT, WIDTH - RIGHT, TOP, HEIGHT - BOTTOM
    assert points(svg) == [
        (left, bottom), ((left + right) / 2, pytest.approx(bottom - (bottom - top) / 4)), (right, top)
    ]  # fmt: skip
    assert points(svg, 1) == [(right, (top + bottom) / 2)]
    marks = [e for e in ElementTree.fromstring(svg).iter("line") if "mark" in e.get("class")]
    drawn = [(mark.get("class"), *(float(mark.get(name)) for name in ("x1", "y1", "y2"))) for mark in marks]
    assert drawn == [  # a mark beyond the plot is left out
        ("mark best", (left + right) / 2, top, bottom),
        ("mark saved", right, bottom - 6, bottom),
        ("mark refreshed", left, top, top + 6),
    ]


@pytest.mark.parametrize("values", [[3.0], [0.0, 0.0], [-2.0, 5.0], [1e-7, 3e-7], [1e6, 4e6], [0.1, math.nan, 0.3]])
def test_every_point_is_inside_the_plot(values: list[float]) -> None:
    drawn = points(line_chart({"a & b": list(enumerate(values))}))
    assert len(drawn) == sum(map(math.isfinite, values))
    assert all(LEFT <= x <= WIDTH - RIGHT and TOP <= y <= HEIGHT - BOTTOM for x, y in drawn)


def test_no_values_no_chart() -> None:
    assert line_chart({"loss": [(1, math.inf)]}) == line_chart({}) == ""


def test_a_long_line_is_thinned_and_keeps_its_ends() -> None:
    drawn = points(line_chart({"loss": [(step, float(step)) for step in range(10_001)]}))
    assert len(drawn) <= 401
    assert (drawn[0], drawn[-1]) == ((LEFT, HEIGHT - BOTTOM), (WIDTH - RIGHT, TOP))


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (0.013, 0.041), (-3, 17), (1e-6, 5e-5), (2.0, 2.0), (0, 0), (1, 144)]
)
def test_ticks_are_round_even_and_hold_the_values(low: float, high: float) -> None:
    found = ticks(low, high)
    assert found[0] <= low + 1e-12
    assert found[-1] >= high - 1e-12
    assert 2 <= len(found) <= 7
    step = found[1] - found[0]
    assert {round((after - before) / step, 6) for before, after in itertools.pairwise(found)} == {1.0}
    assert float(f"{step:.0e}") == pytest.approx(step)
