"""Texts cut into passages of so many tokens, along headings, paragraphs, lines, sentences and words.

A text is tokenised once and whole, many texts in one call; what a piece of it takes is then a difference of two
positions among the tokens' offsets. Splitters that ask the tokenizer about every piece spend most of their time there.
"""

import re
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TypeVar

from tokenizers import Tokenizer

from rqa.data.documents import Document
from rqa.data.sources import Source
from rqa.runtime.errors import UserError, check_bounds

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
