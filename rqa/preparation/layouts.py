"""Every layout by its name."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from rqa.data import Document, Example
from rqa.preparation.reading import Row


@dataclass(frozen=True)
class RowFormat:
    """One layout.

    Attributes:
        read: What a row holds. An unanswerable question has the answer "".
        write: Rows of examples, in order.
        document: The row of a passage, where the layout has a corpus of its own.
        answers: Whether its questions have answers.
        key: The field that holds the rows, where a file is one JSON object.
        around: What stands before and behind the rows of a JSON array; None: JSONL.
    """

    read: Callable[[Row], Iterator[Document | Example]]
    write: Callable[[Iterable[Example]], Iterator[dict[str, Any]]]
    document: Callable[[Document], dict[str, Any]] | None = None
    answers: bool = True
    key: str = ""
    around: tuple[str, str] | None = None


def one_row_each(write: Callable[[int, Example], dict[str, Any]]) -> Callable[..., Iterator[dict[str, Any]]]:
    """A writer of examples from a writer of one, which is told its number."""
    return lambda examples: (write(number, example) for number, example in enumerate(examples))


def with_answers(question: str, answers: list[str], where: str, **passages: Any) -> Example:
    """An example whose first answer is the gold one; without any it is unanswerable."""
    first, *others = answers or [""]
    return Example(question, gold_answer=first, other_answers=tuple(others), where=where, **passages)


def all_answers(example: Example) -> list[str]:
    """The answers of an example; none of an unanswerable one."""
    return [answer for answer in (example.gold_answer, *example.other_answers) if answer]


def titled(row: Row, *identifiers: str) -> Document:
    """A passage with `title` and `text`, and an identifier under one of these names; a blank text is its title."""
    title = row.text("title", default="")
    text = row.text("text")
    content = text if text.strip() else title
    if not content.strip():
        raise row.wrong("text", "a text that is not blank")
    return Document(content, {"source": row.text(*identifiers, default=title), "title": title})


def title_and_text(document: Document) -> dict[str, Any]:
    return {"title": str(document.metadata.get("title") or ""), "text": document.page_content}


def source(document: Document) -> str:
    return str(document.metadata.get("source", ""))


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


NOT_IN_MSMARCO = "No Answer Present."


# ---------------------------------------------------------------- DPR and FiD


def read_dpr(row: Row) -> Iterator[Document | Example]:
    passages = {
        name: tuple(titled(context, "passage_id", "psg_id") for context in row.rows(name))
        for name in ("positive_ctxs", "hard_negative_ctxs", "negative_ctxs")
    }
    for found in passages.values():
        yield from found
    gold, hard = passages["positive_ctxs"], passages["hard_negative_ctxs"]
    yield with_answers(row.text("question"), row.texts("answers"), row.where, gold_docs=gold, hard_neg_docs=hard)


def write_dpr(_: int, example: Example) -> dict[str, Any]:
    def contexts(documents: Iterable[Document]) -> list[dict[str, Any]]:
        return [{**title_and_text(d), "score": 0, "title_score": 0, "passage_id": source(d)} for d in documents]

    return {
        "question": example.question,
        "answers": all_answers(example),
        "positive_ctxs": contexts(example.gold_docs),
        "negative_ctxs": [],
        "hard_negative_ctxs": contexts(example.hard_neg_docs),
    }


def read_fid(row: Row) -> Iterator[Document | Example]:
    """The gold passages are those that are said to hold an answer."""
    contexts = row.rows("ctxs")
    documents = tuple(titled(context, "id", "passage_id") for context in contexts)
    yield from documents
    marks = [context.values.get("hasanswer", context.values.get("has_answer")) for context in contexts]
    gold = tuple(document for document, mark in zip(documents, marks, strict=True) if mark is True)
    answers = list(dict.fromkeys([*row.texts("target"), *row.texts("answers")]))
    example = with_answers(row.text("question"), answers, row.where, gold_docs=gold, ctxs=documents)
    scored = bool(contexts) and all("score" in context.values for context in contexts)
    yield replace(example, ctx_scores=tuple(_number(context) for context in contexts)) if scored else example


def _number(context: Row) -> float:
    try:
        return float(context.text("score"))
    except ValueError:
        raise context.wrong("score", "a number") from None


def write_fid(number: int, example: Example) -> dict[str, Any]:
    gold = {document.key for document in example.gold_docs}
    contexts = example.ctxs or (*example.gold_docs, *example.hard_neg_docs)
    scores = example.ctx_scores or [float(-rank) for rank in range(len(contexts))]
    return {
        "id": str(number),
        "question": example.question,
        "target": example.gold_answer or "",
        "answers": all_answers(example),
        "ctxs": [
            {"id": source(d), **title_and_text(d), "score": str(score), "hasanswer": d.key in gold}
            for d, score in zip(contexts, scores, strict=True)
        ],
    }


# ---------------------------------------------------------------- MS MARCO, with all its passages


def read_msmarco(row: Row) -> Iterator[Document | Example]:
    passages = [passage for passage in row.rows("passages") if passage.text("passage_text").strip()]
    metadata = [{"source": passage.text("url", default=""), "title": ""} for passage in passages]
    documents = tuple(Document(p.text("passage_text"), m) for p, m in zip(passages, metadata, strict=True))
    yield from documents
    gold = tuple(d for d, p in zip(documents, passages, strict=True) if p.text("is_selected", default="0") == "1")
    answers = [answer for answer in row.texts("answers") if answer != NOT_IN_MSMARCO]
    yield with_answers(row.text("query"), answers, row.where, gold_docs=gold, ctxs=documents)


def write_msmarco(number: int, example: Example) -> dict[str, Any]:
    gold = {document.key for document in example.gold_docs}
    passages = example.ctxs or (*example.gold_docs, *example.hard_neg_docs)
    return {
        "query_id": number,
        "query": example.question,
        "answers": all_answers(example) or [NOT_IN_MSMARCO],
        "passages": [
            {"is_selected": int(d.key in gold), "url": source(d), "passage_text": d.page_content} for d in passages
        ],
    }


# ---------------------------------------------------------------- tevatron, FlagEmbedding, FlashRAG


def read_tevatron(row: Row) -> Iterator[Document | Example]:
    """A row of the corpus has no query."""
    if "query" not in row.values:
        yield titled(row, "docid")
        return
    positive, negative = (
        tuple(titled(passage, "docid") for passage in row.rows(name))
        for name in ("positive_passages", "negative_passages")
    )
    yield from (*positive, *negative)
    first, *others = [*row.texts("answers"), None]
    others = tuple(answer for answer in others if answer)
    yield Example(row.text("query"), positive, first, (), negative, other_answers=others, where=row.where)


def write_tevatron(number: int, example: Example) -> dict[str, Any]:
    answers = {"answers": all_answers(example)} if example.gold_answer else {}
    return {
        "query_id": str(number),
        "query": example.question,
        **answers,
        "positive_passages": [write_tevatron_passage(document) for document in example.gold_docs],
        "negative_passages": [write_tevatron_passage(document) for document in example.hard_neg_docs],
    }


def write_tevatron_passage(document: Document) -> dict[str, Any]:
    return {"docid": source(document), **title_and_text(document)}


def read_flagembedding(row: Row) -> Iterator[Document | Example]:
    positive, negative = (tuple(Document(text) for text in row.texts(name) if text.strip()) for name in ("pos", "neg"))
    yield from (*positive, *negative)
    yield Example(row.text("query"), positive, hard_neg_docs=negative, where=row.where)


def write_flagembedding(_: int, example: Example) -> dict[str, Any]:
    positive, negative = (
        [d.fmt_content for d in documents] for documents in (example.gold_docs, example.hard_neg_docs)
    )
    return {"query": example.question, "pos": positive, "neg": negative}


def read_flashrag(row: Row) -> Iterator[Document | Example]:
    """A row of the corpus has `contents`: the title, in quotes, on the first line."""
    if "contents" not in row.values:
        yield with_answers(row.text("question"), row.texts("golden_answers"), row.where)
        return
    title, line_end, text = row.text("contents").partition("\n")
    if not line_end:
        title, text = "", title
    title = title[1:-1] if len(title) > 1 and title[0] == title[-1] == '"' else title
    yield Document(text, {"source": row.text("id"), "title": title})


def write_flashrag(number: int, example: Example) -> dict[str, Any]:
    return {"id": str(number), "question": example.question, "golden_answers": all_answers(example), "metadata": {}}


def write_flashrag_passage(document: Document) -> dict[str, Any]:
    title = str(document.metadata.get("title") or "")
    return {"id": source(document), "contents": f'"{title}"\n{document.page_content}'}


FORMATS = {
    "dpr": RowFormat(read_dpr, one_row_each(write_dpr), around=("[", "]")),
    "fid": RowFormat(read_fid, one_row_each(write_fid), around=("[", "]")),
    "squad": RowFormat(read_squad, write_squad, key="data", around=('{"version": "v2.0", "data": [', "]}")),
    "msmarco": RowFormat(read_msmarco, one_row_each(write_msmarco)),
    "nq_open": RowFormat(read_nq_open, one_row_each(write_nq_open)),
    "triviaqa": RowFormat(read_triviaqa, one_row_each(write_triviaqa), key="Data", around=('{"Data": [', "]}")),
    "tevatron": RowFormat(read_tevatron, one_row_each(write_tevatron), write_tevatron_passage, answers=False),
    "flagembedding": RowFormat(read_flagembedding, one_row_each(write_flagembedding), answers=False),
    "flashrag": RowFormat(read_flashrag, one_row_each(write_flashrag), write_flashrag_passage),
}
