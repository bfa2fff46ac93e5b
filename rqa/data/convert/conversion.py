"""From another layout to ours and back, a row in memory at a time."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

from rqa.data.convert.formats import FORMATS, JUDGED
from rqa.data.convert.judged import read_judged, write_beir
from rqa.data.convert.reading import read_rows
from rqa.data.documents import Document, iterate_documents
from rqa.data.duplicates import Seen
from rqa.data.examples import Example, iterate_examples
from rqa.runtime.errors import UserError
from rqa.runtime.files import atomic_file

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
