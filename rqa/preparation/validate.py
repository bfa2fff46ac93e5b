"""Checks of a data set: counts, lengths, gold passages missing from the database, leaks between splits, duplicates."""

from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from rqa.data import iterate_examples, normalize
from rqa.documents import iterate_documents
from rqa.preparation.chunking import Seen
from rqa.runtime.cli import progress


@dataclass
class Split:
    """Counts of one file of examples."""

    questions: Counter[str] = field(default_factory=Counter)  # normalised question -> how often it is asked
    gold: Counter[tuple[str, str]] = field(default_factory=Counter)  # key of a gold passage -> number of its questions
    gold_counts: Counter[int] = field(default_factory=Counter)  # number of gold passages -> number of such questions
    answers: int = 0


def validate(
    document_path: Path | None, paths: dict[str, Path], tokenizer: PreTrainedTokenizerBase | None
) -> Iterator[str]:
    """Yield a report on the files, line by line; the database streams. Without a tokenizer, lengths are in words."""
    parts = partial(tokenizer.encode, add_special_tokens=False, verbose=False) if tokenizer else str.split
    lengths: defaultdict[str, array[int]] = defaultdict(lambda: array("q"))  # by kind of text

    def measure(kind: str, text: str) -> None:
        lengths[kind].append(len(parts(text)))

    splits = {name: _read_split(path, measure, name) for name, path in paths.items()}
    known: set[tuple[str, str]] = set()  # gold passages in the database
    if document_path:
        wanted = set().union(*(split.gold for split in splits.values()))
        passages, repeated, seen = 0, 0, Seen()
        for document in progress(iterate_documents(document_path), desc=document_path.name, unit="passage"):
            passages += 1
            repeated += not seen.add(normalize(document.page_content))
            if document.key in wanted:
                known.add(document.key)
            measure("passages", document.page_content)
        yield f"{document_path}: {passages} passages, {repeated} with the words of an earlier one"
    for name, split in splits.items():
        total = split.questions.total()
        yield f"{name}: {total} questions, {split.answers} with an answer, {total - len(split.questions)} asked before"
        with_gold, several = total - split.gold_counts[0], sum(n for size, n in split.gold_counts.items() if size > 1)
        yield f"{name}: {with_gold} questions with a gold passage, {several} of them with several"
        if document_path and split.gold:
            gold = split.gold.total()
            inside = sum(count for key, count in split.gold.items() if key in known)
            yield f"{name}: {inside} of {gold} gold passages ({inside / gold:.1%}) are in the database"
    for (one, first), (other, second) in combinations(splits.items(), 2):
        questions, golds = len(first.questions.keys() & second.questions), len(first.gold.keys() & second.gold)
        yield f"{one} and {other}: {questions} questions and {golds} gold passages are in both"
    yield f"{'tokens' if tokenizer else 'words':<22}{'mean':>8}{'median':>8}{'95 %':>8}{'longest':>9}"
    for kind, found in lengths.items():
        values = [float(np.mean(found)), *np.percentile(found, [50, 95, 100]).tolist()]
        yield f"{kind:<22}" + "".join(f"{value:>{8 + (i == 3)}.0f}" for i, value in enumerate(values))


def _read_split(path: Path, measure: Callable[[str, str], None], name: str) -> Split:
    split = Split()
    for example in progress(iterate_examples(path), desc=path.name, unit="question"):
        split.questions[normalize(example.question)] += 1
        split.gold.update({document.key for document in example.gold_docs})
        split.gold_counts[len(example.gold_docs)] += 1
        measure(f"questions of {name}", example.question)
        if example.gold_answer is not None:
            split.answers += 1
            measure(f"answers of {name}", example.gold_answer)
    return split
