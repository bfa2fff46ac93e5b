"""Layouts of data sets by name: their fields and what these hold, for both reading and writing."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from typing import Any

from rqa.data import Document, Example
from rqa.preparation.reading import Row

JSONL, ARRAY = ("", "\n", "\n"), ("[\n", ",\n", "\n]\n")
BLANK = "blank passages left out"
LISTS = ("gold_docs", "hard_neg_docs", "ctxs", "others")  # lists of passages, in the order they join the database


def passage(text: str, source: str, title: str) -> Document | None:
    """A passage with this text, or with its title if the text is blank; None if both are."""
    content = text if text.strip() else title
    return Document(content, {"source": source, "title": title}) if content.strip() else None


@dataclass(frozen=True)
class Layout:
    """One layout: what the field at each path holds, in the order of writing.

    A row's fields hold `number` or `name` (its position, as a number or a string), `question`, `answer` (the gold one),
    `answers`, or passages: `gold_docs`, `hard_neg_docs`, `ctxs`, or `others`, which join the database and are not
    written. A passage's fields hold `source`, `title`, `text`, `contents` (title and text as FlashRAG joins them),
    `score`, `gold` (true if gold) or `selected` (1 if gold). Anything else is a constant.
    """

    row: dict[str, Any] = field(default_factory=dict)
    passage: dict[str, Any] = field(default_factory=dict)  # empty: a passage is a string
    answers: bool = True  # whether questions have answers
    no_answer: str = ""  # the answer of unanswerable questions; "": they have an empty list
    corpus: bool = False  # whether rows without a question are passages, and corpus.jsonl holds such rows
    key: str = ""  # the field of the rows, if a file is one JSON object
    around: tuple[str, str, str] = JSONL  # text before, between and after the rows

    @cached_property
    def paths(self) -> dict[str, str]:
        return {held: path for path, held in (*self.row.items(), *self.passage.items()) if isinstance(held, str)}

    def read(self, row: Row) -> Iterator[Document | Example | str]:
        """Yield a row's passages (`BLANK` for blank ones), then its question, with the answer "" if unanswerable."""
        paths = self.paths
        if self.corpus and row.find(paths["question"])[1] is None:
            yield self._read_passage(row) or BLANK
            return
        lists = {}
        for name in (name for name in LISTS if name in paths):
            if self.passage:
                pairs = [(self._read_passage(each), each) for each in row.rows(paths[name])]
            else:
                pairs = [(Document(text) if text.strip() else None, row) for text in row.texts(paths[name])]
            yield from (document or BLANK for document, _ in pairs)
            lists[name] = [(document, each) for document, each in pairs if document]
        contexts, scores = lists.get("ctxs", []), None
        if contexts and "score" in paths and all(each.find(paths["score"])[1] is not None for _, each in contexts):
            scores = tuple(each.number(paths["score"]) for _, each in contexts)
        if mark := paths.get("gold") or paths.get("selected"):
            lists["gold_docs"] = [pair for pair in contexts if pair[1].text(mark, default="") in ("1", "True")]
        answers = [text for name in ("answer", "answers") if name in paths for text in row.texts(paths[name])]
        unique = [text for text in dict.fromkeys(answers) if text.strip() not in ("", self.no_answer)]
        first, *others = unique or ["" if self.answers else None]
        found = {name: tuple(document for document, _ in pairs) for name, pairs in lists.items() if name != "others"}
        answered = {"gold_answer": first, "other_answers": tuple(others), "ctx_scores": scores}
        yield Example(row.text(paths["question"]), where=row.where, **answered, **found)

    def _read_passage(self, row: Row) -> Document | None:
        paths = self.paths
        title = row.text(paths["title"], default="") if "title" in paths else ""
        text = row.text(paths["contents"] if "contents" in paths else paths["text"])
        if "contents" in paths and "\n" in text:
            title, _, text = text.partition("\n")
            title = title[1:-1] if len(title) > 1 and title[0] == title[-1] == '"' else title
        return passage(text, row.text(paths["source"], default=title), title)

    def write(self, examples: Iterable[Example]) -> Iterator[dict[str, Any]]:
        no_answers = [self.no_answer] if self.no_answer else [] if self.answers else None
        for number, example in enumerate(examples):
            gold = {document.key for document in example.gold_docs}
            contexts = example.ctxs or (*example.gold_docs, *example.hard_neg_docs)
            scores = example.ctx_scores or [float(-rank) for rank in range(len(contexts))]
            held: dict[str, Any] = {"number": number, "name": str(number), "question": example.question, "others": []}
            held |= {"answer": example.gold_answer or "", "answers": all_answers(example) or no_answers}
            held["gold_docs"] = [self.write_passage(document) for document in example.gold_docs]
            held["hard_neg_docs"] = [self.write_passage(document) for document in example.hard_neg_docs]
            held["ctxs"] = [self.write_passage(d, d.key in gold, s) for d, s in zip(contexts, scores, strict=True)]
            yield _filled(self.row, held)

    def write_passage(self, document: Document, gold: bool = False, score: float = 0.0) -> Any:
        """A passage as part of a row, or as a row of the corpus."""
        if not self.passage:
            return document.fmt_content
        title, text = str(document.metadata.get("title") or ""), document.page_content
        held = {"source": document.key[0], "title": title, "text": text, "contents": f'"{title}"\n{text}'}
        return _filled(self.passage, {**held, "score": str(score), "gold": gold, "selected": int(gold)})


def _filled(fields: dict[str, Any], held: dict[str, Any]) -> dict[str, Any]:
    """A JSON object with a value at each path; None values are left out."""
    filled: dict[str, Any] = {}
    for path, what in fields.items():
        *above, name = (part.partition("|")[0] for part in path.split("."))
        place = filled
        for part in above:
            place = place.setdefault(part, {})
        value = held.get(what, what) if isinstance(what, str) else what
        if value is not None:
            place[name] = value
    return filled


def all_answers(example: Example) -> list[str]:
    """The answers of an example; [] if it is unanswerable."""
    return [answer for answer in (example.gold_answer, *example.other_answers) if answer]


class SQuAD(Layout):
    """SQuAD: a row is an article (paragraphs and the questions about each), or one question as in `datasets`."""

    def read(self, row: Row) -> Iterator[Document | Example | str]:
        title = row.text("title", default="")
        for paragraph in [row] if "context" in row.values else row.rows("paragraphs"):
            document = passage(paragraph.text("context"), title, title)
            yield document or BLANK
            questions = [row] if paragraph is row else paragraph.rows("qas")
            for asked in questions if document else []:
                impossible = asked.values.get("is_impossible") is True
                answers = [] if impossible else [answer.text("text") for answer in asked.rows("answers")]
                first, *others = [answer for answer in dict.fromkeys(answers) if answer.strip()] or [""]
                question = asked.text("question")
                yield Example(question, (document,), first, other_answers=tuple(others), where=row.where)

    def write(self, examples: Iterable[Example]) -> Iterator[dict[str, Any]]:
        """Group neighbouring questions by title and passage; questions without a gold passage are left out.

        An answer that does not occur word for word in the passage, unlike SQuAD's own, starts at -1.
        """
        asked = ((example.gold_docs[0], example) for example in examples if example.gold_docs)
        numbered = ((document, number, example) for number, (document, example) in enumerate(asked))
        for title, article in groupby(numbered, key=lambda item: str(item[0].metadata.get("title") or "")):
            paragraphs = []
            for context, items in groupby(article, key=lambda item: item[0].page_content):
                questions: list[dict[str, Any]] = []
                for _, number, example in items:
                    answers = [{"text": text, "answer_start": context.find(text)} for text in all_answers(example)]
                    question = {"id": str(number), "question": example.question, "answers": answers}
                    questions.append({**question, "is_impossible": not answers})
                paragraphs.append({"context": context, "qas": questions})
            yield {"title": title, "paragraphs": paragraphs}


LAYOUTS = {
    "dpr": Layout(
        {"question": "question", "answers": "answers", "positive_ctxs": "gold_docs", "negative_ctxs": "others",
         "hard_negative_ctxs": "hard_neg_docs"},
        {"title": "title", "text": "text", "score": 0, "title_score": 0, "passage_id|psg_id": "source"},
        around=ARRAY,
    ),
    "fid": Layout(
        {"id": "name", "question": "question", "target": "answer", "answers": "answers", "ctxs": "ctxs"},
        {"id|passage_id": "source", "title": "title", "text": "text", "score": "score", "hasanswer|has_answer": "gold"},
        around=ARRAY,
    ),
    "squad": SQuAD(key="data", around=('{"version": "v2.0", "data": [\n', ",\n", "\n]}\n")),
    "msmarco": Layout(
        {"query_id": "number", "query": "question", "answers": "answers", "passages": "ctxs"},
        {"is_selected": "selected", "url": "source", "passage_text": "text"},
        no_answer="No Answer Present.",
    ),
    "nq_open": Layout({"question": "question", "answer": "answers"}),
    "triviaqa": Layout(
        {"Question|question": "question", "QuestionId": "name", "Answer|answer.Value|value": "answer",
         "Answer|answer.Aliases|aliases": "answers", "Answer|answer.Type": "FreeForm"},
        key="Data", around=('{"Data": [\n', ",\n", "\n]}\n"),
    ),
    "tevatron": Layout(
        {"query_id": "name", "query": "question", "answers": "answers", "positive_passages": "gold_docs",
         "negative_passages": "hard_neg_docs"},
        {"docid": "source", "title": "title", "text": "text"},
        answers=False, corpus=True,
    ),
    "flagembedding": Layout({"query": "question", "pos": "gold_docs", "neg": "hard_neg_docs"}, answers=False),
    "flashrag": Layout(
        {"id": "name", "question": "question", "golden_answers": "answers", "metadata": {}},
        {"id": "source", "contents": "contents"},
        corpus=True,
    ),
}  # fmt: skip
