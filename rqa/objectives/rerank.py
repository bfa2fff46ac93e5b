"""RERANK: a cross-encoder learns which passage answers a question (Nogueira & Cho 2019; Gao et al. 2021, LCE).

A question's gold passage stands among hard negatives, from the data file or from a ranking, by CTL's rule, and among
other questions' gold passages. With a teacher the whole list is scored, and the teacher's distribution learned.
"""

import logging
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
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
    num_other_gold: int = flag(2, "Gold passages of other questions beside them, if there is no teacher.")
    negatives_from: str = flag(
        "bm25", "First stage, whose ranking holds negatives; or file: hard_neg_docs.", ["bm25", "dense", "both", "file"]
    )
    negatives_to_rank: int = flag(20, "Worst rank of a hard negative; gold passages are not counted.", rare=True)
    mine_negatives: bool = flag(False, "Whether negatives are chosen anew, by what the reranker itself ranks first.")
    refresh_step: str = flag("100", 'Steps between two choices, or spans such as "0-100:10,100-900:50".', rare=True)

    def check(self) -> None:
        self.check_bounds("num_hard_negatives", at_least=1)
        self.check_bounds("num_other_gold", at_least=0)
        parse_schedule(self.refresh_step)


@dataclass(frozen=True)
class RerankBatch(Batch):
    """B questions with K passages at most, all their pairs laid end to end."""

    pairs: TokenBatch  # [N]
    columns: Tensor  # which pair each question's k-th passage is in, -1 where it has fewer. [B, K]
    teacher: Tensor  # the teacher's logits, -inf where there is no passage; of gold 0, and -inf beside it. [B, K]
    indices: Sequence[int]  # the examples' numbers in their file
    news: dict[str, float]  # share of the teacher's scores, so far in this run, that did not have to be computed

    @property
    def weight(self) -> int:
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
        student = self.reranker(batch.pairs)[batch.columns].masked_fill(batch.columns < 0, float("-inf"))  # [B, K]
        first = (student.argmax(-1) == batch.teacher.argmax(-1)).float().mean()
        return distillation(batch.teacher, student).sum(), {"accuracy": first, **batch.news}

    def save_pretrained(self, directory: str | Path) -> None:
        self.reranker.save_pretrained(directory)


class Lists:
    """The collate function: one of a question's gold passages, if there is any, then sampled negatives.

    A batch of the same examples is the same batch, for as long as negatives are. Other questions' gold passages are
    among them, or a reranker learns what gold looks like and not what is asked. `together`: a teacher's score depends
    on the whole list, which is always the best of the ranking, and so is read once.
    """

    def __init__(
        self, examples: Sequence[Example], documents: Sequence[Document], reranker: Reranker,
        mined: MinedNegatives | None, flags: RerankArguments, seed: int, teacher: Any = None, together: bool = False,
    ) -> None:  # fmt: skip
        known, rows = numbered(documents, [(*example.gold_docs, *example.hard_neg_docs) for example in examples])
        self._gold, hard, same = [], [], defaultdict(set)
        for example, row in zip(examples, rows, strict=True):
            if not example.gold_docs and not teacher:
                raise UserError(f"{example.where}: field 'gold_docs' is empty; give a gold passage, or --teacher")
            texts = normalized_of([*example.gold_docs, *example.hard_neg_docs]).tolist()
            distinct = dict(zip(reversed(texts), reversed(row), strict=True))  # of equal texts the first
            self._gold.append(row[: len(example.gold_docs)])
            hard.append([number for number in reversed(distinct.values()) if number not in self._gold[-1]])
            same[retrieval_query(example)].update(self._gold[-1])
        if not mined and (left_out := sum(map(len, rows)) - sum(map(len, [*self._gold, *hard]))):
            log.warning("%d passages of hard_neg_docs are left out: they are gold, or stand there twice", left_out)
        self._own = [same[retrieval_query(example)] for example in examples]  # in whatever line it is gold
        self._golds = [] if teacher else sorted(set().union(*self._own))
        self.examples, self.documents, self.reranker, self.teacher = examples, known, reranker, teacher
        self.hard, self.flags, self.seed, self.together = mined or hard, flags, seed, together
        self.ahead = not (teacher or flags.mine_negatives)  # these take turns with steps

    def __call__(self, indices: Sequence[int]) -> RerankBatch:
        pairs, rows = [], [[self.documents[number] for number in row] for row in self.chosen(indices)]
        for i, row in zip(indices, rows, strict=True):
            pairs += [Pair(self.examples[i], each, tuple(row) if self.together else ()) for each in row]
        present = torch.arange(max(1, *map(len, rows))) < torch.tensor(list(map(len, rows)))[:, None]  # [B, K]
        columns, teacher = torch.full(present.shape, -1), torch.full(present.shape, float("-inf"))
        columns[present] = torch.arange(len(pairs))
        if self.teacher:
            teacher[present] = torch.tensor(self.teacher(pairs)) / self.flags.teacher_temperature
        else:
            teacher[:, 0] = 0.0
        texts = [(retrieval_query(pair.example), pair.document.fmt_content) for pair in pairs]
        batch = self.reranker.collate(self.reranker.tokenize(texts) if texts else [[0]])  # a model reads one at least
        news = {"teacher_hit_rate": self.teacher.hit_rate} if self.teacher else {}
        return RerankBatch(batch, columns, teacher, indices, news)

    def chosen(self, indices: Sequence[int]) -> list[list[int]]:
        """The numbers of each question's passages."""
        chance, flags, rows = random.Random(f"{self.seed}-{indices}"), self.flags, []
        for i in indices:
            row = chance.sample(self._gold[i], min(1, len(self._gold[i])))
            pool = [number for number in self.hard[i] if number not in self._own[i]]
            count = min(flags.num_hard_negatives, len(pool))
            row += pool[:count] if self.together else chance.sample(pool, count)
            barred = {*self._own[i], *row}
            drawn = chance.sample(self._golds, min(len(barred) + flags.num_other_gold, len(self._golds)))
            rows.append(row + [number for number in drawn if number not in barred][: flags.num_other_gold])
        return rows
