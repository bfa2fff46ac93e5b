"""The page that people look at: what stands on it, and that it is whole."""

import json
import math
import re
import xml.etree.ElementTree as ElementTree
from collections import Counter
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from trainers import parsed

from rqa.data import Document, Example, Turn
from rqa.evaluation.report import line_chart, write_report
from rqa.evaluation.results import write_results
from rqa.evaluation.retrieval import retrieval_rows


class Page(HTMLParser):
    """The text and elements of a run's page; fails on a tag that is closed wrongly."""

    def __init__(self, run: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.source = (run / "report.html").read_text(encoding="utf-8")
        self.feed(self.source)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "br", "input", "link", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("style", "script"):
            self.text += data

    def with_class(self, name: str) -> int:
        return sum(name in (attributes.get("class") or "").split() for _, attributes in self.elements)


@pytest.fixture
def rows(documents: list[Document]) -> list[dict[str, Any]]:
    """Gold found in the second place, and gold missed."""
    examples = [
        Example("What <b>does</b> Arlen & Co trade in?", (documents[0],), "Copper.", (Turn("user", "Hello there"),)),
        Example("When?", (documents[9],), "Later."),
    ]
    rows = retrieval_rows([[documents[1], documents[0]], [documents[2], documents[3]]], examples, [1, 4])
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
    (tmp_path / "checkpoint-10").mkdir()
    return tmp_path


def test_a_page_shows_scores_with_intervals_curves_arguments_machine_and_questions(
    run: Path, rows: list[dict[str, Any]]
) -> None:
    scores = {"test_loss": 1.25, "test_retr/recall@4": 0.5, "test_gen/tokens_per_second": 654321.0}
    flags = parsed("train_sft", ["--model_name_or_path=a/model", "--judge_api_key=sk-1"])
    write_results(run, scores, rows, flags)
    page = Page(run)
    details = json.loads((run / "score_details.json").read_text())["scores"]
    rates = {name: details[f"test_{name}"] for name in ("retr/recall@4", "gen/f1")}
    intervals = [f"{rate['low']:.3f} to {rate['high']:.3f}" for rate in rates.values()]
    for text in (*rates, *intervals, "a/model", "--learning_rate", "tokens_per_second", "654,321", "1.25", "torch",
                 "Kl", "Hello there", "With 2 questions it is up to"):  # fmt: skip
        assert text in page.text, text
    assert "answered in batches" not in page.text
    assert "sk-1" not in page.source + (run / "all_args.json").read_text()
    assert page.with_class("tiles") == 1
    assert sum(tag == "svg" for tag, _ in page.elements) == 4  # loss, recall, learning rate, the objective's own kl
    drawn = [str(attributes["id"]) for _, attributes in page.elements if "id" in attributes]
    assert len(drawn) == len(set(drawn))
    marks = Counter(mark[1] for name in drawn if (mark := re.search(r"-(best|saved|refreshed)-\d+$", name)))
    assert marks == {"best": 4, "saved": 4, "refreshed": 8}


def test_questions_show_gold_and_what_a_model_says_is_text_and_never_markup_or_network(
    run: Path, rows: list[dict[str, Any]]
) -> None:
    write_results(run, {"test_gen/questions_per_batch": 8.0}, rows)
    page = Page(run)
    sides = [attributes["data-side"] for _, attributes in page.elements if "data-side" in attributes]
    assert sides == ["right", "wrong"]
    assert (page.with_class("passage"), page.with_class("gold"), page.text.count("missed")) == (5, 2, 1)
    for text in ("(none)", "Questions were answered in batches", "<script>alert(1)</script>", rows[0]["question"]):
        assert text in page.text
    assert sum(tag == "script" for tag, _ in page.elements) == 1
    # It needs no network and follows its reader's scheme.
    assert not re.search(r"""(src|href)\s*=\s*"?[^"#]|@import|url\([^#]|fetch\(""", page.source)
    assert "prefers-color-scheme: dark" in page.source
    assert 'name="viewport"' in page.source


def test_a_run_without_a_test_file_has_its_curves_and_an_evaluation_has_none(
    run: Path, rows: list[dict[str, Any]]
) -> None:
    write_report(run)
    write_results(run / "new", {}, rows * 150)
    trained, evaluated = Page(run), Page(run / "new")
    assert ["Training" in trained.text, "Scores" in trained.text, "Training" in evaluated.text] == [True, False, False]
    assert (trained.with_class("example"), evaluated.with_class("example")) == (0, 200)
    assert "The first 200 of 300." in evaluated.text  # a long test file is cut and says so


def path_of(svg: str, name: str) -> list[tuple[float, float]]:
    """The points of a line or mark, from the path that Matplotlib drew."""
    elements = ElementTree.fromstring(svg).iter()
    (group,) = (element for element in elements if re.search(rf"-{name}(-\d+)?$", element.get("id", "")))
    path = next(element for element in group.iter() if element.tag.endswith("path"))
    numbers = map(float, re.findall(r"[-\d.]+", path.get("d")))
    return list(zip(numbers, numbers, strict=True))


def test_finite_points_and_marks_stand_where_their_values_say_and_without_one_there_is_no_chart() -> None:
    lines = {"loss": [(0, 0.0), (3, math.nan), (5, 2.5), (10, 10.0)], "a & b/c": [(0, 5.0), (10, 5.0)]}
    svg = line_chart(lines, {"best": [5], "saved": [10], "refreshed": [0]})
    (left, bottom), middle, (right, top) = path_of(svg, "loss")
    assert left < right
    half = pytest.approx((top + bottom) / 2)
    assert middle == pytest.approx(((left + right) / 2, bottom - (bottom - top) / 4))
    assert path_of(svg, "a & b/c") == [(left, half), (right, half)]
    (best_x, best_low), (_, best_high) = path_of(svg, "best")
    (saved_x, _), (_, saved_high) = path_of(svg, "saved")
    (refreshed_x, refreshed_low), _ = path_of(svg, "refreshed")
    assert [best_x, saved_x, refreshed_x] == pytest.approx([(left + right) / 2, right, left])
    assert best_high < top < bottom < best_low
    assert saved_high > best_low - 0.1 * (best_low - best_high)
    assert refreshed_low < best_high + 0.1 * (best_low - best_high)
    assert line_chart({"loss": [(1, math.inf)]}) == line_chart({}) == ""


def test_the_page_colours_a_chart() -> None:
    svg = line_chart({"loss": [(0, 1.0), (1, 2.0)], "other": [(0, 2.0)]}, {"best": [0], "saved": [1], "refreshed": [1]})
    colours = set(re.findall(r"(?:fill|stroke): ([^;\"]+)", svg)) - {"none"}
    assert colours == {f"var(--{name})" for name in ("line-0", "line-1", "line-3", "muted", "rule", "good")}
    styles = files("rqa.evaluation").joinpath("report.html").read_text(encoding="utf-8")
    assert all(styles.count(f"{colour[4:-1]}: #") == 2 for colour in colours)  # light and dark
