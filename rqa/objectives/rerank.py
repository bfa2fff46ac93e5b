"""RERANK: a cross-encoder learns which passage answers a question (Nogueira & Cho 2019; Gao et al. 2021, LCE).

It ranks a question's gold passage against hard negatives, from the data file or from a ranking by CTL's rule, and
against other questions' gold passages. With a teacher it learns the teacher's distribution over the whole list.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from rqa.data import Document, Example
from rqa.models.encoder_decoder import EncoderDecoderArguments
from rqa.models.reranker import Reranker
from rqa.objectives.ctl import MinedNegatives, NegativeArguments, gold_and_hard
from rqa.objectives.losses import distillation
from rqa.objectives.teacher import DistilledArguments, score_lists
from rqa.packing import Batch, TokenBatch
from rqa.prompts import retrieval_query
from rqa.retrieval.refresh import schedule
from rqa.runtime.errors import UserError
from rqa.runtime.flags import flag


@dataclass(kw_only=True)
class RerankArguments(NegativeArguments, DistilledArguments, EncoderDecoderArguments):
    """RERANK's own flags."""

    lm_model_path: str | None = flag(
        None, "Teacher: reranker::M, a language model, openai::URL or a FiD reader. Default: the gold passages.",
        also="teacher",
    )  # fmt: skip
    max_encoder_seq_length: int = flag(512, "Tokens of question and one passage for a FiD reader, at most.", rare=True)
    prompt_template: str | None = flag(None, "Text file with {passage} and {question} for a FiD reader.", rare=True)
    num_hard_negatives: int = flag(8, "Hard negatives of each question in a step, at most.")
    num_other_gold: int = flag(2, "Gold passages of other questions as negatives, without a teacher.")
    negatives_from: str = flag(
        "bm25", "Ranking that holds negatives, or file for hard_neg_docs.", ["bm25", "dense", "both", "file"]
    )
    negatives_to_rank: int = flag(20, "Last rank of hard negatives (gold passages are not counted).", rare=True)
    mine_negatives: bool = flag(False, "Whether to mine negatives during training, by the reranker's own ranking.")
    refresh_step: str = flag(
        "100", 'Steps between two rounds of mining, or spans such as "0-100:10,100-900:50".', rare=True
    )

    def check(self) -> None:
        self.check_bounds("num_hard_negatives", at_least=1)
        self.check_bounds("num_other_gold", at_least=0)
        schedule(self.refresh_step)


@dataclass(frozen=True)
class RerankBatch(Batch):
    """B questions with at most K passages each, as N packed pairs of texts."""

    pairs: TokenBatch  # [N]
    columns: Tensor  # the pair of each question's k-th passage, -1 where it has fewer. [B, K]
    teacher: Tensor  # the teacher's logits, -inf where there is no passage; without a teacher 0 for gold alone. [B, K]
    indices: Sequence[int]  # the examples' numbers in their file
    news: dict[str, float]  # share of the teacher's scores in this run that came from the cache

    @property
    def weight(self) -> int:
        return len(self.teacher)


class ListwiseReranking(nn.Module):
    """KL divergence between a teacher's softmax over a question's passages and the reranker's."""

    def __init__(self, reranker: Reranker, faster: float = 1) -> None:
        super().__init__()
        self.reranker, self.faster = reranker, faster

    def forward(self, batch: RerankBatch) -> tuple[Tensor, dict[str, Tensor | float]]:
        """The loss summed over questions, and how often the teacher's best passage ranks first. -> []"""
        student = self.reranker(batch.pairs)[batch.columns].masked_fill(batch.columns < 0, float("-inf"))  # [B, K]
        first = (student.argmax(-1) == batch.teacher.argmax(-1)).float().mean()
        return distillation(batch.teacher, student).sum(), {"accuracy": first, **batch.news}

    def save_pretrained(self, directory: str | Path) -> None:
        self.reranker.save_pretrained(directory)


class Lists:
    """The collate function: one of a question's gold passages, if it has any, then sampled negatives.

    The same indices give the same batch until new negatives are mined. Without other questions' gold passages among
    the negatives, a reranker could tell gold by its looks and ignore the question. `together`: a teacher's score
    depends on the whole list, so the list is always the top of the ranking, which the teacher scores once.
    """

    def __init__(
        self, examples: Sequence[Example], documents: Sequence[Document], reranker: Reranker,
        mined: MinedNegatives | None, flags: RerankArguments, seed: int, teacher: Any = None, together: bool = False,
    ) -> None:  # fmt: skip
        known, self._gold, self._own, hard = gold_and_hard(examples, documents, reads_hard=not mined)
        for example in examples:
            if not example.gold_docs and not teacher:
                raise UserError(f"{example.where}: field 'gold_docs' is empty; give a gold passage, or --teacher")
        self._golds = [] if teacher else sorted(set().union(*self._own))
        self.examples, self.documents, self.reranker, self.teacher = examples, known, reranker, teacher
        self.hard, self.flags, self.seed, self.together = mined or hard, flags, seed, together
        self.ahead = not (teacher or flags.mine_negatives)  # these use the device, or change between steps

    def __call__(self, indices: Sequence[int]) -> RerankBatch:
        rows = [[self.documents[number] for number in row] for row in self.chosen(indices)]
        examples, temperature = [self.examples[i] for i in indices], self.flags.teacher_temperature
        pairs, columns, scores = score_lists(self.teacher, examples, rows, temperature, self.together)
        texts = [(retrieval_query(pair.example), pair.document.fmt_content) for pair in pairs]
        batch = self.reranker.collate(self.reranker.tokenize(texts) if texts else [[0]])  # never an empty batch
        news = {"teacher_hit_rate": self.teacher.hit_rate} if self.teacher else {}
        return RerankBatch(batch, columns, scores, indices, news)

    def chosen(self, indices: Sequence[int]) -> list[list[int]]:
        """The numbers of each question's passages."""
        chance, flags, rows = random.Random(f"{self.seed}-{indices}"), self.flags, []
        for i in indices:
            row = chance.sample(self._gold[i], min(1, len(self._gold[i])))
            pool, count = self.hard[i], min(flags.num_hard_negatives, len(self.hard[i]))
            row += pool[:count] if self.together else chance.sample(pool, count)
            barred = {*self._own[i], *row}
            drawn = chance.sample(self._golds, min(len(barred) + flags.num_other_gold, len(self._golds)))
            rows.append(row + [number for number in drawn if number not in barred][: flags.num_other_gold])
        return rows
