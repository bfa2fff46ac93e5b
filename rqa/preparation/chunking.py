"""From files to a document database: texts are read, cut into passages, deduplicated and counted."""

import re
import sqlite3
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, groupby, pairwise, tee
from pathlib import Path

import regex
from tokenizers import Encoding, Tokenizer

from rqa.data import Document, normalize
from rqa.preparation.sources import HEADING, Source, Unreadable, find_files, read_sources
from rqa.runtime.cli import progress
from rqa.runtime.errors import UserError
from rqa.runtime.files import fingerprint
from rqa.runtime.flags import Arguments, flag

Span = tuple[int, int]  # begin and end, in characters

LEVELS = ["heading", "paragraph", "line", "sentence", "word"]
BATCH_CHARACTERS = 1_000_000  # tokenised in one call, approximately
LONGEST_UNKNOWN = 8  # a token that stands for more characters than its own plus these counts once per character
LISTED = 20  # maximum number of skipped texts, and of files of other kinds, listed in the summary

_CUTS = {  # a piece ends where a match ends
    "paragraph": re.compile(r"(?<!\n)(?=\n[ \t\r]*\n)"),
    "line": re.compile(r"(?<!\n)(?=\n)"),
    "sentence": re.compile(r"[.!?\u2026][\"'\u201d\u2019)\]]*(?=\s)|[\u3002\uff01\uff1f]"),
    "word": re.compile(r"(?<!\s)(?=\s)"),
}
# A grapheme, which readers see as one character; unlike regex's \X it takes linear time and has a bounded length.
_GRAPHEME = regex.compile(r"(?s)\p{RI}{2}|.(?:[\p{GCB=EX}\p{GCB=SM}\p{GCB=V}\p{GCB=T}]|\u200d.){0,31}")
_FENCE = re.compile(r"^(```|~~~).*?(?:^\1|\Z)", re.MULTILINE | re.DOTALL)


@dataclass(kw_only=True)
class ChunkArguments(Arguments):
    """How long passages are, and where they may be cut."""

    chunk_size: int = flag(400, "Maximum tokens of a passage.")
    chunk_overlap: int = flag(50, "Maximum tokens that the next passage repeats, in whole lines, sentences or words.")
    split_at: list[str] = flag(LEVELS, "Places to cut at; weaker ones are used where a piece is too long.", LEVELS)
    count_special_tokens: bool = flag(False, "Whether each piece and each join counts special tokens, as in LocalRQA.")

    def check(self) -> None:
        self.check_bounds("chunk_size", at_least=1)
        self.check_bounds("chunk_overlap", at_least=0, below=self.chunk_size)


class Chunker:
    """Cuts texts into passages by the tokens of the whole text.

    A passage, tokenised by itself, may have one token more if the tokenizer joins words with the space before them.
    """

    def __init__(self, tokenizer: Tokenizer, flags: ChunkArguments) -> None:
        self.tokenizer = Tokenizer.from_str(tokenizer.to_str())  # a copy; the caller's keeps its settings
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.flags = flags
        self.charge = self.tokenizer.num_special_tokens_to_add(False) if flags.count_special_tokens else 0
        if self.charge >= flags.chunk_size:
            raise UserError(f"--chunk_size {flags.chunk_size}: the tokenizer's special tokens fill it; raise it")

    def passages(self, sources: Iterable[Source]) -> Iterator[tuple[Source, list[Document]]]:
        """Yield each text with its passages, in order; a blank text has none."""
        texts, measured = tee(sources)
        ends = accumulate(len(source.text) for source in measured)
        for _, group in groupby(zip(texts, ends, strict=True), key=lambda pair: pair[1] // BATCH_CHARACTERS):
            batch = [source for source, _ in group]
            encodings = self.tokenizer.encode_batch([source.text for source in batch], add_special_tokens=False)
            for source, encoding in zip(batch, encodings, strict=True):
                yield source, self._passages(source, _spans(source.text, encoding))

    def _passages(self, source: Source, tokens: Sequence[Span]) -> list[Document]:
        # A comment in fenced code is not a heading.
        prose = _FENCE.sub(lambda fence: " " * len(fence[0]), source.text) if source.markdown else ""
        headings = list(HEADING.finditer(prose))
        positions = [heading.start() for heading in headings]
        documents = []
        for begin, end in _Cutter(source.text, tokens, positions, self).split(0, len(source.text)):
            if content := source.text[begin:end].strip():
                metadata = {"source": source.source, "title": source.title, **source.metadata}
                if above := bisect_right(positions, begin + source.text[begin:end].index(content)):
                    metadata["subtitle"] = headings[above - 1][1]
                documents.append(Document(content, metadata))
        return documents


class _Cutter:
    """Cuts one text: splits at the strongest level that occurs, splits long pieces again, joins short neighbours."""

    def __init__(self, text: str, tokens: Sequence[Span], headings: Sequence[int], chunker: Chunker) -> None:
        self.text, self.headings, self.charge = text, headings, chunker.charge
        self.starts = [start for start, _ in tokens]
        self.ends = [end for _, end in tokens]
        self.size, self.overlap = chunker.flags.chunk_size, chunker.flags.chunk_overlap
        self.levels = [level for level in LEVELS if level in chunker.flags.split_at]

    def split(self, begin: int, end: int, depth: int = 0) -> Iterator[Span]:
        """Yield the passages of a stretch that was cut at the first `depth` levels."""
        cuts: list[int] = []
        while not cuts and depth < len(self.levels):
            cuts = self._cuts(self.levels[depth], begin, end)
            depth += 1
        # A stretch without such places, such as a word longer than a passage, is cut between tokens.
        cuts = cuts or sorted(set(self.starts[bisect_right(self.starts, begin) : bisect_left(self.starts, end)]))
        fitting: list[Span] = []
        for piece in pairwise([begin, *cuts, end]):
            if self._cost(*piece) <= self.size or not cuts:
                fitting.append(piece)
            else:
                yield from self._join(fitting)
                fitting = []
                yield from self.split(*piece, depth)
        yield from self._join(fitting)

    def _cuts(self, level: str, begin: int, end: int) -> list[int]:
        if level == "heading":
            return list(self.headings[bisect_right(self.headings, begin) : bisect_left(self.headings, end)])
        cuts = (match.end() for match in _CUTS[level].finditer(self.text, begin + 1, end))
        return [cut for cut in cuts if cut < end]

    def _cost(self, begin: int, end: int) -> int:
        return bisect_left(self.starts, end) - bisect_right(self.ends, begin) + self.charge

    def _join(self, pieces: Iterable[Span]) -> Iterator[Span]:
        """Join as many neighbours as fit; the last ones, up to the overlap, also begin the next passage."""
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


def _spans(text: str, encoding: Encoding) -> list[Span]:
    """The spans of the tokens in the text. A long stretch without its own tokens counts one token per character.

    Such a stretch, for example an unknown word, is cut between graphemes, so that an emoji of several characters stays
    whole.
    """
    spans: list[Span] = []
    reached = 0
    for token, span in zip([*encoding.tokens, ""], [*encoding.offsets, (len(text), len(text))], strict=True):
        for (begin, end), spelt in (((reached, span[0]), 0), (span, len(token))):
            if end - begin > LONGEST_UNKNOWN + spelt and not text[begin:end].isspace():
                for grapheme in _GRAPHEME.finditer(text, begin, end):
                    spans += [grapheme.span()] * len(grapheme[0])
            elif spelt:
                spans.append((begin, end))
        reached = max(reached, span[1])
    return spans


class Seen:
    """A set of texts, kept as hashes in a temporary SQLite database, which is deleted when the process ends."""

    def __init__(self) -> None:
        self._database = sqlite3.connect("")  # "": a temporary file that SQLite unlinks
        self._database.execute("CREATE TABLE seen (hash BLOB PRIMARY KEY) WITHOUT ROWID")
        self._database.execute("PRAGMA journal_mode = OFF")

    def add(self, *parts: str) -> bool:
        """Add a text, given in parts whose boundaries count. -> whether it is new"""
        half = bytes.fromhex(fingerprint(*parts))[:16]
        return self._database.execute("INSERT OR IGNORE INTO seen VALUES (?)", (half,)).rowcount == 1


@dataclass
class Collection:
    """Passages of files, with counts that are complete once `passages` is exhausted."""

    paths: Sequence[str | Path]
    chunker: Chunker
    texts: int = 0  # texts with passages
    characters: int = 0  # of these texts
    documents: int = 0
    duplicates: int = 0  # passages left out, since one with the same title and words came before
    skipped: list[str] = field(default_factory=list)  # texts without passages: place and reason
    others: list[str] = field(default_factory=list)  # files in folders, of kinds that cannot be read

    def passages(self) -> Iterator[Document]:
        """Yield each distinct passage; memory does not grow with their number."""
        seen = Seen()
        for source, passages in self.chunker.passages(self._sources()):
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

    def _sources(self) -> Iterator[Source]:
        files: list[tuple[Path, Path]] = []
        for path in map(Path, self.paths):
            found, others = find_files(path)
            files += [(file, path) for file in found]
            self.others += map(str, others)
        with progress(desc="chunk", unit="text") as bar:
            for number, (file, root) in enumerate(files, start=1):
                bar.set_postfix_str(f"file {number} of {len(files)}")
                try:
                    for source in read_sources(file, file.relative_to(root).as_posix() if file != root else file.name):
                        yield source
                        bar.update()
                except Unreadable as error:
                    self.skipped.append(f"{file}: {error}")

    def summary(self) -> str:
        lines = [f"{self.documents} passages of {self.texts} texts, {self.characters / 1e6:.2f} million characters"]
        left_out = {}
        if self.duplicates or self.skipped:
            left_out[f"{self.duplicates} duplicates and {len(self.skipped)} empty or unreadable texts"] = self.skipped
        if self.others:
            left_out[f"{len(self.others)} files of other kinds"] = self.others
        for what, places in left_out.items():
            lines += [f"{what} left out", *(f"  {place}" for place in places[:LISTED])]
            lines += [f"  and {len(places) - LISTED} more"] * (len(places) > LISTED)
        return "\n".join(lines)
