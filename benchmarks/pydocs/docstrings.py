"""Parse a docstring: sections and entries of numpy's and Google's styles, as clean one-line paragraphs."""

import inspect
import re
import textwrap
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from itertools import dropwhile
from typing import TypeVar

T = TypeVar("T")

PROSE = ""
SECTIONS = {
    "args": "parameters",
    "arguments": "parameters",
    "params": "parameters",
    "other parameters": "parameters",
    "keyword args": "parameters",
    "keyword arguments": "parameters",
    "parameters for training": "parameters",
    "return": "returns",
    "yields": "returns",
    "raise": "raises",
    "warns": "raises",
    "seealso": "see also",
    "example": "examples",
    "for example": "examples",
    "usage": "examples",
}
ENTRY_SECTIONS = {"parameters", "returns", "raises", "see also", "attributes", "methods"}
KEPT_DIRECTIVES = {"note", "warning", "tip", "important", "attention", "caution", "hint", "admonition"}

_UNDERLINE = re.compile(r"([-=~])\1{2,}\s*$")
_GOOGLE_HEADING = re.compile(r"([A-Z][\w ]{1,30}?)\s*::?\s*$")
_GOOGLE_ENTRY = re.compile(r"(?P<name>[`*]*[\w.]+`*)\s*(?P<type>\(.*?\))?\s*:(?:\s+(?P<rest>.*)|$)")
_DIRECTIVE = re.compile(r"(\s*)\.\. ([\w-]+)::\s*(.*)")
_SIGNATURE = re.compile(r"(?:[\w.]+\.)?(\w+)\(.*(?:\)|-> ?[^.]*)\s*$")
_SENTENCE_END = re.compile(r"(?<=[.!?])(?<!e\.g\.)(?<!i\.e\.)(?<!cf\.)(?<!etc\.)(?<!vs\.)\s+(?=[A-Z`*'\"(\[])")
_MARKUP = (
    (re.compile(r":(?:[\w-]+:)+`~?([^`<]+?)(?:\s*<[^>`]*>)?`"), r"`\1`"),  # a role and its target
    (re.compile(r"``([^`]+)``"), r"`\1`"),
    (re.compile(r"\[(`[^`]+`)\](?:\([^)]*\))?"), r"\1"),  # transformers' link to an object
    (re.compile(r"`~(?=\w)"), "`"),
    (re.compile(r"`([^`<]+?)\s*<[^>`]*>`_+"), r"\1"),
    (re.compile(r"(?<=`)_+(?!\w)"), ""),
    (re.compile(r"</?Tip[^>]*>|\[\d+\]_|\|version\|"), ""),
    (re.compile(r"(?<![\w*])\*{1,2}(\w[\w -]*)\*{1,2}(?![\w*])"), r"\1"),
    (re.compile(r"[-=~]{3,}"), ""),  # the rules of a table
    (re.compile(r"::\s*$"), ":"),
    (re.compile(r"\\ (?=\w)"), ""),
    (re.compile(r"\\ |\s+"), " "),
)


@dataclass(frozen=True)
class Block:
    """A part of a docstring that stays in one passage: a paragraph, or one entry of a section."""

    section: str  # "parameters", "returns", "raises", "see also", another heading in lower case, or `PROSE`
    name: str  # the entry's name, or several separated by commas; empty for a paragraph
    kind: str  # the entry's type; empty if it has none
    description: str  # the text of the paragraph or entry, on one line

    @property
    def text(self) -> str:
        header = f"{self.name} ({self.kind})" if self.name and self.kind else self.name or self.kind
        return ": ".join(filter(None, (header, self.description)))


def parse(docstring: str, names: Collection[str] = ()) -> list[Block]:
    """Split a docstring into blocks, in order; code, doctests and formulas are left out.

    `names` are those of the object: leading lines that only repeat its signature are left out.
    """
    text = re.sub(r"```.*?(```|\Z)", "", inspect.cleandoc(docstring), flags=re.DOTALL)
    lines = _without_signature(_without_directives(text.splitlines()), names)
    return [
        block
        for section, google, body in _sections(lines)
        for block in (_entries if section in ENTRY_SECTIONS else _paragraphs)(section, body, google)
        if block.text
    ]


def pack(items: Iterable[T], size: Callable[[T], int], limit: int) -> Iterator[list[T]]:
    """Group items in order, as many as fit the limit; an item above the limit is a group of its own."""
    group: list[T] = []
    filled = 0
    for item in items:
        if group and filled + size(item) > limit:
            yield group
            group, filled = [], 0
        group.append(item)
        filled += size(item)
    if group:
        yield group


def sentences(text: str) -> list[str]:
    """Split a paragraph after its full stops, but not after "e.g." and "i.e."."""
    return [sentence for sentence in _SENTENCE_END.split(text) if sentence]


def plain(text: str) -> str:
    """Put a text on one line; of reStructuredText and Markdown markup, only the visible text stays."""
    for pattern, replacement in _MARKUP:
        text = pattern.sub(replacement, text)
    return text.strip()


def _without_directives(lines: list[str]) -> list[str]:
    """Remove directives: the text of notes stays; formulas, code and versions are removed completely."""
    kept: list[str] = []
    skipped_indent: int | None = None
    for line in lines:
        indent = len(line) - len(line.lstrip())
        if skipped_indent is not None and (not line.strip() or indent > skipped_indent):
            continue
        skipped_indent = None
        directive = _DIRECTIVE.match(line)
        if directive and directive[2] in KEPT_DIRECTIVES:
            kept += ["", directive[1] + directive[3]]
        elif directive or line.lstrip().startswith(".. "):
            skipped_indent = indent
            kept.append("")
        else:
            kept.append(line)
    return kept


def _without_signature(lines: list[str], names: Collection[str]) -> list[str]:
    def repeats(line: str) -> bool:
        signature = _SIGNATURE.match(line)
        return bool(signature and signature[1] in names)

    return list(dropwhile(lambda line: not line.strip() or repeats(line), lines))


def _sections(lines: list[str]) -> Iterator[tuple[str, bool, list[str]]]:
    """Yield (section, whether its heading is in Google's style, its lines without common indentation)."""
    section, google, body = PROSE, False, []
    for number, line in enumerate(lines):
        heading = _heading(line, lines[number + 1 :])
        if heading or (google and line.strip() and not _is_indented(line)):
            yield section, google, _dedent(body)
            section, google = heading or (PROSE, False)
            body = [] if heading else [line]
        elif not _UNDERLINE.match(line):
            body.append(line)
    yield section, google, _dedent(body)


def _heading(line: str, following: list[str]) -> tuple[str, bool] | None:
    """The section that a line starts: an underlined heading, or Google's, with a colon before indented lines."""
    google = _GOOGLE_HEADING.match(line)
    if google and _is_indented(next(filter(str.strip, following), "")):
        title = google[1]
    elif line.strip() and following and _UNDERLINE.match(following[0].strip()):
        title, google = line, None
    else:
        return None
    title = title.strip().rstrip(":").lower()
    return SECTIONS.get(title, title), google is not None


def _is_indented(line: str) -> bool:
    return line[:1].isspace()


def _dedent(lines: list[str]) -> list[str]:
    return textwrap.dedent("\n".join(lines)).splitlines()


def _paragraphs(section: str, lines: list[str], _google: bool = False) -> list[Block]:
    paragraphs = re.split(r"\n\s*\n", "\n".join(lines))
    return [Block(section, "", "", plain(paragraph)) for paragraph in paragraphs if ">>>" not in paragraph]


def _entries(section: str, lines: list[str], google: bool) -> list[Block]:
    """Yield entries. An unindented line starts one; in Google's style, only if it has a colon."""
    starts = [
        number
        for number, line in enumerate(lines)
        if line and not _is_indented(line) and (not google or _GOOGLE_ENTRY.match(line))
    ]
    if not starts or not (google or any(map(_is_indented, lines)) or section == "see also"):
        return _paragraphs(section, lines)
    entries = [lines[start:end] for start, end in zip(starts, [*starts[1:], len(lines)], strict=True)]
    before = _paragraphs(section, lines[: starts[0]])
    return before + [_entry(section, header, rest, google) for header, *rest in entries]


def _entry(section: str, header: str, rest: list[str], google: bool) -> Block:
    match = _GOOGLE_ENTRY.match(header) if google else None
    if match:
        name, kind, first = match["name"], (match["type"] or "()")[1:-1], match["rest"] or ""
    else:
        name, _, kind = (part.strip() for part in header.partition(" :" if " :" in header else ": "))
        first = ""
    if section == "see also":
        kind, first = "", kind
    if section == "returns" and (google or not kind):  # the only text before the colon is a type
        name, kind = "", name
    description = "\n".join([first, *(line for line in _dedent(rest) if not line.startswith((">>>", "...")))])
    return Block(section, plain(name).strip("`"), plain(kind), plain(description))
