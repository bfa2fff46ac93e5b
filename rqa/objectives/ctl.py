"""CTL: contrastive learning of the encoder (Karpukhin et al. 2020, DPR; Wang et al. 2022, E5; Gao et al. 2021)."""

import json
import logging
import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import torch
import numpy as np
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rqa.data import Document, Example, normalize
from rqa.models.encoder import Encoder
from rqa.objectives.encoding import EncoderBatch, EncoderObjective
from rqa.objectives.losses import contrastive
from rqa.prompts import retrieval_query
from rqa.retrieval.retriever import Retriever
from rqa.runtime import distributed
from rqa.runtime.distributed import autocast, gather_rows
from rqa.runtime.errors import UserError, check_bounds
from rqa.runtime.files import fingerprint

QUERIES_AT_ONCE = 256
TEXTS_KEPT = 2**18  # passages whose text's fingerprint is remembered


@dataclass
class NegativeArguments:
    """Which passages of a ranking are hard negatives.

    Ranks, from 1, are those of the passages that are not gold.
    """

    negatives_from_rank: int = field(
        default=1, metadata={"help": "The best rank of a hard negative, among the passages that are not gold."}
    )
    negatives_to_rank: int = field(default=100, metadata={"help": "The worst rank of one, counted so, too."})
    negatives_margin: float | None = field(
        default=None,
        metadata={
            "help": "A hard negative scores lower than the best gold passage by at least this; none is taken where no "
            "gold passage is found. By default any score will do."
        },
    )
    negatives_max_share: float | None = field(
        default=None,
        metadata={"help": "It has at most this share of the best gold passage's score, such as 0.95; likewise."},
    )

    def __post_init__(self) -> None:
        check_bounds(self, "negatives_from_rank", at_least=1)
        check_bounds(self, "negatives_margin", at_least=0)
        check_bounds(self, "negatives_max_share", above=0, at_most=1)
        if self.negatives_to_rank < self.negatives_from_rank:
            raise UserError(f"--negatives_to_rank {self.negatives_to_rank}: is before --negatives_from_rank")

    def highest_score(self, gold: float) -> float:
        """The greatest score that a hard negative may have, from that of the best gold passage."""
        highest = np.inf
        if self.negatives_margin is not None:
            highest = min(highest, gold - self.negatives_margin)
        if self.negatives_max_share is not None:
            highest = min(highest, gold - (1 - self.negatives_max_share) * abs(gold))
        return highest


class NegativeChooser:
    """The one rule by which passages of a ranking are hard negatives, mined beforehand or in the training loop.

    Passages are gold by their normalised text, whatever their source; what is gold for the same question in another
    line of the file is gold here. Of equal texts the best-ranked counts, and the others have no rank.

    A gold passage that the ranking lacks scores no higher than its last passage, if the database holds it. So with a
    margin or a share nothing of such a ranking is chosen: whatever ranks before gold may well answer the question.

    Attributes:
        counts: What was chosen from and left out, over all rankings.
    """

    def __init__(
        self, examples: Sequence[Example], documents: Sequence[Document], arguments: NegativeArguments
    ) -> None:
        self.arguments = arguments
        self.counts: Counter[str] = Counter()
        self.text_of = lru_cache(TEXTS_KEPT)(lambda number: _text(documents[number]))
        gold: dict[str, set[str]] = {}
        for example in examples:
            gold.setdefault(_question(example), set()).update(map(_text, example.gold_docs))
        self._gold = [gold[_question(example)] for example in examples]

    @property
    def depth(self) -> int:
        """How many passages a ranking needs, for the last rank to be among them."""
        return self.arguments.negatives_to_rank + max(map(len, self._gold), default=0)

    def __call__(self, example: int, ids: Sequence[int], scores: Sequence[float]) -> list[int]:
        """The hard negatives in one question's ranking, best first.

        Args:
            example: The question's position among the examples.
            ids: The ranking's positions in the database, best first; -1 stands for none. [k]
            scores: Theirs. [k]
        """
        gold_score = -np.inf
        ranked: dict[str, tuple[int, float]] = {}
        for number, score in zip(ids, scores, strict=True):
            if number < 0:
                continue
            text = self.text_of(number)
            if text in self._gold[example]:
                gold_score = max(gold_score, score)
                self.counts["passages left out as gold"] += 1
            else:
                ranked.setdefault(text, (number, score))
        highest = self.arguments.highest_score(gold_score)
        window = list(ranked.values())[self.arguments.negatives_from_rank - 1 : self.arguments.negatives_to_rank]
        chosen = [number for number, score in window if score <= highest]
        self.counts["searches that found a gold passage"] += bool(gold_score > -np.inf)
        self.counts["passages left out by their score"] += len(window) - len(chosen)
        return chosen


def _text(document: Document) -> str:
    return fingerprint(normalize(document.page_content))


def _question(example: Example) -> str:
    return fingerprint(normalize(retrieval_query(example)))


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


@dataclass(frozen=True)
class ContrastiveBatch(EncoderBatch):
    """Questions, and the documents that they are told apart from.

    Attributes:
        documents: The documents' numbers: equal for the same document, in every process. [P]
        targets: The number of each question's own positive, one of `documents`. [B]
        gold: Numbers of all gold documents of each question, padded with -1. [B, G]
    """

    documents: Tensor
    targets: Tensor
    gold: Tensor


class Contrastive(EncoderObjective):
    """Softmax over the batch's documents, those of all processes included."""

    def forward(self, batch: ContrastiveBatch) -> tuple[Tensor, dict[str, float]]:
        """The loss summed over questions, and how often the positive ranks first. -> []"""
        queries = self.embed_queries(batch.queries)  # [B, D]
        passages = gather_rows(self.embed_passages(batch.passages))  # [P, D]
        documents = gather_rows(batch.documents)  # [P]
        with autocast(queries.device, torch.float32):  # the index compares in float32, too
            similarity = queries @ passages.T / self.temperature  # [B, P]
        losses, first = contrastive(similarity, documents, batch.targets, batch.gold)
        return losses.sum(), {"accuracy": float(first.float().mean())}


@dataclass
class HardNegativeArguments:
    """How many hard negatives a batch holds."""

    hard_neg_ratio: float = field(
        default=0.0, metadata={"help": "Hard negatives sampled for a batch, as a share of its questions."}
    )
    num_hard_negatives: int = field(default=0, metadata={"help": "Hard negatives a question; replaces the ratio."})

    def __post_init__(self) -> None:
        check_bounds(self, "hard_neg_ratio", "num_hard_negatives", at_least=0)

    def sample(self, pools: Sequence[Sequence[Document]], chance: random.Random) -> list[Document]:
        """Hard negatives of a batch, from those of each of its questions."""
        if self.num_hard_negatives:
            return [d for pool in pools for d in chance.sample(pool, min(self.num_hard_negatives, len(pool)))]
        together = [document for pool in pools for document in pool]
        return chance.sample(together, min(math.ceil(self.hard_neg_ratio * len(pools)), len(together)))


class Contrasts:
    """The collate function: a gold passage of each question, sampled hard negatives, each distinct document once.

    Args:
        documents: The database; examples may bring others.
        hard: What hard negatives are sampled from, by the example's number.
        seed: Of what is sampled; a batch of the same examples is the same batch.

    Raises:
        UserError: an example has no gold passage.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        documents: Sequence[Document],
        encoder: Encoder,
        hard: MinedNegatives | Sequence[Sequence[Document]],
        arguments: HardNegativeArguments,
        seed: int,
    ) -> None:
        unique = {document.key: document for document in documents}
        for example in examples:
            if not example.gold_docs:
                raise UserError(f"{example.where}: field 'gold_docs' is empty; CTL needs a gold passage")
            unique |= {d.key: d for d in (*example.gold_docs, *example.hard_neg_docs) if d.key not in unique}
        self.examples = examples
        self.hard = hard
        self.arguments = arguments
        self.seed = seed
        self._numbers = {key: number for number, key in enumerate(unique)}
        self._queries = encoder.tokenize_queries([retrieval_query(example) for example in examples])
        self._passages = encoder.tokenize_passages([document.fmt_content for document in unique.values()])

    def __call__(self, indices: Sequence[int]) -> ContrastiveBatch:
        """One micro-batch."""
        chance = random.Random(f"{self.seed}-{indices}")
        gold = [[self._numbers[document.key] for document in self.examples[i].gold_docs] for i in indices]
        targets = [chance.choice(numbers) for numbers in gold]
        negatives = self.arguments.sample([self.hard[i] for i in indices], chance)
        documents = list(dict.fromkeys([*targets, *(self._numbers[document.key] for document in negatives)]))
        return ContrastiveBatch(
            queries=[self._queries[i] for i in indices],
            passages=[self._passages[number] for number in documents],
            documents=torch.tensor(documents),
            targets=torch.tensor(targets),
            gold=pad_sequence([torch.tensor(row) for row in gold], batch_first=True, padding_value=-1),
            indices=indices,
        )
