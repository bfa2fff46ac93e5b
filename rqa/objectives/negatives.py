"""Hard negatives from the live retriever (Xiong et al. 2021, ANCE)."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path

from rqa.data.documents import Document
from rqa.data.examples import Example
from rqa.prompts import retrieval_query
from rqa.retrieval.mining import NegativeArguments, NegativeChooser
from rqa.retrieval.retriever import Retriever
from rqa.runtime import distributed

log = logging.getLogger(__name__)

QUERIES_AT_ONCE = 4096  # bounds the memory of their rankings


class MinedNegatives:
    """The hard negatives of each training question, chosen anew whenever the index is fresh."""

    def __init__(self, examples: Sequence[Example], retriever: Retriever, arguments: NegativeArguments) -> None:
        self.retriever = retriever
        self._chooser = NegativeChooser(examples, retriever.documents, arguments)
        self._queries = [retrieval_query(example) for example in examples]
        self._found: list[list[int]] = []

    def __getitem__(self, example: int) -> list[Document]:
        return [self.retriever.documents[number] for number in self._found[example]]

    def __call__(self) -> None:
        """Ask the retriever, whose index is fresh, for all questions; each process for its share of them."""
        numbers = distributed.share(range(len(self._queries)))
        found = []
        for start in range(0, len(numbers), QUERIES_AT_ONCE):
            part = numbers[start : start + QUERIES_AT_ONCE]
            hits = self.retriever.retrieve([self._queries[number] for number in part], self._chooser.depth)
            rankings = zip(part, hits.ids.tolist(), hits.scores.tolist(), strict=True)
            found += [self._chooser(*ranking) for ranking in rankings]
        self._found = distributed.gather(found)
        log.info("hard negatives mined for %d of %d questions", sum(map(bool, self._found)), len(self._found))

    def save(self, directory: Path) -> None:
        """Write what was found."""
        (directory / "negatives.json").write_text(json.dumps(self._found), encoding="utf-8")

    def load(self, directory: Path) -> None:
        """Read it; as many questions must have been asked.

        Raises:
            ValueError: they were others.
        """
        found = json.loads((directory / "negatives.json").read_text(encoding="utf-8"))
        if len(found) != len(self._queries):
            raise ValueError("its mined negatives are of another training file")
        self._found = found
