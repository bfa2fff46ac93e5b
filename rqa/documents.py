"""The document database: a file that may be larger than memory, with a table of where each document is."""

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
HEADER = 256  # bytes before a table's rows: which file they describe, and in which state
TABLE = "rqa documents 1"
BIG = 2**26  # bytes that take some seconds to read


class DocumentFile(Sequence[Document]):
    """The documents of a database, each read when it is asked for; of equal ones the first.

    What is not plain JSONL is unpacked to the cache. Where the documents lie, and their fingerprints, are in a table
    beside the file (in the cache, where nothing can be written there), which is made anew when the file has changed.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        with reading(path):  # errors name the path that was given
            state = os.stat(path)
        # A copied or touched file may have the former size and time of writing, but no former time of change.
        about = {"rqa": TABLE, "bytes": state.st_size, "changed": state.st_ctime_ns, "inode": state.st_ino}
        real = Path(os.path.realpath(path))
        cached = cache_root() / "documents" / fingerprint(str(real), self.path.suffix)
        plain = self.path.suffix not in (".gz", ".pkl", ".pickle")
        content = self.path if plain else cached.with_suffix(".jsonl")
        tables = [real.with_name(f"{real.name}.table")] * plain + [cached.with_suffix(".table")]
        known = [table for table in tables if content.exists() and _header(table) == about]
        beside = os.access(real.parent, os.W_OK) and (not tables[0].exists() or bool(_header(tables[0])))
        self._table = known[0] if known else tables[0 if beside else -1]
        if not known:
            if not plain:
                _unpack(self.path, content)
            _scan(content, self.path, self._table, about)
        rows = np.asarray(np.memmap(self._table, ROW, "r", HEADER))  # an element of a memmap takes thrice as long
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
        except (ValueError, OSError, OverflowError, MemoryError, UserError):  # as damage of the table has it
            document = None
        if document is None or prints([PARTS["passages"](document)])[0] != self.passages[position]:
            with suppress(OSError):  # whatever is wrong with the table, the next one is right
                self._table.unlink()
            raise UserError(f"{self.path}: has changed since it was opened, or its table is damaged; start again")
        return document

    def __reduce__(self) -> tuple[type, tuple[Path]]:
        return DocumentFile, (self.path,)  # a copy, in whatever process, opens the file itself


def read_documents(path: str | Path) -> DocumentFile:
    """Open a document database: `.jsonl`, `.jsonl.gz`, or LocalRQA's `.pkl`. Repeated documents count once.

    Every process calls it: one makes the table of what is where, and the others wait for that.
    """
    documents = DocumentFile(path) if distributed.is_main() else None
    distributed.barrier()
    return documents or DocumentFile(path)


def iterate_documents(path: str | Path) -> Iterator[Document]:
    """Yield each document of a database, repeated ones too; of a `.jsonl`, one is in memory at a time."""
    if Path(path).suffix in (".pkl", ".pickle"):
        yield from _read_pickle(Path(path))
    else:
        yield from (parse_document(row, f"{path}:{line}") for line, row in read_jsonl(path))


def write_documents(path: str | Path, documents: Iterable[Document]) -> None:
    """Write a document database as JSONL, atomically."""
    write_jsonl(path, (document.to_json() for document in documents))


class Places:
    """Where fingerprints stand among others, without an object for each."""

    def __init__(self, prints: Prints) -> None:
        self._order = np.argsort(prints, kind="stable")
        self._sorted = np.asarray(prints)[self._order]

    def __call__(self, wanted: Prints) -> np.ndarray:
        """The first place of each, -1 where there is none. S16 [n] -> int64 [n]"""
        if not len(self._order):
            return np.full(len(wanted), -1)
        at = np.searchsorted(self._sorted, wanted).clip(max=len(self._order) - 1)
        return np.where(self._sorted[at] == wanted, self._order[at], -1)


def gold_places(examples: Sequence[Example], documents: Sequence[Document]) -> list[set[int]]:
    """Where the gold passages of each example stand in the database, which may lack some. [Q] sets"""
    places = Places(keys_of(documents))
    return [{*places(keys_of(example.gold_docs)).tolist()} - {-1} for example in examples]


def prints(texts: Iterable[Sequence[str]]) -> Prints:
    """A fingerprint of each sequence of texts. [N]"""
    return np.fromiter((_print(*each) for each in texts), PRINT)


def _prints_of(kind: str, documents: Sequence[Document]) -> Prints:
    """Fingerprints of a part of each document; a file has them in its table. [N]"""
    known = getattr(documents, kind, None)
    return prints(map(PARTS[kind], documents)) if known is None else known


keys_of, passages_of, normalized_of = (partial(_prints_of, kind) for kind in PARTS)


def _print(*parts: str) -> bytes:
    return bytes.fromhex(fingerprint(*parts)[:32])


def _header(table: Path) -> dict[str, Any]:
    """Of which file, and of which state of it, this table is; empty if it is none of ours."""
    try:
        with reading(table) as file:
            header = json.loads(file.read(HEADER))
        whole = table.stat().st_size == HEADER + header.pop("documents", 0) * ROW.itemsize
        return {} if header.get("rqa") != TABLE else header if whole else {"rqa": TABLE}
    except (UserError, ValueError, TypeError, AttributeError):  # absent, or what somebody else wrote
        return {}


def _scan(content: Path, name: Path, table: Path, about: dict[str, Any]) -> None:
    """Write a row for each distinct document; a malformed line is refused by the name of the file that was given."""
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
    """The examples, each gold passage that the database lacks replaced by its passage with the same text.

    Others stay, and no retriever finds them; one warning counts both.
    """
    golds = [gold for example in examples for gold in example.gold_docs]
    there = Places(keys_of(documents))(keys_of(golds)) >= 0
    missing = {gold.key: gold for gold, known in zip(golds, there, strict=True) if not known}
    if not missing:
        return examples
    places = Places(normalized_of(documents))(normalized_of(list(missing.values()))).tolist()
    same = {key: documents[place] for key, place in zip(missing, places, strict=True) if place >= 0}
    lost = [key for key in missing if key not in same]
    named = " and ".join(f"{source!r}: {text[:60]!r}" for source, text in (lost or list(missing))[:2])
    told = "%s: %d gold passages are not in the database with the same 'metadata.source' and text, such as %s; %d are "
    told += "there with the same text, which counts as found; %d are not, and can never be found"
    file = examples[0].where.rpartition(":")[0]
    log.warning(told, file, len(missing), named, len(missing) - len(lost), len(lost))
    return [
        replace(example, gold_docs=tuple(same.get(gold.key, gold).graded(gold.gain) for gold in example.gold_docs))
        for example in examples
    ]


class _PickledDocument(dict):
    """The fields of a pickled document, whatever library's class it was."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.update(state.get("__dict__", state))  # pydantic keeps them one level down


class _DocumentUnpickler(pickle.Unpickler):
    """Builds documents, dicts, lists, sets, strings and numbers; refuses every other class by name."""

    def find_class(self, module: str, name: str) -> type:
        if name == "Document" and module.partition(".")[0] in ("local_rqa", "langchain", "langchain_core"):
            return _PickledDocument
        if module in ("builtins", "__builtin__") and name == "set":  # as protocols 2 and 3 write them
            return set
        raise UserError(f"refers to {module}.{name}; only documents, dicts, lists, sets, strings and numbers are read")


def _read_pickle(path: Path) -> list[Document]:
    with reading(path) as file:
        try:
            size = path.stat().st_size
            # The unpickler makes room for whatever number a damaged file gives to an object, be it billions.
            for opcode, number, _ in pickletools.genops(file):
                if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and (number or 0) > size:
                    raise UserError(f"not a readable pickle (it numbers an object {number})")
            file.seek(0)
            # What JSON has no form for, such as bytes, becomes null, and a set a list.
            values = _DocumentUnpickler(file).load()
            text = json.dumps(values, default=lambda v: sorted(v, key=str) if isinstance(v, set) else None)
            return [parse_document(row, f"item {number}") for number, row in enumerate(parse_json(text, list), start=1)]
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        except Exception as error:  # a damaged pickle raises nearly anything
            raise UserError(f"{path}: not a readable pickle ({type(error).__name__}: {one_line(error)})") from None
