"""Sources of passages: text, Markdown, HTML, PDF and JSONL files, read as source, title and text."""

import io
import logging
import os
import re
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import regex

from rqa.runtime.errors import UserError, one_line
from rqa.runtime.files import read_jsonl
from rqa.runtime.text import clean_text

HEADING = re.compile(r"^#{1,6}[ \t]++(\S(?:.{0,248}?[^ \t\r\n])??)(?:[ \t]++#*+)?+[ \t\r]*+$", re.MULTILINE)
_TITLE = re.compile(rf"\A\s*(?=#[ \t]){HEADING.pattern}", re.MULTILINE)
LONGEST_TITLE = 250  # characters, as in headings; every passage repeats the title
_NO_TEXT = re.compile(  # control characters, white space after the first 100 characters of it, embedded images
    r"[\x00-\x08\x0b\x0e-\x1f\x7f]|\s(?<=\s{101})\s*(?=\s)"
    r"|data:[\w.+-]{1,60}/[\w.+-]{1,90}(?:;[\w.=+-]{1,90})*,[\w+/=%.*~-]{50,}(?:\s[\w+/=%-]{40,})*",
    re.ASCII,
)
_SPLIT_WORD = regex.compile(r"(?<=\p{Ll})[-\u2010][ \t]*\n[ \t]*(?=\p{Ll})|\u00ad\n?")


@dataclass(frozen=True)
class Source:
    source: str  # a path or a URL
    title: str  # the text's own title, or its file's name
    text: str
    where: str  # file (and line, for JSONL) for messages
    metadata: dict[str, Any] = field(default_factory=dict)  # other fields of the file, which passages inherit
    markdown: bool = True  # whether a line that begins with # is a heading


class Unreadable(Exception):
    """A file that cannot be turned into text; the message says why."""


def find_files(path: str | Path) -> tuple[list[Path], list[Path]]:
    """The file, or a folder's files in order without hidden ones. -> readable files, files of other kinds"""
    path = Path(path)
    if not path.is_dir() and not path.is_file():
        raise UserError(f"{path}: no such file or folder")
    found = [path]
    if path.is_dir():
        found = sorted(Path(folder, name) for folder, _, names in os.walk(path) for name in names)
        found = [file for file in found if not any(part.startswith(".") for part in file.relative_to(path).parts)]
    files = [file for file in found if _ending(file)]
    if not files:
        problem = "holds no file that ends" if path.is_dir() else "cannot be read; name files that end"
        raise UserError(f"{path}: {problem} in {', '.join(READERS)}")
    return files, [file for file in found if not _ending(file)]


def _ending(file: Path) -> str:
    return next(filter(file.name.lower().endswith, READERS), "")


def read_sources(file: Path, name: str) -> Iterator[Source]:
    """Yield the texts of one file, whose source is `name`: one per line of JSONL, one of any other file."""
    if not file.is_file():  # a pipe may never end
        raise Unreadable("is not a regular file")
    try:
        for source in READERS[_ending(file)](file, clean_text(name)):
            yield replace(source, title=clean_text(source.title), text=_NO_TEXT.sub("", clean_text(source.text)))
    except UserError:
        raise
    except ModuleNotFoundError as error:
        raise UserError(f'{file}: reading it needs {error.name}; pip install "rqa[documents]"') from None
    except Exception as error:  # damaged PDFs raise all kinds of exceptions
        kind = "UTF-8 text" if isinstance(error, UnicodeDecodeError) else f"a readable {file.suffix[1:].upper()}"
        raise Unreadable(f"not {kind} ({one_line(error) or type(error).__name__})") from None


def _read_text(file: Path, name: str) -> Iterator[Source]:
    data = file.read_bytes()
    text = data.decode("utf-16" if data.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig").replace("\r\n", "\n")
    title = _TITLE.match(text)
    yield Source(name, title[1] if title else file.stem, text, str(file))


def _read_html(file: Path, name: str) -> Iterator[Source]:
    import trafilatura

    logging.getLogger("trafilatura").setLevel(logging.CRITICAL)  # unreadable files are reported by the caller
    page = trafilatura.load_html(file.read_bytes())
    found = [] if page is None else page.xpath("(//title)[1] | (//h1)[1]")
    titles = list(filter(None, (" ".join(each.text_content().split()) for each in found))) or [file.stem]
    title = min(filter(titles[0].startswith, titles), key=len)  # heading "Arlen" rather than title "Arlen | Guide"
    text = trafilatura.extract(page, output_format="markdown", favor_recall=True, include_comments=False)
    yield Source(name, title[:LONGEST_TITLE], text or "", str(file))


def _read_pdf(file: Path, name: str) -> Iterator[Source]:
    import pypdf

    logging.getLogger("pypdf").setLevel(logging.CRITICAL)
    reader = pypdf.PdfReader(io.BytesIO(file.read_bytes()))
    text = unicodedata.normalize("NFKC", "\n\n".join(page.extract_text() for page in reader.pages))  # no ligatures
    title = str((reader.metadata and reader.metadata.title) or file.stem)
    yield Source(name, title[:LONGEST_TITLE], _SPLIT_WORD.sub("", text), str(file), markdown=False)


def _read_rows(file: Path, name: str) -> Iterator[Source]:
    for line, row in read_jsonl(file):
        source, title, text = row.pop("source", ""), row.pop("title", ""), row.pop("text", None)
        for key, value in (("source", source), ("title", title), ("text", text)):
            if not isinstance(value, str):
                raise UserError(f"{file}:{line}: field '{key}' must be a string")
        yield Source(source or f"{name}:{line}", title, text, f"{file}:{line}", row)


READERS: dict[str, Callable[[Path, str], Iterator[Source]]] = {
    **dict.fromkeys((".txt", ".md", ".markdown", ".rst"), _read_text),
    **dict.fromkeys((".html", ".htm"), _read_html),
    ".pdf": _read_pdf,
    **dict.fromkeys((".jsonl", ".jsonl.gz"), _read_rows),
}
