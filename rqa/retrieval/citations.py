"""Citations: the passages that support an answer, and stable names for passages."""

import re
from collections.abc import Sequence
from typing import NamedTuple

from rqa.data import Document
from rqa.runtime.files import fingerprint
from rqa.runtime.text import words

SENTENCE = re.compile(r"\S(?:[^.!?\n。！？]|[.!?](?!\s))*[.!?。！？]*(?:\s*\[\d+\])*")
MARK = re.compile(r"\[(\d{1,3})\]")
ENOUGH = 0.5  # share of a sentence's letters in words that the passage contains


class Citation(NamedTuple):
    """A span of characters in an answer, and the number of the passage that supports it, from 1."""

    start: int
    end: int
    number: int


def cite(text: str, passages: Sequence[Document]) -> list[Citation]:
    """The passages of each sentence: those that it marks, as in [2], or else the one that contains most of its words.

    Words are weighted by their length. A tie goes to the better-ranked passage; below `ENOUGH` none is cited.
    """
    vocabularies, citations = [set(words(passage.fmt_content)) for passage in passages], []
    for sentence in SENTENCE.finditer(text):
        own = set(words(MARK.sub("", sentence[0])))
        shares = [sum(map(len, own & vocabulary)) / max(sum(map(len, own)), 1) for vocabulary in vocabularies]
        best = max(range(len(passages)), key=shares.__getitem__, default=-1)
        marked = [number for number in map(int, MARK.findall(sentence[0])) if 0 < number <= len(passages)]
        numbers = marked or ([best + 1] if best >= 0 and shares[best] >= ENOUGH else [])
        citations += [Citation(*sentence.span(), number) for number in dict.fromkeys(numbers)]
    return citations


def passage_id(position: int, document: Document) -> str:
    """A unique name of the document at a position of the database."""
    return f"{position}-{fingerprint(*document.key)[:8]}"


def passage_of(documents: Sequence[Document], name: str) -> Document | None:
    """The document with this `passage_id`; None if the database no longer has it there."""
    position = name.partition("-")[0]
    if not (position.isascii() and position.isdigit() and len(position) < 19 and int(position) < len(documents)):
        return None
    document = documents[int(position)]
    return document if passage_id(int(position), document) == name else None
