"""From files to a document database: read, cut into passages, freed of duplicates, counted."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from rqa.data.chunking import Chunker
from rqa.data.documents import Document
from rqa.data.duplicates import Seen, normalize
from rqa.data.sources import Source, Unreadable, find_files, read_sources
from rqa.runtime.errors import UserError

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
