"""From files to a document database: read, cut into passages, freed of duplicates, counted."""

import re
import sqlite3
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

from tokenizers import Tokenizer
from tqdm import tqdm

from rqa.data import Document, normalize
from rqa.preparation.sources import Source, Unreadable, find_files, read_sources
from rqa.runtime.errors import UserError, check_bounds


def digest(*parts: str) -> bytes:
    """16 bytes that stand for a text, in parts whose boundaries count."""
    hashed = blake2b(digest_size=16)
    for part in parts:
        data = part.encode("utf-8", "surrogatepass")
        hashed.update(len(data).to_bytes(8, "little") + data)
    return hashed.digest()


class Seen:
    """A set of texts, kept as hashes in a temporary database that spills to the disk and vanishes with the process."""

    def __init__(self) -> None:
        self._database = sqlite3.connect("", isolation_level=None)  # "": a temporary file, unlinked by SQLite
        self._database.execute("CREATE TABLE seen (hash BLOB PRIMARY KEY) WITHOUT ROWID")
        self._database.execute("PRAGMA journal_mode = OFF")
        self._database.execute("BEGIN")

    def add(self, *parts: str) -> bool:
        """Remember a text, in parts whose boundaries count; False if it was there already."""
        return self._database.execute("INSERT OR IGNORE INTO seen VALUES (?)", (digest(*parts),)).rowcount == 1


T = TypeVar("T")

LEVELS = ["heading", "paragraph", "line", "sentence", "word"]
BATCH_CHARACTERS = 1_000_000  # of the texts that are tokenised in one call

_CUTS = {  # a piece ends where one of these does
    "paragraph": re.compile(r"(?<!\n)(?=\n[ \t\r]*\n)"),
    "line": re.compile(r"(?<!\n)(?=\n)"),
    "sentence": re.compile(r"[.!?\u2026][\"'\u201d\u2019)\]]*(?=\s)|[\u3002\uff01\uff1f]"),
    "word": re.compile(r"(?<!\s)(?=\s)"),
}
_HEADING = re.compile(r"^#{1,6}[ \t]+(.+?)[ \t#]*$", re.MULTILINE)
_FENCE = re.compile(r"^(```|~~~).*?(?:^\1|\Z)", re.MULTILINE | re.DOTALL)


@dataclass
class ChunkArguments:
    """How long passages are, and where they may be cut."""

    chunk_size: int = field(default=400, metadata={"help": "Tokens of a passage, at most."})
    chunk_overlap: int = field(
        default=50,
        metadata={"help": "Tokens of whole lines, sentences or words that the next passage repeats, at most."},
    )
    split_at: list[str] = field(
        default_factory=lambda: list(LEVELS),
        metadata={"help": "Where to cut, what keeps more together first; a finer place only where needed.",
                  "choices": LEVELS},
    )  # fmt: skip
    count_special_tokens: bool = field(
        default=False,
        metadata={"help": "Charge each piece that a passage is joined from, and each joint, the tokenizer's special "
                  "tokens, as LocalRQA does: its 400 tokens are 350 of lines, and 100 of words."},
    )  # fmt: skip

    def __post_init__(self) -> None:
        check_bounds(self, "chunk_size", at_least=1)
        check_bounds(self, "chunk_overlap", at_least=0, below=self.chunk_size)


class Chunker:
    """Cuts texts into passages.

    Tokens are counted where they stand in the text. A tokenizer that joins a word with the space before it may give a
    passage, which starts without one, a token more.

    Args:
        tokenizer: Counts the tokens.
        arguments: Lengths and places.

    Raises:
        UserError: with `count_special_tokens`, a passage has no room for anything else.
    """

    def __init__(self, tokenizer: Tokenizer, arguments: ChunkArguments) -> None:
        self.tokenizer = Tokenizer.from_str(tokenizer.to_str())  # the caller's keeps its truncation and padding
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.arguments = arguments
        self.charge = self.tokenizer.num_special_tokens_to_add(False) if arguments.count_special_tokens else 0
        if self.charge >= arguments.chunk_size:
            raise UserError(f"--chunk_size {arguments.chunk_size}: the tokenizer's special tokens alone take as much")

    def passages(self, sources: Iterable[Source]) -> Iterator[tuple[Source, list[Document]]]:
        """Yield each text with its passages, in order; a blank text has none."""
        for batch in pack(sources, lambda source: len(source.text), BATCH_CHARACTERS):
            encodings = self.tokenizer.encode_batch([source.text for source in batch], add_special_tokens=False)
            for source, encoding in zip(batch, encodings, strict=True):
                yield source, self._passages(source, encoding.offsets)

    def _passages(self, source: Source, offsets: Sequence[tuple[int, int]]) -> list[Document]:
        headings = _headings(source.text)
        positions = [position for position, _ in headings]
        documents = []
        for begin, end in _Cutter(source.text, offsets, positions, self.charge, self.arguments).spans():
            content = source.text[begin:end].strip()
            if not content:
                continue
            metadata = {"source": source.source, "title": source.title, **source.metadata}
            if above := bisect_right(positions, begin + source.text[begin:end].index(content)):
                metadata["subtitle"] = headings[above - 1][1]
            documents.append(Document(content, metadata))
        return documents


class _Cutter:
    """One text: split at the strongest place that occurs, what is too long split again, neighbours joined again."""

    def __init__(
        self,
        text: str,
        offsets: Sequence[tuple[int, int]],
        headings: Sequence[int],
        charge: int,
        arguments: ChunkArguments,
    ) -> None:
        self.text = text
        self.starts = [start for start, _ in offsets]
        self.ends = [end for _, end in offsets]
        self.headings = headings
        self.charge = charge
        self.size = arguments.chunk_size
        self.overlap = arguments.chunk_overlap
        self.levels = [level for level in LEVELS if level in arguments.split_at]

    def spans(self) -> Iterator[tuple[int, int]]:
        """(begin, end) of each passage, in characters."""
        return self._split(0, len(self.text), 0)

    def _split(self, begin: int, end: int, depth: int) -> Iterator[tuple[int, int]]:
        cuts: list[int] = []
        while not cuts and depth < len(self.levels):
            cuts = self._cuts(self.levels[depth], begin, end)
            depth += 1
        # What has no place to cut, as a word longer than a passage, is cut between tokens.
        cuts = cuts or sorted(set(self.starts[bisect_right(self.starts, begin) : bisect_left(self.starts, end)]))
        fitting: list[tuple[int, int]] = []
        for piece in pairwise([begin, *cuts, end]):
            if self._cost(*piece) <= self.size or not cuts:
                fitting.append(piece)
            else:
                yield from self._join(fitting)
                fitting = []
                yield from self._split(*piece, depth)
        yield from self._join(fitting)

    def _cuts(self, level: str, begin: int, end: int) -> list[int]:
        if level == "heading":
            return list(self.headings[bisect_right(self.headings, begin) : bisect_left(self.headings, end)])
        cuts = (match.end() for match in _CUTS[level].finditer(self.text, begin + 1, end))
        return [cut for cut in cuts if cut < end]

    def _cost(self, begin: int, end: int) -> int:
        return bisect_left(self.starts, end) - bisect_right(self.ends, begin) + self.charge

    def _join(self, pieces: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
        """As many neighbours as fit; the last ones, as far as the overlap reaches, open the next passage, too."""
        window: deque[tuple[int, int, int]] = deque()
        total = 0
        for begin, end in pieces:
            cost = self._cost(begin, end)
            if window and total + self.charge + cost > self.size:
                yield window[0][0], window[-1][1]
                while window and (total > self.overlap or total + self.charge + cost > self.size):
                    total -= window.popleft()[2] + (self.charge if window else 0)
            total += cost + (self.charge if window else 0)
            window.append((begin, end, cost))
        if window:
            yield window[0][0], window[-1][1]


def _headings(text: str) -> list[tuple[int, str]]:
    """Position and words of each Markdown heading; not of comments in fenced code."""
    if "#" not in text:
        return []
    prose = _FENCE.sub(lambda fence: " " * len(fence[0]), text)
    return [(match.start(), match[1]) for match in _HEADING.finditer(prose)]


def pack(items: Iterable[T], size: Callable[[T], int], limit: int) -> Iterator[list[T]]:
    """Group items in their order, as many as fit the limit; an item that is larger stands alone."""
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


NAMED = 20  # skipped texts, and files of other kinds, that the summary names


@dataclass
class Collection:
    """Passages of files, and what became of them once `passages` has run to its end.

    Attributes:
        texts: Texts that gave passages.
        characters: Their length together.
        documents: Passages kept.
        duplicates: Passages left out, since one of the same title has the same words.
        skipped: What gave nothing: the place and the reason.
        others: Files of a folder whose ending says that they cannot be read.
    """

    paths: Sequence[str | Path]
    chunker: Chunker
    texts: int = 0
    characters: int = 0
    documents: int = 0
    duplicates: int = 0
    skipped: list[str] = field(default_factory=list)
    others: list[Path] = field(default_factory=list)

    def passages(self) -> Iterator[Document]:
        """Yield each passage once; memory does not grow with their number.

        Raises:
            UserError: a path is missing, a JSONL line is malformed, or there is no text at all.
        """
        files: list[tuple[Path, Path]] = []
        for path in self.paths:
            found, others = find_files(path)
            files += [(file, Path(path)) for file in found]
            self.others += others
        seen = Seen()
        for source, passages in self.chunker.passages(self._sources(files)):
            if not passages:
                self.skipped.append(f"{source.where}: holds no text")
                continue
            self.texts += 1
            self.characters += len(source.text)
            for passage in passages:
                if seen.add(source.title, normalize(passage.page_content)):
                    self.documents += 1
                    yield passage
                else:
                    self.duplicates += 1
        if not self.documents:
            raise UserError(f"{self.skipped[0] if self.skipped else self.paths[0]}; no passage to write")

    def _sources(self, files: Sequence[tuple[Path, Path]]) -> Iterator[Source]:
        with tqdm(desc="chunk", unit="text") as bar:
            for number, (file, root) in enumerate(files, start=1):
                bar.set_postfix_str(f"file {number} of {len(files)}")
                try:
                    for source in read_sources(file, file.relative_to(root).as_posix() if file != root else file.name):
                        yield source
                        bar.update()
                except Unreadable as error:
                    self.skipped.append(f"{file}: {error}")

    def summary(self) -> str:
        """Counts, and what was skipped by name."""
        lines = [
            f"{self.documents} passages of {self.texts} texts, {self.characters / 1e6:.2f} million characters",
            f"{self.duplicates} duplicates and {len(self.skipped)} empty or unreadable texts left out",
            *_named(self.skipped),
        ]
        if self.others:
            lines += [f"{len(self.others)} files of other kinds left out", *_named([str(file) for file in self.others])]
        return "\n".join(lines)


def _named(places: Sequence[str]) -> list[str]:
    more = [f"  and {len(places) - NAMED} more"] if len(places) > NAMED else []
    return [*(f"  {place}" for place in places[:NAMED]), *more]
