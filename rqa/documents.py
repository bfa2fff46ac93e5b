"""The document database: a file that may be larger than memory, with a table of document positions."""

import json
import logging
import os
import pickle
import pickletools
import shutil
import struct
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from rqa.data import Document, Example, normalize, parse_document
from rqa.runtime import distributed
from rqa.runtime.cli import progress
from rqa.runtime.errors import UserError, one_line
from rqa.runtime.files import atomic_file, cache_root, fingerprint, jsonl_rows, read_jsonl, reading, write_jsonl
from rqa.runtime.text import parse_json

log = logging.getLogger(__name__)

Prints = np.ndarray  # fingerprints of 16 bytes. [N]
PRINT = np.dtype("S16")
PARTS: dict[str, Callable[[Document], Sequence[str]]] = {
    "keys": lambda document: document.key,  # the same document
    "passages": lambda document: (*document.key, document.fmt_content),  # formatted alike, too
    "normalized": lambda document: (normalize(document.page_content),),  # the same words, whatever the source
}
ROW = np.dtype([("start", "<i8"), ("size", "<i8"), *((kind, PRINT) for kind in PARTS)])
HEADER = 256  # bytes before a table's rows, which identify the file and its state
TABLE = "rqa documents 1"
BIG = 2**26  # bytes from which a progress bar is shown


class DocumentFile(Sequence[Document]):
    """The distinct documents of a database, each read from disk on access.

    Files that are not plain JSONL are unpacked to the cache. Positions and fingerprints of documents are in a table
    beside the file, or in the cache if that directory is not writable; it is rebuilt when the file has changed.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        with reading(path):  # errors show the given path
            state = os.stat(path)
        # A replaced file may have the same size and mtime, but not the same ctime.
        about = {"rqa": TABLE, "bytes": state.st_size, "changed": state.st_ctime_ns, "inode": state.st_ino}
        real = Path(os.path.realpath(path))
        cached = cache_root() / "documents" / fingerprint(str(real), self.path.suffix)
        plain = self.path.suffix not in (".gz", ".pkl", ".pickle")
        content = self.path if plain else cached.with_suffix(".jsonl")
        tables = [real.with_name(f"{real.name}.table")] * plain + [cached.with_suffix(".table")]
        known = [table for table in tables if content.exists() and _header(table) == about]
        writable = os.access(real.parent, os.W_OK) and (not tables[0].exists() or bool(_header(tables[0])))
        self._table = known[0] if known else tables[0 if writable else -1]
        if not known:
            if not plain:
                _unpack(self.path, content)
            _scan(content, self.path, self._table, about)
        rows = np.asarray(np.memmap(self._table, ROW, "r", HEADER))  # indexing a memmap takes three times as long
        self._starts, self._sizes, self.keys, self.passages, self.normalized = (rows[name] for name in ROW.names or ())
        self._descriptor = os.open(content, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, position: Any) -> Any:
        if isinstance(position, slice):
            return [self[each] for each in range(*position.indices(len(self)))]
        size, start = int(self._sizes[position]), int(self._starts[position])
        try:
            document = parse_document(parse_json(os.pread(self._descriptor, size, start)), str(self.path))
        except (ValueError, OSError, OverflowError, MemoryError, UserError):  # from a damaged table
            document = None
        if document is None or prints([PARTS["passages"](document)])[0] != self.passages[position]:
            with suppress(OSError):  # the next run makes a new table
                self._table.unlink()
            raise UserError(f"{self.path}: has changed since it was opened, or its table is damaged; start again")
        return document

    def __reduce__(self) -> tuple[type, tuple[Path]]:
        return DocumentFile, (self.path,)  # a copy in another process reopens the file


def read_documents(path: str | Path) -> DocumentFile:
    """Open a document database: `.jsonl`, `.jsonl.gz`, or LocalRQA's `.pkl`. Repeated documents count once.

    Every process calls this; the main process makes the table while the others wait.
    """
    documents = DocumentFile(path) if distributed.is_main() else None
    distributed.barrier()
    return documents or DocumentFile(path)


def iterate_documents(path: str | Path) -> Iterator[Document]:
    """Yield each document of a database, including repeated ones; a `.jsonl` is read line by line."""
    if Path(path).suffix in (".pkl", ".pickle"):
        yield from _read_pickle(Path(path))
    else:
        yield from (parse_document(row, f"{path}:{line}") for line, row in read_jsonl(path))


def write_documents(path: str | Path, documents: Iterable[Document]) -> None:
    """Write a document database as JSONL, atomically."""
    write_jsonl(path, (document.to_json() for document in documents))


class Places:
    """Looks up the positions of fingerprints, without a Python object for each."""

    def __init__(self, prints: Prints) -> None:
        self._order = np.argsort(prints, kind="stable")
        self._sorted = np.asarray(prints)[self._order]

    def __call__(self, wanted: Prints) -> np.ndarray:
        """The first position of each, or -1. S16 [n] -> int64 [n]"""
        if not len(self._order):
            return np.full(len(wanted), -1)
        at = np.searchsorted(self._sorted, wanted).clip(max=len(self._order) - 1)
        return np.where(self._sorted[at] == wanted, self._order[at], -1)


def gold_places(examples: Sequence[Example], documents: Sequence[Document]) -> list[set[int]]:
    """The positions of each example's gold passages in the database, without those that it lacks. [Q] sets"""
    places = Places(keys_of(documents))
    return [{*places(keys_of(example.gold_docs)).tolist()} - {-1} for example in examples]


def prints(texts: Iterable[Sequence[str]]) -> Prints:
    """A fingerprint of each sequence of texts. [N]"""
    return np.fromiter((bytes.fromhex(fingerprint(*each)[:32]) for each in texts), PRINT)


def _prints_of(kind: str, documents: Sequence[Document]) -> Prints:
    """Fingerprints of one kind of each document, taken from the table of a `DocumentFile`. [N]"""
    known = getattr(documents, kind, None)
    return prints(map(PARTS[kind], documents)) if known is None else known


keys_of, passages_of, normalized_of = (partial(_prints_of, kind) for kind in PARTS)


def _header(table: Path) -> dict[str, Any]:
    """The file and state that a table describes; empty if it is not our table."""
    try:
        with reading(table) as file:
            header = json.loads(file.read(HEADER))
        whole = table.stat().st_size == HEADER + header.pop("documents", 0) * ROW.itemsize
        return {} if header.get("rqa") != TABLE else header if whole else {"rqa": TABLE}
    except (UserError, ValueError, TypeError, AttributeError):  # absent, or another program's file
        return {}


def _scan(content: Path, name: Path, table: Path, about: dict[str, Any]) -> None:
    """Write a row for each distinct document; errors in a line show `name`, the given path."""
    lines = progress(jsonl_rows(content, name), desc=name.name, unit="document", disable=content.stat().st_size < BIG)
    with atomic_file(table) as temporary, temporary.open("w+b") as file:
        file.seek(HEADER)
        for number, start, size, value in lines:
            document = parse_document(value, f"{name}:{number}")
            file.write(struct.pack("<qq", start, size) + prints(part(document) for part in PARTS.values()).tobytes())
        file.flush()
        if file.tell() == HEADER:
            raise UserError(f"{name}: holds no documents")
        rows = np.memmap(file, ROW, "r+", HEADER)
        first = np.sort(np.unique(rows["keys"], return_index=True)[1])
        if len(first) < len(rows):
            rows[: len(first)] = rows[first]
        file.truncate(HEADER + len(first) * ROW.itemsize)
        file.seek(0)
        file.write(json.dumps(about | {"documents": len(first)}).encode().ljust(HEADER))


def _unpack(path: Path, content: Path) -> None:
    if path.suffix == ".gz":
        with reading(path) as packed, atomic_file(content) as temporary, temporary.open("wb") as file:
            shutil.copyfileobj(packed, file)
    else:
        write_documents(content, _read_pickle(path))


def with_known_gold(examples: list[Example], documents: Sequence[Document]) -> list[Example]:
    """The examples, with gold passages that the database lacks replaced by its passages of the same text.

    Others are kept, though no retriever can find them; one warning counts both.
    """
    golds = [gold for example in examples for gold in example.gold_docs]
    there = Places(keys_of(documents))(keys_of(golds)) >= 0
    missing = {gold.key: gold for gold, known in zip(golds, there, strict=True) if not known}
    if not missing:
        return examples
    places = Places(normalized_of(documents))(normalized_of(list(missing.values()))).tolist()
    same = {key: documents[place] for key, place in zip(missing, places, strict=True) if place >= 0}
    lost = [key for key in missing if key not in same]
    sample = " and ".join(f"{source!r}: {text[:60]!r}" for source, text in (lost or list(missing))[:2])
    message = "%s: %d gold passages are not in the database with the same 'metadata.source' and text, such as %s; "
    message += "%d are there with the same text, which counts as found; %d are not, and can never be found"
    file = examples[0].where.rpartition(":")[0]
    log.warning(message, file, len(missing), sample, len(missing) - len(lost), len(lost))
    return [
        replace(example, gold_docs=tuple(same.get(gold.key, gold).graded(gold.gain) for gold in example.gold_docs))
        for example in examples
    ]


class _PickledDocument(dict):
    """The fields of a pickled document of any library's class."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.update(state.get("__dict__", state))  # pydantic keeps them one level down


class _DocumentUnpickler(pickle.Unpickler):
    """Builds documents, dicts, lists, sets, strings and numbers; rejects any other class by name."""

    def find_class(self, module: str, name: str) -> type:
        if name == "Document" and module.partition(".")[0] in ("local_rqa", "langchain", "langchain_core"):
            return _PickledDocument
        if module in ("builtins", "__builtin__") and name == "set":  # in protocols 2 and 3
            return set
        raise UserError(f"refers to {module}.{name}; only documents, dicts, lists, sets, strings and numbers are read")


def _read_pickle(path: Path) -> list[Document]:
    with reading(path) as file:
        try:
            size = path.stat().st_size
            # The unpickler allocates memory by the object numbers in the file; a damaged one may reach billions.
            for opcode, number, _ in pickletools.genops(file):
                if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and (number or 0) > size:
                    raise UserError(f"not a readable pickle (it numbers an object {number})")
            file.seek(0)
            # Values that JSON lacks, such as bytes, become null; sets become lists.
            values = _DocumentUnpickler(file).load()
            text = json.dumps(values, default=lambda v: sorted(v, key=str) if isinstance(v, set) else None)
            return [parse_document(row, f"item {number}") for number, row in enumerate(parse_json(text, list), start=1)]
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        except Exception as error:  # a damaged pickle raises nearly anything
            raise UserError(f"{path}: not a readable pickle ({type(error).__name__}: {one_line(error)})") from None
