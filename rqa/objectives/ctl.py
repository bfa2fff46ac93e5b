"""CTL: contrastive learning of the encoder (Karpukhin et al. 2020, DPR; Wang et al. 2022, E5; Gao et al. 2021).

Hard negatives come from the data file, or from rankings by the rule of `NegativeChooser`: `bin/mine_negatives` mines
them beforehand, `MinedNegatives` from the live retriever in the training loop (Xiong et al. 2021, ANCE).
"""

import json
import logging
import math
import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import numpy as np
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rqa.data import Document, Example, normalize
from rqa.documents import normalized_of
from rqa.models.encoder import Encoder
from rqa.objectives.encoding import ChunkArguments, EncoderBatch, EncoderObjective, Tokens, in_chunks, numbered
from rqa.objectives.losses import contrastive
from rqa.prompts import retrieval_query
from rqa.retrieval.refresh import RefreshArguments
from rqa.retrieval.retriever import PassageRetriever
from rqa.runtime import distributed
from rqa.runtime.errors import UserError
from rqa.runtime.files import read_json
from rqa.runtime.flags import Arguments, flag

log = logging.getLogger(__name__)

QUERIES_AT_ONCE = 4096  # bounds the memory of rankings


@dataclass(kw_only=True)
class NegativeArguments(Arguments):
    """Choice of hard negatives from a ranking."""

    negatives_from_rank: int = flag(1, "First rank of hard negatives (gold passages are not counted).")
    negatives_to_rank: int = flag(100, "Last rank of hard negatives (gold passages are not counted).")
    negatives_max_share: float | None = flag(
        None, "Highest score of a hard negative as a share of the best gold passage's, such as 0.95; questions whose "
        "gold passage is not found get none. Default: any score.",
    )  # fmt: skip

    def check(self) -> None:
        self.check_bounds("negatives_from_rank", at_least=1)
        self.check_bounds("negatives_max_share", above=0, at_most=1)
        if self.negatives_to_rank < self.negatives_from_rank:
            raise UserError(f"--negatives_to_rank {self.negatives_to_rank}: must be at least --negatives_from_rank")


@dataclass(kw_only=True)
class CTLArguments(RefreshArguments, NegativeArguments, ChunkArguments):
    """CTL's own flags."""

    per_device_train_batch_size: int = flag(32, "Questions in one forward pass of training.")
    num_train_epochs: float = flag(4.0, "Passes over the training file.")
    temperature: float = flag(0.05, "Temperature that similarities are divided by.")
    num_hard_negatives: int | None = flag(
        None, "Hard negatives of each question. Default: 2, or 0 with hard_neg_ratio."
    )
    hard_neg_ratio: float = flag(0.0, "Hard negatives of a batch as a share of its questions.", rare=True)
    mine_negatives: bool | None = flag(
        None, "Whether to mine hard negatives during training, besides hard_neg_docs. Default: true."
    )
    negatives_from: str = flag("both", "Rankings to mine: the live retriever's, or also BM25's.", ["dense", "both"])
    negatives_to_rank: int = flag(20, "Last rank of hard negatives (gold passages are not counted).", rare=True)
    refresh_step: str = flag("100", 'Steps between two rounds of mining, or spans such as "0-100:10,100-900:50".')

    def check(self) -> None:
        self.check_bounds("hard_neg_ratio", "num_hard_negatives", at_least=0)
        self.check_bounds("temperature", above=0)
        if self.num_hard_negatives and self.hard_neg_ratio:
            raise UserError("--hard_neg_ratio: contradicts --num_hard_negatives; remove one")
        if self.num_hard_negatives is None:
            self.num_hard_negatives = 0 if self.hard_neg_ratio else 2
        count = self.num_hard_negatives or self.hard_neg_ratio
        self.mine_negatives = bool(count) if self.mine_negatives is None else self.mine_negatives
        room = self.negatives_to_rank - self.negatives_from_rank + 1
        if self.mine_negatives and not count:
            raise UserError("--mine_negatives true: contradicts --num_hard_negatives 0; remove one")
        if self.mine_negatives and count > room:
            given = f"--negatives_to_rank {self.negatives_to_rank}"
            raise UserError(f"{given}: leaves only {room} hard negatives per question; raise it")
        window = [item.name for item in fields(NegativeArguments)] + ["refresh_step", "refresh_async", "negatives_from"]
        stray = [name for name in window if getattr(self, name) != getattr(CTLArguments, name)]
        if stray and not self.mine_negatives:
            raise UserError(f"--{stray[0]}: has no effect without --mine_negatives true; remove it")


@dataclass(frozen=True)
class ContrastiveBatch(EncoderBatch):
    """Questions and documents, with the gold ones of each question."""

    documents: Tensor  # document numbers, the same in every process. [P]
    targets: Tensor  # the number of each question's positive, one of `documents`. [B]
    gold: Tensor  # the numbers of each question's gold documents, padded with -1. [B, G]


class Contrastive(EncoderObjective):
    """Cross-entropy of the positive among the documents of all processes."""

    def forward(self, batch: ContrastiveBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss summed over questions, and the share of positives ranked first. -> []"""
        queries, passages = self.embed(batch)
        passages = distributed.gather_rows(passages)  # [P, D], now of all processes
        documents = distributed.gather_rows(batch.documents)  # [P]
        similarities = self.similarities(queries, passages)  # [B, P] each
        results = [contrastive(each, documents, batch.targets, batch.gold) for each in similarities]
        losses, first = map(torch.stack, zip(*results, strict=True))  # [M, B] x 2
        return losses.mean(0).sum(), {"accuracy": first[0].float().mean()}


class Contrasts:
    """The collate function: a gold passage of each question and sampled hard negatives, each distinct document once.

    Negatives are sampled from `hard_neg_docs` and mined ones. The same indices give the same batch until new negatives
    are mined. Examples may hold documents that the database lacks.
    """

    def __init__(
        self, examples: Sequence[Example], documents: Sequence[Document], encoder: Encoder,
        mined: "MinedNegatives | None", flags: CTLArguments, seed: int,
    ) -> None:  # fmt: skip
        for example in examples:
            if not example.gold_docs:
                raise UserError(f"{example.where}: field 'gold_docs' is empty; CTL needs a gold passage")
        wanted = bool(flags.num_hard_negatives or flags.hard_neg_ratio)
        known, self._gold, self._own, self._hard = gold_and_hard(examples, documents, reads_hard=wanted)
        if wanted and not (mined or any(self._hard)):
            log.warning("no question has hard_neg_docs: all negatives are other questions' gold passages")
        self.encoder, self.mined, self.flags, self.seed = encoder, mined, flags, seed
        self.ahead = not mined  # mined negatives change between steps
        self._queries = Tokens(encoder.tokenize_queries, lambda number: retrieval_query(examples[number]))
        self._passages = Tokens(encoder.tokenize_passages, lambda number: known[number].fmt_content)

    def __call__(self, indices: Sequence[int]) -> ContrastiveBatch:
        chance, size = random.Random(f"{self.seed}-{indices}"), self.flags.chunk_size
        targets = [chance.choice(self._gold[i]) for i in indices]
        pools, count = [self._hard[i] for i in indices], self.flags.num_hard_negatives
        if self.mined:
            pools = [list(dict.fromkeys([*pool, *self.mined[i]])) for pool, i in zip(pools, indices, strict=True)]
        if not count:
            pools, count = [list(chain(*pools))], math.ceil(self.flags.hard_neg_ratio * len(indices))
        negatives = [number for pool in pools for number in chance.sample(pool, min(count, len(pool)))]
        documents = list(dict.fromkeys([*targets, *negatives]))
        return ContrastiveBatch(
            queries=in_chunks(self.encoder, self._queries(indices), size),
            passages=in_chunks(self.encoder.passage_side, self._passages(documents), size),
            documents=torch.tensor(documents),
            targets=torch.tensor(targets),
            gold=pad_sequence([torch.tensor([*self._own[i]]) for i in indices], batch_first=True, padding_value=-1),
            indices=indices,
        )


class NegativeChooser:
    """The rule that chooses hard negatives from a ranking, both for files and in the training loop.

    A passage is gold if its normalised text is that of a gold passage, whatever its source, also if another line of the
    file has it as gold for the same question. Passages of equal text count once, at their best rank.

    With `negatives_max_share`, a ranking without a gold passage gives no negatives: the gold passage scores lower than
    all of it, and passages that outscore gold may well answer the question (de Souza Moreira et al. 2024, NV-Retriever,
    "TopK-PercPos").
    """

    def __init__(self, examples: Sequence[Example], documents: Sequence[Document], flags: NegativeArguments) -> None:
        self.flags = flags
        self.counts: Counter[str] = Counter()  # over all rankings
        self.text_of = normalized_of(documents).__getitem__
        self._gold = of_equal_questions(examples, [normalized_of(e.gold_docs).tolist() for e in examples])

    @property
    def depth(self) -> int:
        """Number of passages that a ranking needs for `negatives_to_rank` of them not to be gold."""
        return self.flags.negatives_to_rank + max(map(len, self._gold), default=0)

    def __call__(self, example: int, ids: Sequence[int], scores: Sequence[float]) -> list[int]:
        """The hard negatives in the ranking of question number `example`, best first.

        `ids` are positions in the database, best first, and -1 where there are fewer than k. [k], [k]
        """
        gold_score = -np.inf
        ranked: dict[bytes, tuple[int, float]] = {}
        for number, score in zip(ids, scores, strict=True):
            if number < 0:
                continue
            text = self.text_of(number)
            if text in self._gold[example]:
                gold_score = max(gold_score, score)
                self.counts["passages left out as gold"] += 1
            else:
                ranked.setdefault(text, (number, score))
        share = self.flags.negatives_max_share
        highest = np.inf if share is None else gold_score - (1 - share) * abs(gold_score)
        window = list(ranked.values())[self.flags.negatives_from_rank - 1 : self.flags.negatives_to_rank]
        chosen = [number for number, score in window if score <= highest]
        self.counts["searches that found a gold passage"] += bool(gold_score > -np.inf)
        self.counts["passages left out by their score"] += len(window) - len(chosen)
        return chosen


def gold_and_hard(
    examples: Sequence[Example], documents: Sequence[Document], reads_hard: bool
) -> tuple[Any, list[list[int]], list[set[int]], list[list[int]]]:
    """The documents, with those appended that only the examples have, and the positions there of passages by example.

    These are its gold passages, all gold passages of its question, and its `hard_neg_docs`. Passages of equal text get
    one position, so a passage with the text of a gold one is no hard negative.
    """
    given = [example.gold_docs for example in examples] + [e.hard_neg_docs if reads_hard else () for e in examples]
    known, rows = numbered(documents, given)
    texts, first = iter(normalized_of(list(chain(*given))).tolist()), dict[Any, int]()
    rows = [list(dict.fromkeys(first.setdefault(next(texts), number) for number in row)) for row in rows]
    gold, hard = rows[: len(examples)], rows[len(examples) :]
    own = of_equal_questions(examples, gold)
    hard = [[number for number in row if number not in barred] for row, barred in zip(hard, own, strict=True)]
    if left_out := sum(map(len, given[len(examples) :])) - sum(map(len, hard)):
        log.warning("%d passages of hard_neg_docs are left out: they are gold, or duplicates", left_out)
    return known, gold, own, hard


def of_equal_questions(examples: Sequence[Example], rows: Sequence[Sequence[Any]]) -> list[set[Any]]:
    """The items in the rows of all examples that ask the same question. [Q] rows -> [Q] sets"""
    questions, items = [normalize(retrieval_query(example)) for example in examples], defaultdict[str, set[Any]](set)
    for question, row in zip(questions, rows, strict=True):
        items[question].update(row)
    return [items[question] for question in questions]


class MinedNegatives:
    """The hard negatives of each training question, mined again after each refresh of the index.

    Those from the ranking of `beside`, a second retriever that does not change, are added.
    """

    def __init__(
        self, examples: Sequence[Example], retriever: PassageRetriever, flags: NegativeArguments,
        beside: PassageRetriever | None = None,
    ) -> None:  # fmt: skip
        self.retriever, self.beside = retriever, beside
        self._chooser = NegativeChooser(examples, retriever.documents, flags)
        self._queries = [retrieval_query(example) for example in examples]
        self._found: list[list[int]] = []

    def __getitem__(self, example: int) -> list[int]:
        """Positions of its hard negatives in the database."""
        return self._found[example]

    def __call__(self) -> None:
        """Mine negatives for all questions with the present index; each process mines its share."""
        self._found = []
        for start in range(0, len(self._queries), QUERIES_AT_ONCE):  # every process must call `retrieve` equally often
            part = distributed.share(range(len(self._queries))[start : start + QUERIES_AT_ONCE])
            self._found += distributed.gather(self._mine(part))
        log.info("hard negatives mined for %d of %d questions", sum(map(bool, self._found)), len(self._found))

    def _mine(self, part: Sequence[int]) -> list[list[int]]:
        rows: list[list[int]] = [[] for _ in part]
        for retriever in filter(None, (self.retriever, self.beside)):
            hits = retriever.retrieve([self._queries[number] for number in part], self._chooser.depth)
            chosen = map(self._chooser, part, hits.ids.tolist(), hits.scores.tolist())
            rows = [[*row, *more] for row, more in zip(rows, chosen, strict=True)]
        return [list(dict.fromkeys(row)) for row in rows]

    def save(self, directory: Path) -> None:
        (directory / "negatives.json").write_text(json.dumps(self._found), encoding="utf-8")

    def load(self, directory: Path) -> None:
        found = read_json(directory / "negatives.json", list)
        if len(found) != len(self._queries):
            raise ValueError("its mined negatives belong to another training file")
        self._found = found
