"""What passages are cut from: text, Markdown, HTML and PDF files, and JSONL, as source, title and text."""

import importlib.util
import io
import logging
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rqa.runtime.errors import UserError, one_line
from rqa.runtime.files import read_jsonl

_TITLE = re.compile(r"\A\s*#[ \t]+(.+?)[ \t#]*$", re.MULTILINE)


@dataclass(frozen=True)
class Source:
    source: str  # a path or an address
    title: str  # the text's own, else its file's name
    text: str  # with headings as Markdown has them
    where: str  # file, and line of a JSONL file, for messages
    metadata: dict[str, Any] = field(default_factory=dict)  # whatever else the file had; passages inherit it


class Unreadable(Exception):
    """A file that cannot be turned into text; the message says why."""


def find_files(path: str | Path) -> tuple[list[Path], list[Path]]:
    """The file, or a folder's files in order: those that can be read, and those of other kinds; no hidden ones."""
    path = Path(path)
    if not path.is_dir() and not path.is_file():
        raise UserError(f"{path}: no such file or folder")
    found = [path]
    if path.is_dir():
        found = sorted(Path(folder, name) for folder, _, names in os.walk(path) for name in names)
        found = [file for file in found if not any(part.startswith(".") for part in file.relative_to(path).parts)]
    files = [file for file in found if file.suffix.lower() in READERS]
    if not files:
        wrong = "holds no file that ends" if path.is_dir() else "cannot be read; write files that end"
        raise UserError(f"{path}: {wrong} in {', '.join(READERS)}")
    for file in files:
        package = PACKAGES.get(file.suffix.lower())
        if package and importlib.util.find_spec(package) is None:
            raise UserError(f'{file}: reading it needs {package}; pip install "rqa[documents]"')
    return files, [file for file in found if file.suffix.lower() not in READERS]


def read_sources(file: Path, name: str) -> Iterator[Source]:
    """The texts of one file, which passages call `name`. A JSONL file has one a line, and any other file one."""
    return READERS[file.suffix.lower()](file, name)


def _read_text(file: Path, name: str) -> Iterator[Source]:
    data = _bytes(file)
    encoding = "utf-16" if data.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"
    try:
        text = data.decode(encoding).replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise Unreadable(f"not UTF-8 text ({error.reason} at byte {error.start})") from None
    title = _TITLE.match(text)
    yield Source(name, title[1] if title else file.stem, text, str(file))


def _read_html(file: Path, name: str) -> Iterator[Source]:
    import trafilatura

    logging.getLogger("trafilatura").setLevel(logging.CRITICAL)  # what it cannot read is said here
    data = _bytes(file)
    text = trafilatura.extract(data, output_format="markdown", favor_recall=True, include_comments=False)
    about = trafilatura.extract_metadata(data) if text else None
    yield Source(name, (about and about.title) or file.stem, text or "", str(file))


def _read_pdf(file: Path, name: str) -> Iterator[Source]:
    import pypdf

    logging.getLogger("pypdf").setLevel(logging.CRITICAL)
    data = _bytes(file)
    try:
        reader = pypdf.PdfReader(io.BytesIO(data))
        pages = [page.extract_text() for page in reader.pages]
        title = (reader.metadata and reader.metadata.title) or file.stem
    except Exception as error:  # a damaged PDF raises nearly anything
        raise Unreadable(f"not a readable PDF ({one_line(error) or type(error).__name__})") from None
    yield Source(name, str(title), "\n\n".join(pages), str(file))


def _read_rows(file: Path, name: str) -> Iterator[Source]:
    for line, row in read_jsonl(file):
        for key in ("source", "title", "text"):
            if not isinstance(row.get(key, None if key == "text" else ""), str):
                raise UserError(f"{file}:{line}: field '{key}' must be a string")
        rest = {key: value for key, value in row.items() if key not in ("source", "title", "text")}
        where = f"{file}:{line}"
        yield Source(row.get("source") or f"{name}:{line}", row.get("title", ""), row["text"], where, rest)


def _bytes(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise Unreadable(error.strerror or str(error)) from None


READERS: dict[str, Callable[[Path, str], Iterator[Source]]] = {
    **dict.fromkeys((".txt", ".md", ".markdown", ".rst"), _read_text),
    **dict.fromkeys((".html", ".htm"), _read_html),
    ".pdf": _read_pdf,
    ".jsonl": _read_rows,
}
PACKAGES = {".html": "trafilatura", ".htm": "trafilatura", ".pdf": "pypdf"}  # what the extra `documents` installs
