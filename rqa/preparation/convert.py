"""From another layout to ours and back, a row in memory at a time."""

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

from rqa.data import Document, Example, iterate_documents, iterate_examples
from rqa.preparation.chunking import Seen
from rqa.preparation.layouts import FORMATS
from rqa.preparation.reading import read_rows, read_table
from rqa.runtime.errors import UserError
from rqa.runtime.files import atomic_file, write_jsonl

Judgements = dict[str, list[str]]


@dataclass(frozen=True)
class JudgedFormat:
    """One layout.

    Attributes:
        corpus: Yields (id, passage) from the folder.
        queries: Yields (id, question) of a split.
        judgements: The files of judgements by split.
    """

    corpus: Callable[[Path], Iterator[tuple[str, Document]]]
    queries: Callable[[Path, str], Iterator[tuple[str, str]]]
    judgements: Callable[[Path], dict[str, Path]]


def read_judged(layout: JudgedFormat, folder: Path) -> Iterator[Document | tuple[str, Example]]:
    """Yield every passage of the corpus, then the questions of each split that have a relevant one.

    Raises:
        UserError: a file is missing or malformed, or a judgement names what is not there.
    """
    files = layout.judgements(folder)
    if not files:
        raise UserError(f"{folder}: holds no qrels; a corpus alone needs no conversion")
    judged = {split: _read_judgements(path) for split, path in files.items()}
    wanted = {identifier for relevant in judged.values() for ids in relevant.values() for identifier in ids}
    passages: dict[str, Document] = {}
    for identifier, document in layout.corpus(folder):
        yield document
        if identifier in wanted:
            passages[identifier] = document
    for split, relevant in judged.items():
        unasked = set(relevant)
        for query, question in layout.queries(folder, split):
            if query in unasked:
                unasked.remove(query)
                gold = tuple(_find(passages, identifier, files[split]) for identifier in relevant[query])
                yield split, Example(question, gold, where=str(files[split]))
        if unasked:
            where = _where(files[split], min(unasked))
            raise UserError(f"{where}: query '{min(unasked)}' is in no file of queries")


def _find(passages: dict[str, Document], identifier: str, path: Path) -> Document:
    if identifier not in passages:
        raise UserError(f"{_where(path, identifier)}: passage '{identifier}' is not in the corpus")
    return passages[identifier]


def _where(path: Path, identifier: str) -> str:
    """The file and the first line that names a query or a passage."""
    return next((where for where, fields in read_table(path) if identifier in " ".join(fields).split()), str(path))


def _read_judgements(path: Path) -> Judgements:
    """The relevant passages of each query: query, passage, score below a header, or TREC's four columns."""
    relevant: defaultdict[str, list[str]] = defaultdict(list)
    for where, fields in read_table(path):
        fields = fields if len(fields) > 1 else fields[0].split()
        if len(fields) not in (3, 4):
            raise UserError(f"{where}: expected query, passage and score, found {len(fields)} columns")
        query, passage, score = fields[0], fields[-2], fields[-1].strip()
        if not score.lstrip("-").isdigit():
            if where.endswith(":1"):
                continue  # the header
            raise UserError(f"{where}: score '{score}' is not a number")
        if int(score) > 0:
            relevant[query].append(passage)
    return relevant


# ---------------------------------------------------------------- BEIR


def _beir_corpus(folder: Path) -> Iterator[tuple[str, Document]]:
    for row in read_rows(_either(folder / "corpus.jsonl")):
        identifier = row.text("_id")
        if text := row.text("text", default="").strip() or row.text("title", default=""):
            yield identifier, Document(text, {"source": identifier, "title": row.text("title", default="")})


def _beir_queries(folder: Path, split: str) -> Iterator[tuple[str, str]]:
    yield from ((row.text("_id"), row.text("text")) for row in read_rows(_either(folder / "queries.jsonl")))


def _either(path: Path) -> Path:
    """The file, or its gzipped form."""
    packed = path.with_name(path.name + ".gz")
    return packed if packed.exists() and not path.exists() else path


def write_beir(folder: Path, documents: Path, splits: dict[str, Path]) -> dict[str, int]:
    """Write our files as BEIR's. A passage is called by its source, and where that is taken by source#number.

    Returns:
        The rows of each file.

    Raises:
        UserError: a gold passage is not in the database.
    """
    names: dict[tuple[str, str], str] = {
        document.key: "" for path in splits.values() for example in iterate_examples(path)
        for document in example.gold_docs
    }  # fmt: skip
    counts: Counter[str] = Counter()
    write_jsonl(folder / "corpus.jsonl", _corpus_rows(documents, names, counts))
    with atomic_file(folder / "queries.jsonl") as temporary, temporary.open("w", encoding="utf-8") as queries:
        for split, path in splits.items():
            with atomic_file(folder / "qrels" / f"{split}.tsv") as part, part.open("w", encoding="utf-8") as qrels:
                qrels.write("query-id\tcorpus-id\tscore\n")
                for number, example in enumerate(tqdm(iterate_examples(path), desc=path.name, unit="question")):
                    row = {"_id": f"{split}-{number}", "text": example.question, "metadata": {}}
                    queries.write(json.dumps(row, ensure_ascii=False) + "\n")
                    counts["queries.jsonl"] += 1
                    for document in example.gold_docs:
                        if not names[document.key]:
                            raise UserError(f"{example.where}: a gold passage is not in {documents}")
                        qrels.write(f"{row['_id']}\t{names[document.key]}\t1\n")
                        counts[f"qrels/{split}.tsv"] += 1
    return counts


def _corpus_rows(
    documents: Path, names: dict[tuple[str, str], str], counts: Counter[str]
) -> Iterator[dict[str, object]]:
    taken = Seen()
    for number, document in enumerate(tqdm(iterate_documents(documents), desc="corpus.jsonl", unit="passage")):
        source = document.key[0]
        name = source if source and taken.add(source) else f"{source}#{number}"
        if names.get(document.key) == "":
            names[document.key] = name
        title = str(document.metadata.get("title") or "")
        counts["corpus.jsonl"] += 1
        yield {"_id": name, "title": title, "text": document.page_content, "metadata": {}}


# ---------------------------------------------------------------- MS MARCO's passage ranking


def _msmarco_corpus(folder: Path) -> Iterator[tuple[str, Document]]:
    for where, fields in read_table(_either(folder / "collection.tsv")):
        identifier, text = _two(where, fields)
        yield identifier, Document(text, {"source": identifier, "title": ""})


def _msmarco_queries(folder: Path, split: str) -> Iterator[tuple[str, str]]:
    yield from (_two(*line) for line in read_table(_either(folder / f"queries.{split}.tsv")))


def _two(where: str, fields: list[str]) -> tuple[str, str]:
    if len(fields) != 2 or not fields[1].strip():
        raise UserError(f"{where}: expected an identifier and a text with a tab between them")
    return fields[0], fields[1]


def _splits(paths: Iterable[Path], prefix: str) -> dict[str, Path]:
    """Files by what their names have between prefix and ending."""
    return {path.name.removeprefix(prefix).removesuffix(".gz").removesuffix(".tsv"): path for path in sorted(paths)}


JUDGED = {
    "beir": JudgedFormat(_beir_corpus, _beir_queries, lambda folder: _splits(folder.glob("qrels/*.tsv*"), "")),
    "msmarco_passages": JudgedFormat(
        _msmarco_corpus, _msmarco_queries, lambda folder: _splits(folder.glob("qrels.*.tsv*"), "qrels.")
    ),
}


READABLE = sorted([*FORMATS, *JUDGED])
WRITABLE = sorted([*FORMATS, "beir"])


@dataclass
class Conversion:
    """Reads one layout and writes ours into a directory.

    Attributes:
        no_answer: The gold answer of unanswerable questions; empty: they are left out.
        counts: How many passages, and questions of each split, were written, and what was left out.
    """

    layout: str
    directory: Path
    no_answer: str = ""
    counts: Counter[str] = field(default_factory=Counter)

    def run(self, paths: Sequence[Path]) -> None:
        """Write `documents.jsonl` and, for each split, `SPLIT_w_qa.jsonl`, or `SPLIT_w_q.jsonl` if it has no answers.

        Raises:
            UserError: a file is malformed, or holds nothing.
        """
        answers = self.layout in FORMATS and FORMATS[self.layout].answers
        with _Files(self.directory) as files:
            seen = Seen()
            for item in tqdm(self._items(paths), desc="convert", unit="row"):
                if isinstance(item, Document):
                    if seen.add(*item.key):
                        files.write("documents.jsonl", item.to_json())
                        self.counts["passages"] += 1
                    else:
                        self.counts["repeated passages left out"] += 1
                    continue
                split, example = item
                if example.gold_answer == "" and not self.no_answer:
                    self.counts["unanswerable questions left out"] += 1
                    continue
                if example.gold_answer == "":
                    example = replace(example, gold_answer=self.no_answer)
                files.write(f"{split}_w_qa.jsonl" if answers else f"{split}_w_q.jsonl", example.to_json())
                self.counts[f"questions of {split}"] += 1
            if not self.counts:
                raise UserError(f"{paths[0]}: holds no rows")

    def _items(self, paths: Sequence[Path]) -> Iterator[Document | tuple[str, Example]]:
        if self.layout in JUDGED:
            for path in paths:
                yield from read_judged(JUDGED[self.layout], path)
            return
        layout = FORMATS[self.layout]
        stems = Counter(_stem(path) for path in paths)
        if stems and max(stems.values()) > 1:
            raise UserError(f"--input_path: two files are called {stems.most_common(1)[0][0]}, which names the split")
        for path in paths:
            for row in read_rows(path, layout.key):
                for item in layout.read(row):
                    yield item if isinstance(item, Document) else (_stem(path), item)


def write_layout(
    layout: str, directory: Path, documents: Path | None, splits: dict[str, Path], no_answer: str
) -> dict[str, int]:
    """Write our files in another layout.

    Args:
        documents: The database, for layouts with a corpus of their own.
        splits: Files of examples by what the layout is to call them.
        no_answer: The gold answer that marks unanswerable questions.

    Returns:
        The rows of each file.

    Raises:
        UserError: a file is malformed, or the layout needs a database and none is given.
    """
    if layout == "beir":
        if documents is None:
            raise UserError("--document_path: BEIR needs the whole corpus; name it")
        return write_beir(directory, documents, splits)
    chosen, counts = FORMATS[layout], {}
    if documents is not None and chosen.document is not None:
        rows = (chosen.document(document) for document in iterate_documents(documents))
        counts["corpus.jsonl"] = _write_rows(directory / "corpus.jsonl", rows, None)
    for split, path in splits.items():
        examples = (_unmarked(example, no_answer) for example in iterate_examples(path))
        name = f"{split}.jsonl" if chosen.around is None else f"{split}.json"
        counts[name] = _write_rows(directory / name, chosen.write(examples), chosen.around)
    return counts


def _unmarked(example: Example, no_answer: str) -> Example:
    return replace(example, gold_answer="") if no_answer and example.gold_answer == no_answer else example


def _write_rows(path: Path, rows: Iterable[dict[str, Any]], around: tuple[str, str] | None) -> int:
    """One row a line; a JSON array has commas between them. Returns how many there are."""
    before, behind = around or ("", "")
    count = 0
    with atomic_file(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.write(before + ("\n" if around else ""))
        for count, row in enumerate(tqdm(rows, desc=path.name, unit="row"), start=1):
            line_end = ",\n" if around else "\n"
            file.write((line_end if count > 1 else "") + json.dumps(row, ensure_ascii=False))
        file.write("\n" + behind + ("\n" if around else ""))
    return count


def _stem(path: Path) -> str:
    return path.name.removesuffix(".gz").rpartition(".")[0] or path.name


class _Files:
    """JSONL files of one directory, all of them written or none."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._stack = ExitStack()
        self._open: dict[str, IO[str]] = {}

    def __enter__(self) -> "_Files":
        self._stack.__enter__()
        return self

    def __exit__(self, *error: Any) -> bool | None:
        return self._stack.__exit__(*error)

    def write(self, name: str, row: dict[str, Any]) -> None:
        if name not in self._open:
            temporary = self._stack.enter_context(atomic_file(self.directory / name))
            self._open[name] = self._stack.enter_context(temporary.open("w", encoding="utf-8"))
        self._open[name].write(json.dumps(row, ensure_ascii=False) + "\n")
