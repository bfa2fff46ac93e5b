"""Which passages an answer rests on, and the names by which they are found again."""

import re
from collections.abc import Sequence
from typing import NamedTuple

from rqa.data import Document
from rqa.runtime.files import fingerprint
from rqa.runtime.text import words

SENTENCE = re.compile(r"\S(?:[^.!?\n。！？]|[.!?](?!\s))*[.!?。！？]*(?:\s*\[\d+\])*")
MARK = re.compile(r"\[(\d{1,3})\]")
ENOUGH = 0.5  # of a sentence's letters that are in words of a passage


class Citation(NamedTuple):
    """Characters of an answer, and the number of the passage that says the same; the first one is 1."""

    start: int
    end: int
    number: int


def cite(text: str, passages: Sequence[Document]) -> list[Citation]:
    """The passage of each sentence: the one that it names, as [2], or else the one with most of its words, if enough.

    Longer words count for more; of passages that share as much, the better one is taken.
    """
    held, found = [set(words(passage.fmt_content)) for passage in passages], []
    for sentence in SENTENCE.finditer(text):
        said = set(words(MARK.sub("", sentence[0])))
        shares = [sum(map(len, said & has)) / max(sum(map(len, said)), 1) for has in held]
        best = max(range(len(held)), key=shares.__getitem__, default=-1)
        named = [number for number in map(int, MARK.findall(sentence[0])) if 0 < number <= len(held)]
        numbers = named or ([best + 1] if best >= 0 and shares[best] >= ENOUGH else [])
        found += [Citation(*sentence.span(), number) for number in dict.fromkeys(numbers)]
    return found


def passage_id(position: int, document: Document) -> str:
    """A name of the document at a position of the database, which no other document there will have."""
    return f"{position}-{fingerprint(*document.key)[:8]}"


def passage_of(documents: Sequence[Document], name: str) -> Document | None:
    """The document that `passage_id` gave this name; None if it is not there any more."""
    position = name.partition("-")[0]
    if not (position.isascii() and position.isdigit() and len(position) < 19 and int(position) < len(documents)):
        return None
    document = documents[int(position)]
    return document if passage_id(int(position), document) == name else None
