"""Layouts of questions and answers: Natural Questions open and TriviaQA without passages, SQuAD under its articles."""

from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import Any

from rqa.data.convert.reading import Row
from rqa.data.convert.rows import all_answers, with_answers
from rqa.data.documents import Document
from rqa.data.examples import Example

# ---------------------------------------------------------------- questions and answers without passages


def read_nq_open(row: Row) -> Iterator[Example]:
    yield with_answers(row.text("question"), row.texts("answer"), row.where)


def write_nq_open(_: int, example: Example) -> dict[str, Any]:
    return {"question": example.question, "answer": all_answers(example)}


def read_triviaqa(row: Row) -> Iterator[Example]:
    answer = row.values.get("Answer", row.values.get("answer"))
    if not isinstance(answer, dict):
        raise row.wrong("Answer", "an object")
    inner = Row(answer, row.where)
    answers = list(dict.fromkeys([inner.text("Value", "value"), *inner.texts("Aliases", "aliases")]))
    yield with_answers(row.text("Question", "question"), answers, row.where)


def write_triviaqa(number: int, example: Example) -> dict[str, Any]:
    answers = all_answers(example)
    answer = {"Value": example.gold_answer or "", "Aliases": answers, "Type": "FreeForm"}
    return {"Question": example.question, "QuestionId": str(number), "Answer": answer}


# ---------------------------------------------------------------- SQuAD: a row is an article


def read_squad(row: Row) -> Iterator[Document | Example]:
    title = row.text("title", default="")
    for paragraph in row.rows("paragraphs"):
        document = Document(paragraph.text("context"), {"source": title, "title": title})
        yield document
        for question in paragraph.rows("qas"):
            impossible = question.values.get("is_impossible") is True
            answers = [] if impossible else [answer.text("text") for answer in question.rows("answers")]
            unique = list(dict.fromkeys(answers))
            yield with_answers(question.text("question"), unique, row.where, gold_docs=(document,))


def write_squad(examples: Iterable[Example]) -> Iterator[dict[str, Any]]:
    """Neighbouring questions about one passage and one title stand together; those without a passage have no place."""
    asked = ((example.gold_docs[0], example) for example in examples if example.gold_docs)
    numbered = ((document, number, example) for number, (document, example) in enumerate(asked))
    for title, articles in groupby(numbered, key=lambda item: str(item[0].metadata.get("title") or "")):
        paragraphs = [
            {"context": content, "qas": [_squad_question(number, example, content) for _, number, example in items]}
            for content, items in groupby(articles, key=lambda item: item[0].page_content)
        ]
        yield {"title": title, "paragraphs": paragraphs}


def _squad_question(number: int, example: Example, context: str) -> dict[str, Any]:
    """An answer that the passage does not hold word for word, unlike SQuAD's own, starts at -1."""
    answers = [{"text": answer, "answer_start": context.find(answer)} for answer in all_answers(example)]
    return {"id": str(number), "question": example.question, "answers": answers, "is_impossible": not answers}
