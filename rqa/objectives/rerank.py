"""RERANK: a cross-encoder learns which passage answers a question (Nogueira & Cho 2019; Gao et al. 2021, LCE).

A question's gold passage stands among hard negatives of its own, from the data file or from a ranking, by CTL's rule;
with a teacher the whole list is scored, and the teacher's distribution learned. Gold is a teacher that has no doubt.
"""

import logging
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rqa.data import Document, Example
from rqa.documents import normalized_of
from rqa.models.reranker import Reranker
from rqa.objectives.ctl import MinedNegatives, NegativeArguments
from rqa.objectives.encoding import numbered
from rqa.objectives.losses import distillation
from rqa.objectives.teacher import DistilledArguments, Pair
from rqa.packing import Batch, TokenBatch
from rqa.prompts import retrieval_query
from rqa.retrieval.refresh import parse_schedule
from rqa.runtime.errors import UserError
from rqa.runtime.flags import flag

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class RerankArguments(NegativeArguments, DistilledArguments):
    """RERANK's own flags."""

    lm_model_path: str | None = flag(
        None, "Teacher of whole lists: reranker::M, a language model, openai::URL, or a FiD reader. Default: gold.",
        also="teacher",
    )  # fmt: skip
    num_hard_negatives: int = flag(8, "Hard negatives of a question in one step, at most.")
    num_other_gold: int = flag(
        2, "Other questions' gold passages among a question's negatives, or a passage would be right for any question; "
        "not with --teacher.", rare=True,
    )  # fmt: skip
    negatives_from: str = flag(
        "bm25", "First stage, whose ranking holds the negatives; file: the examples' hard_neg_docs instead.",
        choices=["bm25", "dense", "both", "file"],
    )  # fmt: skip
    negatives_to_rank: int = flag(20, "Worst rank of a hard negative; gold passages are not counted.", rare=True)
    mine_negatives: bool = flag(False, "Whether negatives are chosen anew, by what the reranker itself ranks first.")
    refresh_step: str = flag("100", 'Steps between two choices, or spans such as "0-100:10,100-900:50".', rare=True)

    def check(self) -> None:
        self.check_bounds("num_hard_negatives", at_least=1)
        self.check_bounds("num_other_gold", at_least=0)
        parse_schedule(self.refresh_step)
        lacks = {"refresh_step": not self.mine_negatives and "--mine_negatives true",
                 "lm_temperature": not self.lm_model_path and "--teacher",
                 "num_other_gold": self.lm_model_path and "--teacher left out"}  # fmt: skip
        if self.negatives_from == "file":
            ranked = [item.name for item in fields(NegativeArguments)]
            lacks |= dict.fromkeys([*ranked, "mine_negatives"], "a ranking: --negatives_from bm25, dense or both")
        for name, needed in lacks.items():
            if needed and getattr(self, name) != getattr(RerankArguments, name):
                raise UserError(f"--{name} {getattr(self, name)}: has no effect without {needed}")
        room = self.negatives_to_rank - self.negatives_from_rank + 1
        if self.negatives_from != "file" and self.num_hard_negatives > room:
            raise UserError(f"--negatives_to_rank {self.negatives_to_rank}: leaves {room} hard negatives; raise it")


@dataclass(frozen=True)
class RerankBatch(Batch):
    """B questions with K passages at most, all their pairs laid end to end."""

    pairs: TokenBatch  # [N]
    columns: Tensor  # which pair each question's k-th passage is in. [B, K]
    teacher: Tensor  # the teacher's logits; of gold passages alone 0, and -inf for others. [B, K]
    present: Tensor  # whether a question has so many passages. [B, K]
    indices: Sequence[int]  # the examples' numbers in their file
    hit_rate: float  # share of the teacher's scores, so far in this run, that did not have to be computed

    @property
    def weight(self) -> int:
        """Questions, whatever their lists are."""
        return len(self.teacher)

    @property
    def num_tokens(self) -> int:
        return len(self.pairs.rows)


class ListwiseReranking(nn.Module):
    """KL divergence between a teacher's softmax over a question's passages and the reranker's."""

    def __init__(self, reranker: Reranker) -> None:
        super().__init__()
        self.reranker = reranker

    def forward(self, batch: RerankBatch) -> tuple[Tensor, dict[str, Tensor | float]]:
        """The loss summed over questions, and how often the teacher's first passage ranks first. -> []"""
        scores = self.reranker(batch.pairs)  # [N]
        student = scores[batch.columns].masked_fill(~batch.present, float("-inf"))  # [B, K]
        first = (student.argmax(-1) == batch.teacher.argmax(-1)).float().mean()
        return distillation(batch.teacher, student).sum(), {"accuracy": first, "teacher_hit_rate": batch.hit_rate}

    def save_pretrained(self, directory: str | Path) -> None:
        self.reranker.save_pretrained(directory)


class Lists:
    """The collate function: one of a question's gold passages first, if there is one, then sampled hard negatives.

    A batch of the same examples is the same batch, for as long as negatives are. Passages with the text of any gold
    passage of the question are no negatives. A teacher's scores are divided by its temperature; without one the gold
    passage is certain. `together`: a score depends on the whole list, which is then always the best-ranked negatives.
    """

    def __init__(
        self, examples: Sequence[Example], documents: Sequence[Document], reranker: Reranker,
        mined: MinedNegatives | None, flags: RerankArguments, seed: int, teacher: Any = None, together: bool = False,
    ) -> None:  # fmt: skip
        for example in examples:
            if not example.gold_docs and not teacher:
                raise UserError(
                    f"{example.where}: field 'gold_docs' is empty; RERANK needs a gold passage or --teacher"
                )
        known, rows = numbered(documents, [(*example.gold_docs, *example.hard_neg_docs) for example in examples])
        self._gold = [row[: len(example.gold_docs)] for row, example in zip(rows, examples, strict=True)]
        hard = []
        for example, row, gold in zip(examples, rows, self._gold, strict=True):
            texts = dict(zip(normalized_of(example.hard_neg_docs).tolist(), row[len(gold) :], strict=True))
            hard.append([texts[text] for text in texts if text not in {*normalized_of(example.gold_docs).tolist()}])
        left_out = sum(map(len, rows)) - sum(map(len, [*self._gold, *hard]))
        if left_out and not mined:
            log.warning("%d passages of hard_neg_docs are left out: they are gold, or stand there twice", left_out)
        golds: dict[str, list[int]] = defaultdict(list)  # of each question, in whatever line it is
        for example, gold in zip(examples, self._gold, strict=True):
            golds[retrieval_query(example)] += gold
        self._own = [golds[retrieval_query(example)] for example in examples]
        self._golds = [] if teacher else sorted(set().union(*golds.values()))
        self.examples, self.documents, self.reranker = examples, known, reranker
        self.hard, self.flags, self.seed = mined or hard, flags, seed
        self.teacher, self.together = teacher, together
        self.ahead = not (teacher or flags.mine_negatives)  # these take turns with steps

    def count(self) -> None:
        """Say how many questions teach nothing, as they have no two passages; that all do is refused."""
        numbers = range(len(self.examples))
        lacking = sum(len(self.hard[i]) + min(1, len(self._gold[i])) < 2 for i in numbers)
        if lacking == len(numbers):
            cure = "give the examples hard_neg_docs, or choose another --negatives_from or rank"
            raise UserError(f"--negatives_from {self.flags.negatives_from}: no question gets a negative; {cure}")
        if lacking:
            log.warning("%d of %d questions have no two passages to rank, and teach nothing", lacking, len(numbers))

    def __call__(self, indices: Sequence[int]) -> RerankBatch:
        chance, hard, other = (
            random.Random(f"{self.seed}-{indices}"),
            self.flags.num_hard_negatives,
            self.flags.num_other_gold,
        )
        pairs, lengths = [], []
        for i in indices:
            gold, pool = chance.sample(self._gold[i], min(1, len(self._gold[i]))), self.hard[i]
            chosen = pool[:hard] if self.together else chance.sample(pool, min(hard, len(pool)))
            barred = {*self._own[i], *chosen}
            drawn = chance.sample(self._golds, min(len(barred) + other, len(self._golds)))
            chosen += [number for number in drawn if number not in barred][:other]
            shown = tuple(self.documents[number] for number in gold + chosen)
            pairs += [Pair(self.examples[i], each, shown if self.together else ()) for each in shown]
            lengths.append(len(shown))
        present = torch.arange(1 + hard + other) < torch.tensor(lengths)[:, None]  # [B, K]
        columns = (present.flatten().cumsum(0) - 1).view_as(present).clamp(min=0)
        teacher = torch.full(present.shape, float("-inf"))
        if self.teacher:
            teacher[present] = torch.tensor(self.teacher(pairs)) / self.flags.teacher_temperature
        else:
            teacher[:, 0] = 0.0
        texts = [(retrieval_query(pair.example), pair.document.fmt_content) for pair in pairs]
        sequences = self.reranker.tokenize(texts) if texts else [[0]]  # a model reads one at least
        return RerankBatch(
            pairs=self.reranker.collate(sequences), columns=columns, teacher=teacher, present=present, indices=indices,
            hit_rate=self.teacher.hit_rate if self.teacher else 1.0,
        )  # fmt: skip
