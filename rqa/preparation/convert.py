"""Conversion of other layouts to ours and back, with one row in memory at a time."""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

from rqa.data import Document, Example, iterate_examples
from rqa.documents import iterate_documents
from rqa.preparation.chunking import Seen
from rqa.preparation.feedback import read_feedback
from rqa.preparation.layouts import BLANK, JSONL, LAYOUTS, passage
from rqa.preparation.reading import read_rows, read_table
from rqa.runtime.cli import progress
from rqa.runtime.errors import UserError
from rqa.runtime.files import atomic_file

JUDGED = {  # folders with a corpus, and for each split questions and relevance judgements
    "beir": ("corpus.jsonl", "queries.jsonl", "qrels/*.tsv"),
    "msmarco_passages": ("collection.tsv", "queries.*.tsv", "qrels.*.tsv"),
}
READABLE = sorted([*LAYOUTS, *JUDGED, "feedback"])
WRITABLE = sorted([*LAYOUTS, "beir"])


def read_layout(layout: str, paths: Sequence[Path], directory: Path, no_answer: str = "") -> Counter[str]:
    """Convert files to `documents.jsonl` and, for each split, `SPLIT_w_qa.jsonl`, or `SPLIT_w_q.jsonl` without answers.

    Unanswerable questions get `no_answer` as their answer, or are left out if it is empty. People's ratings
    ("feedback") become both files and no documents. -> counts by what is counted
    """
    ending = "_w_qa" if layout in LAYOUTS and LAYOUTS[layout].answers else "_w_q" if layout != "feedback" else ""
    counts: Counter[str] = Counter()
    seen = Seen()
    with _writing(directory) as (write, written):
        items = _read_judged if layout in JUDGED else _read_rows
        for split, item in progress(items(layout, paths), desc="convert", unit="row"):
            if isinstance(item, Document):
                is_new = seen.add(*item.key)
                counts["passages" if is_new else "repeated passages left out"] += 1
                if is_new:
                    write("documents.jsonl", item.to_json())
            elif isinstance(item, str):
                counts[item] += 1
            elif item.gold_answer == "" and not no_answer:
                counts["unanswerable questions left out"] += 1
            else:
                counts[f"questions of {split}"] += 1
                item = replace(item, gold_answer=no_answer) if item.gold_answer == "" else item
                write(f"{split}{ending}.jsonl", item.to_json())
        if not written:
            left_out = "".join(f"; {count} {what}" for what, count in counts.items())
            raise UserError(f"{paths[0]}: holds no rows to write{left_out}")
    return counts


def write_layout(
    layout: str, directory: Path, documents: Path | None, splits: dict[str, Path], no_answer: str = ""
) -> Counter[str]:
    """Write the database, in layouts that have one, and the examples. -> the number of rows by file"""
    if layout == "beir":
        if documents is None:
            raise UserError("--document_path: missing; beir needs the whole corpus")
        return _write_beir(directory, documents, splits)
    chosen = LAYOUTS[layout]
    with _writing(directory, chosen.around) as (write, counts):
        if documents is not None and chosen.corpus:
            for document in progress(iterate_documents(documents), desc="corpus.jsonl", unit="passage"):
                write("corpus.jsonl", chosen.write_passage(document))
        for split, path in splits.items():
            name = f"{split}.jsonl" if chosen.around == JSONL else f"{split}.json"
            examples = iterate_examples(path)
            if no_answer:  # the gold answer of unanswerable questions
                examples = (replace(e, gold_answer="") if e.gold_answer == no_answer else e for e in examples)
            write(name)
            for row in progress(chosen.write(examples), desc=name, unit="row"):
                write(name, row)
    return counts


@contextmanager
def _writing(directory: Path, around: Sequence[str] = JSONL) -> Iterator[tuple[Callable[..., None], Counter[str]]]:
    """Yield a function that appends rows to a named file, and the files' row counts. All files are kept, or none."""
    before, between, behind = around
    counts: Counter[str] = Counter()
    files: dict[str, IO[str]] = {}
    with ExitStack() as stack:

        def write(name: str, *rows: str | dict[str, Any]) -> None:
            if name not in files:
                temporary = stack.enter_context(atomic_file(directory / name))
                files[name] = stack.enter_context(temporary.open("w", encoding="utf-8"))
                files[name].write(before)
                counts[name] = 0
            for row in rows:
                text = row if isinstance(row, str) else json.dumps(row, ensure_ascii=False)
                files[name].write(between + text if counts[name] else text)
                counts[name] += 1

        yield write, counts
        for file in files.values():
            file.write(behind)


def _read_rows(layout: str, paths: Sequence[Path]) -> Iterator[tuple[str, Document | Example | str]]:
    stems = [path.name.removesuffix(".gz").rpartition(".")[0] or path.name for path in paths]
    if twice := [stem for stem in stems if stems.count(stem) > 1]:
        raise UserError(f"--input_path: two files are called {twice[0]}, which names the split; rename one")
    for stem, path in zip(stems, paths, strict=True):
        if layout == "feedback":
            yield from read_feedback(path, stem)
        else:
            for row in read_rows(path, LAYOUTS[layout].key):
                yield from ((stem, item) for item in LAYOUTS[layout].read(row))


def _read_judged(layout: str, folders: Sequence[Path]) -> Iterator[tuple[str, Document | Example | str]]:
    """Yield all passages of a folder's corpus, then each split's questions that have a relevant passage."""
    corpus, queries, qrels = JUDGED[layout]
    before, behind = qrels.split("*")
    for folder in folders:
        files: dict[str, Path] = {}
        for path in sorted(folder.glob(f"{qrels}*")):
            name = path.relative_to(folder).as_posix().removesuffix(".gz")
            files[name.removeprefix(before).removesuffix(behind)] = path
        if not files:
            raise UserError(f"{folder}: holds no qrels; a corpus alone needs no conversion")
        judged = {split: _read_judgements(path) for split, path in files.items()}
        wanted = {name for relevant in judged.values() for gains in relevant.values() for name in gains}
        passages: dict[str, Document] = {}
        for name, title, text in _read_texts(folder / corpus):
            document = passage(text.strip() if layout == "beir" else text, name, title)
            yield "", document or BLANK
            if document and name in wanted:
                passages[name] = document
        for split, relevant in judged.items():
            absent = sum(name not in passages for gains in relevant.values() for name in gains)
            yield from [("", f"judgements of {split} without a finite score or a passage with text left out")] * absent
            kept, total = 0, len(relevant)
            for query, _, question in _read_texts(folder / queries.replace("*", split)):
                gains = relevant.pop(query, {}) if question.strip() else {}
                if gold := tuple(passages[name].graded(gain) for name, gain in gains.items() if name in passages):
                    yield split, Example(question, gold, where=str(files[split]))
                    kept += 1
            if not kept:
                raise UserError(f"{files[split]}: has no score above 0 for a passage with text; correct or remove it")
            yield from [("", f"judged questions of {split} left out")] * (total - kept)


def _read_texts(path: Path) -> Iterator[tuple[str, str, str]]:
    """Yield (identifier, title, text) of JSONL or tab-separated values, gzipped or not."""
    packed = path.with_name(path.name + ".gz")
    path = packed if packed.exists() and not path.exists() else path
    if ".jsonl" in path.suffixes:
        for row in read_rows(path):
            yield row.text("_id"), row.text("title", default=""), row.text("text", default="")
        return
    for where, fields in read_table(path):
        if len(fields) != 2:
            raise UserError(f"{where}: expected an identifier and a text with a tab between them")
        yield fields[0], "", fields[1]


def _read_judgements(path: Path) -> dict[str, dict[str, float]]:
    """Read the gains of each query's relevant passages, from columns query, passage, score, or from TREC's qrels."""
    relevant: defaultdict[str, dict[str, float]] = defaultdict(dict)
    for where, fields in read_table(path):
        fields = fields if len(fields) > 1 else fields[0].split()
        if len(fields) not in (3, 4):
            raise UserError(f"{where}: expected query, passage and score, found {len(fields)} columns")
        query, passage, score = fields[0], fields[-2], fields[-1].strip()
        try:
            gain = float(re.sub(r"^$|.*\d_.*", "nan", score))
            if not gain <= 0:  # NaN and infinity get a name that no passage has, and are counted as left out
                relevant[query][passage if gain < float("inf") else f"{passage}\t"] = gain
        except ValueError:
            if not where.endswith(":1"):  # the header
                raise UserError(f"{where}: score '{score}' is not a number") from None
    return relevant


def _write_beir(directory: Path, documents: Path, splits: dict[str, Path]) -> Counter[str]:
    """Write BEIR's files; a passage's `_id` is its source, or source#number if that is taken."""
    examples = (example for path in splits.values() for example in iterate_examples(path))
    names: dict[tuple[str, str], str] = {document.key: "" for example in examples for document in example.gold_docs}
    taken = Seen()
    with _writing(directory) as (write, counts):
        for number, document in enumerate(progress(iterate_documents(documents), desc="corpus.jsonl", unit="passage")):
            name, text = document.key
            while not (name and taken.add(name)):
                name = f"{name}#{number}"
            if names.get(document.key) == "":
                names[document.key] = name
            title = document.metadata.get("title") or ""
            write("corpus.jsonl", {"_id": name, "title": str(title), "text": text, "metadata": {}})
        for split, path in splits.items():
            write("queries.jsonl")
            write(f"qrels/{split}.tsv", "query-id\tcorpus-id\tscore")
            for number, example in enumerate(progress(iterate_examples(path), desc=path.name, unit="question")):
                query = f"{split}-{number}"
                write("queries.jsonl", {"_id": query, "text": example.question, "metadata": {}})
                for document in example.gold_docs:
                    if not names[document.key]:
                        raise UserError(f"{example.where}: a gold passage is not in {documents}")
                    write(f"qrels/{split}.tsv", f"{query}\t{names[document.key]}\t{document.gain:g}")
            counts[f"qrels/{split}.tsv"] -= 1  # the header
    return counts
