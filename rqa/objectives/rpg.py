"""RPG: the retriever's distribution over K documents learns a frozen language model's (Shi et al. 2023, REPLUG LSR).

The paper prints KL(retriever || LM); its released code and the default here compute KL(LM || retriever).

DCA and EMDR2 share the batches and the objective over lists of documents, and bring their own teacher or loss.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rqa.data import Document, Example
from rqa.documents import gold_places
from rqa.models.encoder import Encoder
from rqa.objectives.encoding import ChunkArguments, EncoderBatch, EncoderObjective, Tokens, in_chunks
from rqa.objectives.losses import boost_gold, distillation
from rqa.objectives.teacher import DistilledArguments, LanguageModelArguments, score_lists
from rqa.prompts import retrieval_query
from rqa.retrieval.refresh import RefreshArguments
from rqa.retrieval.retriever import Retriever
from rqa.runtime import distributed
from rqa.runtime.flags import flag

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class ListArguments(ChunkArguments):
    """The retriever's distribution over a list of documents."""

    retrieve_temperature: float | None = flag(
        None, "Temperature of the retriever's softmax. Default: standard deviation of scores in the first batch."
    )

    def check(self) -> None:
        self.check_bounds("retrieve_temperature", above=0)


@dataclass(kw_only=True)
class LikelihoodArguments(LanguageModelArguments, RefreshArguments, ListArguments):
    """The documents that the language model scores."""

    num_docs: int = flag(20, "Documents retrieved for each question.")
    include_gold: bool = flag(True, "Whether gold passages that were not found replace the last ones.", rare=True)

    def check(self) -> None:
        self.check_bounds("num_docs", at_least=2)  # the softmax over one is constant


@dataclass(kw_only=True)
class RPGArguments(LikelihoodArguments, DistilledArguments):
    """RPG's own flags."""

    kl_direction: str = flag(
        "lm_to_retriever", "Direction: KL(LM || retriever) as in the released code, or the reverse as in the paper.",
        choices=["lm_to_retriever", "retriever_to_lm"], rare=True,
    )  # fmt: skip


@dataclass(frozen=True)
class ListBatch(EncoderBatch):
    """Questions with K documents each, and the teacher's logits; a question without documents has zero loss."""

    columns: Tensor  # the position of each document in `passages`. [B, K]
    teacher: Tensor  # the teacher's logits, -inf where a question has fewer than K documents. [B, K]
    hit_rate: float = 1.0  # share of the teacher's scores in this run that came from the cache


class ListObjective(EncoderObjective):
    """An objective over K documents of each question, scored by a teacher.

    `losses` maps the teacher's and the retriever's logits to losses: `distillation`, or EMDR2's `marginal_nll`.
    [B, K], [M, B, K] -> [M, B]
    """

    def __init__(
        self, encoder: Encoder, temperature: float | None, losses: Callable[..., Tensor] = distillation,
        dims: Sequence[int] = (),
    ) -> None:  # fmt: skip
        super().__init__(encoder, 1.0, dims)
        self.losses = losses
        self.measured = {"temperature": temperature} if temperature else {}  # saved in checkpoints

    def logits(self, batch: ListBatch) -> Tensor:
        """Similarities over the temperature, -inf where a question has fewer documents. -> [M, B, K]"""
        similarities = self.similarities(*self.embed(batch))  # [B, P] each
        logits = torch.stack([each.gather(1, batch.columns) for each in similarities])
        present = batch.teacher.isfinite()
        if not self.measured:
            self.measured["temperature"] = spread(logits[0].detach(), present)
            log.info("--retrieve_temperature %.3g: is the standard deviation of scores", self.measured["temperature"])
        return (logits / self.measured["temperature"]).masked_fill(~present, float("-inf"))

    def forward(self, batch: ListBatch) -> tuple[Tensor, dict[str, Tensor | float]]:
        """The loss summed over questions, and how often retriever and teacher agree on the first document. -> []"""
        student = self.logits(batch)
        same = (student[0].argmax(-1) == batch.teacher.argmax(-1)).float().mean()
        losses = self.losses(batch.teacher, student).mean(0)  # [B]
        return losses.sum(), {"agreement": same, "teacher_hit_rate": batch.hit_rate}


def spread(scores: Tensor, present: Tensor) -> float:
    """Standard deviation of a question's scores, averaged over all processes' questions. [B, K] x 2 -> a float

    As a temperature it makes scores differ by about one for any encoder. Those of MiniLM have a deviation of 0.05, so
    that dividing by the square root of the width (Izacard & Grave 2020) would give a uniform softmax.
    """
    known = scores.masked_fill(~present, torch.nan)[present.sum(-1) > 1]
    deviations = (known - known.nanmean(-1, keepdim=True)).square().nanmean(-1).sqrt()
    total, count = distributed.total([float(deviations.sum()), len(deviations)])
    return max(total / max(count, 1), 1e-3) if total else 1.0


class RetrievedCandidates:
    """The live retriever's top K documents; gold passages that are missing replace the last ones."""

    def __init__(self, examples: Sequence[Example], retriever: Retriever, flags: LikelihoodArguments) -> None:
        self.examples, self.retriever, self.flags = examples, retriever, flags
        self._gold = gold_places(examples, retriever.documents)

    def __call__(self, indices: Sequence[int]) -> list[list[int]]:
        """Positions in the database, at most K for each example. [B] lists"""
        examples = [self.examples[i] for i in indices]
        hits = self.retriever.retrieve(list(map(retrieval_query, examples)), self.flags.num_docs)
        rows = [[number for number in row if number >= 0] for row in hits.ids.tolist()]
        return list(map(self._with_gold, indices, rows)) if self.flags.include_gold else rows

    def _with_gold(self, example: int, retrieved: list[int]) -> list[int]:
        K, gold = self.flags.num_docs, self._gold[example]
        others = [number for number in retrieved if number not in gold]
        dropped = set(others[max(K - len(gold), 0) :])
        return ([number for number in retrieved if number not in dropped] + sorted(gold.difference(retrieved)))[:K]


class ScoredCandidates:
    """The collate function: chooses candidates, has the teacher score them, and packs each distinct document once."""

    def __init__(
        self, examples: Sequence[Example], documents: Sequence[Document], encoder: Encoder,
        choose: Callable[[Sequence[int]], Sequence[Sequence[int]]],  # example numbers -> positions in `documents`
        teacher: Any,  # pairs -> scores, with an attribute `hit_rate`
        temperature: float = 1.0,  # of the teacher
        chunk_size: int = 0,  # texts encoded at once; 0: all
        together: bool = False,  # whether a document's score depends on the others in its list
        boost: bool = False,  # whether gold documents' scores are raised (`boost_gold`)
    ) -> None:  # fmt: skip
        self.examples, self.documents, self.choose = examples, documents, choose
        self.encoder, self.chunk_size = encoder, chunk_size
        self.teacher, self.temperature, self.together, self.boost = teacher, temperature, together, boost
        self._queries = Tokens(encoder.tokenize_queries, lambda number: retrieval_query(examples[number]))
        self._passages = Tokens(encoder.tokenize_passages, lambda number: documents[number].fmt_content)

    def __call__(self, indices: Sequence[int]) -> ListBatch:
        """One micro-batch; column k is the same document for retriever and teacher."""
        chosen = self.choose(indices)
        # The encoder needs a passage even if nothing was retrieved.
        distinct = list(dict.fromkeys(number for row in chosen for number in row)) or [0]
        position = {number: column for column, number in enumerate(distinct)}
        documents = {number: self.documents[number] for number in distinct}
        rows = [[documents[number] for number in row] for row in chosen]
        examples = [self.examples[i] for i in indices]
        pairs, places, scores = score_lists(self.teacher, examples, rows, self.temperature, self.together)
        if self.boost:
            gold = [document.key in {gold.key for gold in example.gold_docs} for example, document, _ in pairs]
            scores = boost_gold(scores, torch.tensor([*gold, False])[places])
        columns = torch.tensor([*(position[number] for row in chosen for number in row), 0])  # [N + 1]
        return ListBatch(
            queries=in_chunks(self.encoder, self._queries(indices), self.chunk_size),
            passages=in_chunks(self.encoder.passage_side, self._passages(distinct), self.chunk_size),
            columns=columns[places],
            teacher=scores,
            indices=indices,
            hit_rate=self.teacher.hit_rate,
        )
