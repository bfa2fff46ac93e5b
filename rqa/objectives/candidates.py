"""What RPG, DCA and EMDR2 train on: for each question K candidate documents, each scored by a frozen teacher."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from rqa.data.documents import Document
from rqa.data.examples import Example
from rqa.models.encoder import Encoder
from rqa.objectives.distillation import DistillationBatch
from rqa.objectives.teacher import Pair, Teacher
from rqa.prompts import retrieval_query
from rqa.retrieval.retriever import Retriever
from rqa.runtime.errors import check_bounds
from rqa.runtime.precision import autocast


@dataclass
class CandidateArguments:
    """Which documents a question is trained on."""

    num_docs: int = field(default=20, metadata={"help": "Documents retrieved for each question."})
    include_gold: bool = field(default=True, metadata={"help": "The gold passage replaces the last one if missing."})

    def __post_init__(self) -> None:
        check_bounds(self, "num_docs", at_least=2)  # one cannot be told from others


class RetrievedCandidates:
    """The live retriever's top K, all questions of a batch in one call; gold passages replace the last if missing.

    Args:
        dtype: In which the questions are encoded, as the documents of the index were.
    """

    def __init__(
        self, examples: Sequence[Example], retriever: Retriever, arguments: CandidateArguments, dtype: torch.dtype
    ) -> None:
        self.examples = examples
        self.retriever = retriever
        self.arguments = arguments
        self.dtype = dtype
        self._numbers = {document.key: number for number, document in enumerate(retriever.documents)}

    def __call__(self, indices: Sequence[int]) -> list[list[int]]:
        """Positions in the database of each example's documents, K at most. [B] lists"""
        questions = [retrieval_query(self.examples[i]) for i in indices]
        with autocast(self.retriever.encoder.backbone.device, self.dtype):
            hits = self.retriever.retrieve(questions, self.arguments.num_docs)
        rows = [[number for number in row if number >= 0] for row in hits.ids.tolist()]
        return [self._with_gold(self.examples[i], row) for i, row in zip(indices, rows, strict=True)]

    def _with_gold(self, example: Example, found: list[int]) -> list[int]:
        K = self.arguments.num_docs
        if not self.arguments.include_gold:
            return found[:K]
        gold = {self._numbers[document.key]: None for document in example.gold_docs if document.key in self._numbers}
        missing = [number for number in gold if number not in found]
        others = [number for number in found if number not in gold]
        dropped = set(others[max(K - len(gold), 0) :])
        return ([number for number in found if number not in dropped] + missing)[:K]


class ScoredCandidates:
    """The collate function: candidates chosen, scored by the teacher and packed, each distinct document once.

    Args:
        documents: All that may be chosen.
        choose: Example numbers -> positions in `documents`, some for each example; called once a batch.
        teacher: Asked for every pair of an example and one of its documents.
        temperature: The teacher's scores are divided by it. 1: the batch holds the scores themselves.
        together: Whether a document's score depends on those that stand beside it.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        documents: Sequence[Document],
        encoder: Encoder,
        choose: Callable[[Sequence[int]], Sequence[Sequence[int]]],
        teacher: Teacher,
        temperature: float = 1.0,
        together: bool = False,
    ) -> None:
        self.examples = examples
        self.documents = documents
        self.choose = choose
        self.teacher = teacher
        self.temperature = temperature
        self.together = together
        self._queries = encoder.tokenize_queries([retrieval_query(example) for example in examples])
        self._passages = encoder.tokenize_passages([document.fmt_content for document in documents])

    def __call__(self, indices: Sequence[int]) -> DistillationBatch:
        """One micro-batch: column k is one and the same document for retriever and teacher."""
        chosen = self.choose(indices)
        # An index may find nothing for anyone; the encoder still needs a passage to encode.
        distinct = list(dict.fromkeys(number for row in chosen for number in row)) or [0]
        position = {number: column for column, number in enumerate(distinct)}
        shape = (len(indices), max(1, *map(len, chosen)))
        columns = torch.zeros(shape, dtype=torch.long)  # [B, K]
        scores = torch.full(shape, float("-inf"))  # [B, K]
        found = iter(self.teacher(self._pairs(indices, chosen)))
        for row, numbers in enumerate(chosen):
            columns[row, : len(numbers)] = torch.tensor([position[number] for number in numbers])
            scores[row, : len(numbers)] = torch.tensor([next(found) for _ in numbers])
        return DistillationBatch(
            queries=[self._queries[i] for i in indices],
            passages=[self._passages[number] for number in distinct],
            columns=columns,
            teacher=scores / self.temperature,
            indices=indices,
            hit_rate=self.teacher.hit_rate,
        )

    def _pairs(self, indices: Sequence[int], chosen: Sequence[Sequence[int]]) -> list[Pair]:
        pairs = []
        for i, numbers in zip(indices, chosen, strict=True):
            documents = tuple(self.documents[number] for number in numbers)
            beside = documents if self.together else ()
            pairs += [Pair(self.examples[i], document, beside) for document in documents]
        return pairs
