"""RERANK: a cross-encoder learns which passage answers a question (Nogueira & Cho 2019; Gao et al. 2021, LCE).

A question's gold passage stands among hard negatives of its own, from the data file or from a ranking, by CTL's rule;
with a teacher the whole list is scored, and the teacher's distribution learned. Gold is a teacher that has no doubt.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rqa.data import Document, Example
from rqa.models.reranker import Reranker
from rqa.objectives.ctl import MinedNegatives, NegativeArguments
from rqa.objectives.encoding import numbered
from rqa.objectives.losses import distillation
from rqa.objectives.teacher import DistilledArguments, Pair
from rqa.packing import Batch, TokenBatch
from rqa.prompts import retrieval_query
from rqa.retrieval.refresh import parse_schedule
from rqa.retrieval.reranking import RerankingRetriever
from rqa.runtime.errors import UserError
from rqa.runtime.flags import flag

FIRST_STAGES = {"bm25": "bm25", "dense": "dense", "both": "hybrid"}


@dataclass(kw_only=True)
class RerankArguments(NegativeArguments, DistilledArguments):
    """RERANK's own flags."""

    lm_model_path: str | None = flag(
        None, "Teacher of the whole list: reranker::M, a language model, or openai::URL. Default: gold passages teach.",
        also="teacher",
    )  # fmt: skip
    num_hard_negatives: int = flag(8, "Passages that a question's gold passage stands among.")
    negatives_from: str = flag(
        "bm25", "Who ranks them: BM25, an encoder, both, or file: the examples' hard_neg_docs.",
        choices=["bm25", "dense", "both", "file"],
    )  # fmt: skip
    negatives_to_rank: int = flag(20, "Worst rank of a hard negative; gold passages are not counted.", rare=True)
    mine_negatives: bool = flag(False, "Whether negatives are chosen anew, by what the reranker itself ranks first.")
    refresh_step: str = flag("100", 'Steps between two choices, or spans such as "0-100:10,100-900:50".', rare=True)
    embedding_model: str | None = flag(
        None, "Encoder of the first stage: a directory or a hub name.",
        also="embedding_model_name_or_path eval_embedding_model",
    )  # fmt: skip

    def check(self) -> None:
        self.check_bounds("num_hard_negatives", at_least=1)
        parse_schedule(self.refresh_step)
        if self.mine_negatives and self.negatives_from == "file":
            raise UserError("--mine_negatives true: passages of a file do not change; choose another --negatives_from")


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
    """The collate function: a gold passage of each question first, if there is one, then sampled hard negatives.

    A batch of the same examples is the same batch, for as long as negatives are. `teacher` gives the scores of pairs,
    which are divided by `temperature`; without one the gold passage is certain.
    """

    def __init__(
        self, examples: Sequence[Example], documents: Sequence[Document], reranker: Reranker,
        mined: MinedNegatives | None, flags: RerankArguments, seed: int, teacher: Any = None,
    ) -> None:  # fmt: skip
        for example in examples:
            if not example.gold_docs and not teacher:
                raise UserError(
                    f"{example.where}: field 'gold_docs' is empty; RERANK needs a gold passage or --teacher"
                )
        known, rows = numbered(documents, [(*example.gold_docs, *example.hard_neg_docs) for example in examples])
        self._gold = [row[: len(example.gold_docs)] for row, example in zip(rows, examples, strict=True)]
        hard = [row[len(example.gold_docs) :] for row, example in zip(rows, examples, strict=True)]
        self.examples, self.documents, self.reranker = examples, known, reranker
        self.hard, self.flags, self.seed, self.teacher = mined or hard, flags, seed, teacher
        self.ahead = not (teacher or flags.mine_negatives)  # these take turns with steps

    def __call__(self, indices: Sequence[int]) -> RerankBatch:
        chance, size = random.Random(f"{self.seed}-{indices}"), self.flags.num_hard_negatives + 1
        rows = []
        for i in indices:
            gold, pool = chance.sample(self._gold[i], min(1, len(self._gold[i]))), self.hard[i]
            rows.append(gold + chance.sample(pool, min(size - len(gold), len(pool))))
        present = torch.arange(size) < torch.tensor(list(map(len, rows)))[:, None]  # [B, K]
        columns = (present.flatten().cumsum(0) - 1).view_as(present).clamp(min=0)
        pairs = [Pair(self.examples[i], self.documents[n]) for i, row in zip(indices, rows, strict=True) for n in row]
        teacher = torch.full(present.shape, float("-inf"))
        if self.teacher:
            teacher[present] = torch.tensor(self.teacher(pairs)) / self.flags.teacher_temperature
        else:
            teacher[:, 0] = 0.0
        texts = [(retrieval_query(pair.example), pair.document.fmt_content) for pair in pairs]
        return RerankBatch(
            pairs=self.reranker.collate(self.reranker.tokenize(texts)), columns=columns, teacher=teacher,
            present=present, indices=indices, hit_rate=self.teacher.hit_rate if self.teacher else 1.0,
        )  # fmt: skip


class MinedAgain:
    """`before_step` of the loop, and a `LiveState`: on schedule, negatives are what the reranker now ranks first."""

    def __init__(self, mined: MinedNegatives, retriever: RerankingRetriever, schedule: str) -> None:
        """`retriever` ranks with the very reranker that is trained."""
        self.mined, self.retriever = mined, retriever
        self.version: str | None = None
        self._spans = parse_schedule(schedule)

    def __call__(self, step: int) -> dict[str, float]:
        if step and any(first <= step < end and step % every == 0 for first, end, every in self._spans):
            self.mined.retriever = self.retriever
            self.mined()
            self.version = f"index-{step}"
        return {}

    def collect(self) -> None:
        """Nothing: every process has all negatives."""

    def save(self, directory: Path) -> None:
        self.mined.save(directory)

    def load(self, directory: Path) -> None:
        self.mined.load(directory)
        self.version = directory.name
