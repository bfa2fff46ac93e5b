"""CTL: contrastive learning of the encoder (Karpukhin et al. 2020, DPR; Wang et al. 2022, E5; Gao et al. 2021)."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rqa.data.documents import Document
from rqa.data.examples import Example
from rqa.models.encoder import Encoder
from rqa.objectives.encoding import EncoderBatch, EncoderObjective
from rqa.objectives.losses import contrastive
from rqa.objectives.negatives import MinedNegatives
from rqa.prompts import retrieval_query
from rqa.runtime.distributed import gather_rows
from rqa.runtime.errors import UserError, check_bounds
from rqa.runtime.precision import autocast


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
