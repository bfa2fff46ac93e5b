"""Layouts of questions with passages: DPR, FiD, MS MARCO's question answering, tevatron, FlagEmbedding, FlashRAG."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from rqa.data.convert.reading import Row
from rqa.data.convert.rows import all_answers, source, title_and_text, titled, with_answers
from rqa.data.documents import Document
from rqa.data.examples import Example

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
