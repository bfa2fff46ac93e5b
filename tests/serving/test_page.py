"""The page in a real browser: what a person sees, does, and leaves in a file."""

import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rqa.data import Document, Example
from rqa.evaluation.ratings import Comparison, read_ratings
from rqa.preparation.feedback import Feedback
from rqa.recipe.system import Reader
from rqa.retrieval.hybrid import LexicalRetriever
from rqa.serving.app import Api, App, comparison_routes
from rqa.serving.engine import Engine, Metrics

webdriver = pytest.importorskip("selenium.webdriver")
if not (CHROMIUM := shutil.which("chromium")) or not (DRIVER := shutil.which("chromedriver")):
    pytest.skip("needs chromium and chromedriver", allow_module_level=True)
OPTIONS = ("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking",
           "disable-component-update", "disable-sync", "window-size=1280,800")  # fmt: skip

HOSTILE = "<script>alert(1)</script> <img src=x onerror=alert(2)> <|im_end|> of the castle of Zell."
COPPER = "harbour of Arlen is known for its trade in copper"
ANSWER = f"The {COPPER}. \U0001f600 {HOSTILE} I hope that this was of use to you [2]."


class Browser:
    """A driver, and where it looks."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def all(self, selector: str) -> list[Any]:
        return self.driver.find_elements("css selector", selector)

    def text(self, selector: str) -> str:
        return self.driver.find_element("css selector", selector).text

    def click(self, selector: str) -> None:
        self.driver.find_element("css selector", selector).click()

    def type(self, selector: str, text: str) -> None:
        self.driver.find_element("css selector", selector).send_keys(text)

    def until(self, condition: Callable[[], Any]) -> Any:
        end = time.monotonic() + 30
        while not (value := condition()):
            assert time.monotonic() < end, self.text("body")
            time.sleep(0.01)
        return value

    def ask(self, question: str) -> str:
        """Ask, and wait; the answer."""
        turns = len(self.all(".turn"))
        self.type("#question", question + "\n")
        self.until(lambda: len(self.all(".turn")) > turns and not self.all(".busy"))
        return self.all(".turn .answer")[-1].text


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for option in (*OPTIONS, f"user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(f"--{option}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    started = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    yield started
    started.quit()


@pytest.fixture
def browser(driver: Any) -> Iterator[Browser]:
    """The page must not break its own Content-Security-Policy, or leave an error uncaught."""
    driver.get_log("browser")
    yield Browser(driver)
    errors = [entry["message"] for entry in driver.get_log("browser") if entry["level"] == "SEVERE"]
    assert not [message for message in errors if "Failed to load resource" not in message]  # a status of 4xx or 5xx


@pytest.fixture
def api(reader: Reader, documents: list[Document], tmp_path: Path) -> Api:
    """A system whose reader generates at random, but is read as saying ANSWER, a word a token."""
    words = ANSWER.split(" ")
    reader.most = reader.loop = len(words)
    reader.prompter.stop_ids, reader.prompter.end_token = [10**6], 1  # which it never says
    reader.prompter.decode = lambda ids: time.sleep(0.01) or " ".join(words[: len(ids)])
    held = [*documents, Document(HOSTILE, {"title": "<b>Zell</b>", "source": "guide/zell"})]
    return Api(Engine(LexicalRetriever(held), reader), Feedback(tmp_path / "feedback.jsonl", held), 3, "tiny")


@pytest.fixture
def page(browser: Browser, url: str) -> Browser:
    browser.driver.get(url)
    browser.until(lambda: browser.text("#model") == "tiny")
    return browser


def test_an_answer_is_seen_while_it_is_written_and_then_cites_what_it_shares_with_a_passage(page: Browser) -> None:
    page.type("#question", "What does Arlen trade in?\n")
    seen = page.until(lambda: page.all(".busy") and page.text(".answer"))
    assert ANSWER.startswith(seen)
    assert (len(seen) < len(ANSWER), len(page.all(".source"))) == (True, 3)  # the passages are there before the answer
    page.until(lambda: not page.all(".busy"))
    first, *_, last = page.all(".cite")
    first.click()
    assert [page.text("#title"), page.text("mark"), page.text(".on")] == ["1. Arlen", COPPER, f"The {COPPER}."]
    last.click()
    assert (page.text(".on"), last.text) == ("I hope that this was of use to you.", "2")


def test_a_rating_a_helpful_passage_and_a_correction_are_kept(page: Browser, tmp_path: Path) -> None:
    page.ask("What does Arlen trade in?")
    page.click(".cite")
    page.click("#helpful")
    assert "Rate the answer, too" in page.text("#status")
    page.click(".down")
    page.until(lambda: page.text("#status") == "Saved. Thank you.")
    page.type(".correction textarea", "Arlen trades in copper.")
    page.click(".correction button")
    path = tmp_path / "feedback.jsonl"
    page.until(lambda: len(path.read_text().splitlines()) == 2)  # down, then the correction
    row = json.loads(path.read_text().splitlines()[-1])
    assert (row["question"], row["generated_answer"]) == ("What does Arlen trade in?", ANSWER)
    assert (row["rating"], row["corrected_answer"], row["model"]) == (-1, "Arlen trades in copper.", "tiny")
    assert [(shown["clicked"], shown["helpful"]) for shown in row["ctxs"]] == [(True, True), (False,) * 2, (False,) * 2]


def test_a_script_in_an_answer_or_a_passage_is_text(page: Browser) -> None:
    assert HOSTILE in page.ask("What of the castle of Zell?")
    page.click(".source")
    assert (page.text("#title"), page.text("#passage")) == ("1. <b>Zell</b>", HOSTILE)
    assert (page.all("img, b"), len(page.all("script"))) == ([], 1)
    page.driver.get(page.driver.find_element("id", "page").get_attribute("href"))
    assert HOSTILE in page.text("body")
    assert not page.all("img, b, script")


def test_escape_stops_the_answer_and_enter_asks_on_with_the_history_which_a_reload_keeps(
    page: Browser, api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, reader = list[Example](), api.engine.reader
    encode = reader.encode
    monkeypatch.setattr(reader, "encode", lambda example, *rest: asked.append(example) or encode(example, *rest))
    page.type("#question", "What does Arlen trade in?\n")
    page.until(lambda: page.text(".answer"))
    page.type("#question", "\ue00c")
    page.until(lambda: page.text(".problem") == "Stopped.")
    half = page.text(".answer")
    assert page.ask("And Brask?") == page.all(".answer")[-1].text
    assert [turn.message for turn in asked[-1].chat_history] == ["What does Arlen trade in?", half]
    page.driver.refresh()
    assert [question.text for question in page.all(".turn .question")] == ["What does Arlen trade in?", "And Brask?"]
    page.click("#renew")
    page.until(lambda: not page.all(".turn"))


def test_a_conversation_that_cannot_be_read_begins_anew(page: Browser) -> None:
    for kept in ("{", "null", '[{"question": "of another version"}]'):
        page.driver.execute_script("localStorage['rqa.turns'] = arguments[0]", kept)
        page.driver.refresh()
        page.until(lambda: page.text("#model") == "tiny")
        assert not page.all(".turn")


def test_an_error_is_told_in_words_and_the_question_is_kept(page: Browser, api: Api) -> None:
    api.engine.max_queue = 0
    assert page.ask("What does Arlen trade in?") == ""
    assert "Too many requests" in page.text("main.chat")
    assert page.driver.find_element("id", "question").get_property("value") == "What does Arlen trade in?"


def test_the_key_may_be_in_the_url(browser: Browser, api: Api, serve: Callable[..., str]) -> None:
    browser.driver.get(serve(App(api.routes(), api.engine.metrics, "KEY")).replace("//", "//me:KEY@"))
    browser.until(lambda: browser.text("#model") == "tiny")


def test_nothing_is_cut_off_on_a_phone(page: Browser) -> None:
    page.ask("What does Arlen trade in?")
    page.click(".cite")
    page.driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 360, "height": 640, "deviceScaleFactor": 1, "mobile": True}
    )
    boxes = {name: page.driver.find_element("id", name).rect for name in ("talk", "panel", "ask")}
    page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    assert {(box["x"], box["width"]) for box in boxes.values()} == {(0, 360)}
    bottoms = [box["y"] + box["height"] for box in boxes.values()]
    assert bottoms == pytest.approx([boxes["panel"]["y"], boxes["ask"]["y"], 640], abs=1)
    assert boxes["talk"]["height"] > 150


def test_two_systems_are_compared_by_keys_and_what_is_undone_is_rated_again(
    browser: Browser, serve: Callable[..., str], examples: list[Example], tmp_path: Path
) -> None:
    runs = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for run in runs:
        said = {"generated_answer": f"{run.stem} <i>says</i>", "scores": {"f1": 1.0}}
        run.write_text("".join(json.dumps(example.to_json() | said) + "\n" for example in examples[:4]))
    ratings = tmp_path / "ratings.jsonl"
    browser.driver.get(serve(App(comparison_routes(Comparison(*map(str, runs), str(ratings))), Metrics())))
    browser.type("#name", "Ann\n")
    browser.until(lambda: browser.text("#done") == "0 of 4 rated")
    expected = {}
    for key in "12tub2":  # the tie is undone, and then both are bad
        asked, shown = browser.text("#asked"), [side.text for side in browser.all(".side .text")]
        left, right = (text.removesuffix(" <i>says</i>").upper() for text in shown)
        browser.type("body", key)
        browser.until(lambda asked=asked: browser.text("#asked") != asked or browser.text("#finished"))
        expected[asked] = {"1": left, "2": right, "t": "tie", "b": "both_bad"}.get(key, expected.get(asked))
    assert browser.text("#finished") == "All questions are rated. Thank you."
    found = {row["question"]: raters for row, raters in read_ratings(ratings).values()}
    assert found == {question: {"Ann": choice} for question, choice in expected.items()}
