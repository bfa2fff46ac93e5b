"""What a data set is like: counts, lengths, gold passages that the database lacks, leaks between splits, duplicates."""

from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer
from tqdm import tqdm

from rqa.data import iterate_documents, iterate_examples, normalize
from rqa.preparation.chunking import Seen

BATCH = 1024  # texts tokenised at once


@dataclass
class SplitStatistics:
    """One file of examples.

    Attributes:
        questions: The normalised questions, with how often each is asked.
        gold: The identities of gold passages, with how many questions have each.
        gold_counts: For each number of gold passages, how many questions have so many.
    """

    questions: Counter[str] = field(default_factory=Counter)
    gold: Counter[tuple[str, str]] = field(default_factory=Counter)
    gold_counts: Counter[int] = field(default_factory=Counter)
    answers: int = 0

    @property
    def total(self) -> int:
        return self.questions.total()


def validate(document_path: Path | None, splits: dict[str, Path], tokenizer: Tokenizer | None) -> Iterator[str]:
    """Read every file, and yield what there is to say about it, a line at a time.

    Questions and gold passages are held; the database streams.

    Args:
        tokenizer: Counts lengths in tokens; without one they are counted in words.

    Raises:
        UserError: a file is malformed; the message names the line.
    """
    measure = _Lengths(tokenizer)
    statistics = {split: _read_split(path, measure, split) for split, path in splits.items()}
    wanted = set().union(*(split.gold for split in statistics.values()))
    found = wanted
    if document_path:
        found, counts = _read_database(document_path, wanted, measure)
        repeated = counts["duplicates"]
        yield f"{document_path}: {counts['documents']} passages, {repeated} with the words of an earlier one"
    for split, numbers in statistics.items():
        yield from _describe(split, numbers, found, document_path)
    for (one, first), (other, second) in combinations(statistics.items(), 2):
        questions, passages = len(first.questions.keys() & second.questions), len(first.gold.keys() & second.gold)
        yield f"{one} and {other}: {questions} questions and {passages} gold passages are in both"
    yield from measure.table()


def _read_split(path: Path, measure: "_Lengths", split: str) -> SplitStatistics:
    statistics = SplitStatistics()
    for example in tqdm(iterate_examples(path), desc=path.name, unit="question"):
        statistics.questions[normalize(example.question)] += 1
        statistics.gold.update({document.key for document in example.gold_docs})
        statistics.gold_counts[len(example.gold_docs)] += 1
        statistics.answers += example.gold_answer is not None
        measure.add(f"questions of {split}", example.question)
        if example.gold_answer is not None:
            measure.add(f"answers of {split}", example.gold_answer)
    return statistics


def _read_database(
    path: Path, wanted: set[tuple[str, str]], measure: "_Lengths"
) -> tuple[set[tuple[str, str]], Counter[str]]:
    """Which of the wanted passages the database holds, and how many passages, and duplicates among them."""
    found: set[tuple[str, str]] = set()
    counts: Counter[str] = Counter()
    seen = Seen()
    for document in tqdm(iterate_documents(path), desc=path.name, unit="passage"):
        counts["documents"] += 1
        counts["duplicates"] += not seen.add(normalize(document.page_content))
        if document.key in wanted:
            found.add(document.key)
        measure.add("passages", document.page_content)
    return found, counts


def _describe(
    split: str, numbers: SplitStatistics, found: set[tuple[str, str]], database: Path | None
) -> Iterator[str]:
    total = numbers.total
    yield f"{split}: {total} questions, {numbers.answers} with an answer, {total - len(numbers.questions)} asked before"
    with_gold = total - numbers.gold_counts[0]
    several = sum(count for size, count in numbers.gold_counts.items() if size > 1)
    yield f"{split}: {with_gold} questions with a gold passage, {several} of them with several"
    if database and numbers.gold:
        inside = sum(count for key, count in numbers.gold.items() if key in found)
        share = inside / numbers.gold.total()
        yield f"{split}: {inside} of {numbers.gold.total()} gold passages ({share:.1%}) are in the database"


class _Lengths:
    """How long the texts of each kind are; only numbers are kept."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self.tokenizer = tokenizer and Tokenizer.from_str(tokenizer.to_str())
        if self.tokenizer:
            self.tokenizer.no_truncation()
            self.tokenizer.no_padding()
        self._waiting: dict[str, list[str]] = {}
        self._lengths: dict[str, array[int]] = {}

    def add(self, kind: str, text: str) -> None:
        waiting = self._waiting.setdefault(kind, [])
        waiting.append(text)
        if len(waiting) == BATCH:
            self._count(kind)

    def _count(self, kind: str) -> None:
        texts = self._waiting.pop(kind, [])
        if self.tokenizer:
            encodings = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
            lengths: Iterable[int] = (len(encoding) for encoding in encodings)
        else:
            lengths = (len(text.split()) for text in texts)
        self._lengths.setdefault(kind, array("q")).extend(lengths)

    def table(self) -> Iterator[str]:
        """One line a kind: mean, median, 95th percentile and maximum."""
        unit = "tokens" if self.tokenizer else "words"
        yield f"{unit:<22}{'mean':>8}{'median':>8}{'95 %':>8}{'longest':>9}"
        for kind in list(self._waiting):
            self._count(kind)
        for kind, lengths in self._lengths.items():
            values = [float(np.mean(lengths)), *np.percentile(lengths, [50, 95, 100]).tolist()]
            yield f"{kind:<22}" + "".join(f"{value:>{8 + (i == 3)}.0f}" for i, value in enumerate(values))
