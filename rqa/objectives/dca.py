"""The frozen reader whose cross-attention DCA distils, behind its kept scores."""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from rqa.data import Document, Example
from rqa.models.encoder import EncoderArguments
from rqa.models.encoder_decoder import MAX_ENCODER_TOKENS, load_fusion, observe, passage_scores, refuse_overflow
from rqa.models.loading import choose_collate, evaluating, model_fingerprint
from rqa.objectives.losses import boost_gold
from rqa.objectives.rpg import DistillationBatch, ScoredCandidates
from rqa.objectives.teacher import Pair, Teacher
from rqa.packing import fusion_batch
from rqa.prompts import DoesNotFit, FusionPrompter, FusionSequence, PassagePromptArguments, retrieval_query
from rqa.recipe import DataArguments
from rqa.retrieval.hybrid import RetrieverArguments, open_retriever
from rqa.retrieval.index import IndexArguments
from rqa.runtime import distributed
from rqa.runtime.distributed import compute_dtype
from rqa.runtime.errors import UserError, check_bounds
from rqa.runtime.files import cache_root, fingerprint
from rqa.training.arguments import LoopArguments

log = logging.getLogger(__name__)


class CrossAttentionScorer:
    """G(q, p_k): the frozen reader's cross-attention score of each passage, from one decoder step.

    The first layer's score of a passage depends on nothing else, but what that layer reads changes the queries of the
    next: a score belongs to the whole set of passages that a question is read with, in whatever order. So a `Pair`
    names them all, in `beside`, and the `Teacher` keeps a score under question and set.

    Args:
        batch_size: Questions of one forward pass, each with all its passages.
        kind: As in `passage_scores`.
    """

    def __init__(self, model: PreTrainedModel, prompter: FusionPrompter, batch_size: int, kind: str = "plain") -> None:
        self.model = model.requires_grad_(False)
        self.prompter = prompter
        self.batch_size = batch_size
        self.kind = kind
        self._collate = choose_collate(model.get_encoder(), prompter.tokenizer.pad_token_id)
        observe(model)

    def __call__(self, pairs: Sequence[Pair]) -> Iterable[tuple[int, float]]:
        rows: dict[tuple[Example, tuple[Document, ...]], list[int]] = {}
        for position, pair in enumerate(pairs):
            rows.setdefault((pair.example, pair.beside), []).append(position)
        encoded = [(self._encode(*row), positions) for row, positions in rows.items()]
        encoded.sort(key=lambda row: -sum(map(len, row[0].passages)))  # similar lengths together
        batches = [encoded[start : start + self.batch_size] for start in range(0, len(encoded), self.batch_size)]
        with evaluating(self.model):
            for batch in tqdm(batches, desc="reader", unit="batch", leave=False, disable=len(batches) < 8):
                sequences = [sequence for sequence, _ in batch]
                inputs = fusion_batch(sequences, self._collate, MAX_ENCODER_TOKENS).to(self.model.device)
                scores = passage_scores(self.model, inputs, self.kind).tolist()
                for (_, positions), row in zip(batch, scores, strict=True):
                    yield from ((position, self._find(pairs[position], row)) for position in positions)

    def _find(self, pair: Pair, scores: Sequence[float]) -> float:
        """A question that does not fit was read alone: its passages score alike."""
        place = pair.beside.index(pair.document)
        return scores[place] if place < len(scores) and scores[place] > float("-inf") else scores[0]

    def _encode(self, example: Example, passages: Sequence[Document]) -> FusionSequence:
        try:
            return self.prompter.encode(example, passages)
        except DoesNotFit as error:
            log.warning("%s; its documents are not told apart", error)
            return FusionSequence([[self.prompter.end_token]], [])


class GivenScores:
    """A teacher whose scores stand in the data file, beside the contexts.

    Raises:
        UserError: an example has contexts without scores, or none.
    """

    hit_rate = 1.0

    def __init__(self, examples: Sequence[Example]) -> None:
        for example in examples:
            if not example.ctxs or example.ctx_scores is None:
                raise UserError(f"{example.where}: field 'ctxs' must hold documents with a 'score'; --with_score true")

    def __call__(self, pairs: Sequence[Pair]) -> list[float]:
        return [self._score(pair) for pair in pairs]

    def _score(self, pair: Pair) -> float:
        keys = [document.key for document in pair.example.ctxs]
        return (pair.example.ctx_scores or ())[keys.index(pair.document.key)]


class ReaderScores:
    """DCA's collate function: a fixed list of contexts for each question, and the reader's target over them.

    Args:
        contexts: The documents of each example; one that stands twice counts once.
        temperature: The scores are divided by it.
        boost: Whether the gold documents' scores are raised (`losses.boost_gold`).
        options: Encoder and teacher of `ScoredCandidates`.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        contexts: Sequence[Sequence[Document]],
        temperature: float,
        boost: bool,
        **options: Any,
    ) -> None:
        documents = _distinct(document for row in contexts for document in row)
        numbers = {document.key: number for number, document in enumerate(documents)}
        self._rows = [[numbers[document.key] for document in _distinct(row)] for row in contexts]
        self._gold = [{numbers.get(document.key) for document in example.gold_docs} for example in examples]
        self._scored = ScoredCandidates(
            examples, documents, choose=lambda indices: [self._rows[i] for i in indices], together=True, **options
        )
        self.temperature = temperature
        self.boost = boost

    def __call__(self, indices: Sequence[int]) -> DistillationBatch:
        """One micro-batch; no scores are asked for twice."""
        batch = self._scored(indices)
        scores = batch.teacher
        if self.boost:
            gold = torch.zeros_like(scores, dtype=torch.bool)
            for row, i in enumerate(indices):
                gold[row, : len(self._rows[i])] = torch.tensor([number in self._gold[i] for number in self._rows[i]])
            scores = boost_gold(scores, gold)
        return replace(batch, teacher=scores / self.temperature)


def _distinct(documents: Iterable[Document]) -> list[Document]:
    return list({document.key: document for document in documents}.values())


@dataclass
class ContextArguments:
    """Which passages a question is trained on."""

    n_context: int = field(default=20, metadata={"help": "Passages of each question."})
    context_retriever: str = field(
        default="dense",
        metadata={
            "help": "Who finds passages where an example has no ctxs: the model before training, shared words or both.",
            "choices": ["dense", "bm25", "hybrid"],
        },
    )

    def __post_init__(self) -> None:
        check_bounds(self, "n_context", at_least=2)  # one cannot be told from others


def find_contexts(
    context: ContextArguments,
    examples: Sequence[Example],
    documents: Sequence[Document],
    data: DataArguments,
    loop: LoopArguments,
    encoder: EncoderArguments,
    index: IndexArguments,
    device: torch.device,
) -> list[list[Document]]:
    """The passages of each example: its `ctxs`, else what is retrieved from the database. [N] lists

    Retrieved by the model that training began with, whatever checkpoint it goes on from.
    """
    contexts = [list(example.ctxs[: context.n_context]) for example in examples]
    bare = [number for number, documents_of in enumerate(contexts) if not documents_of]
    if bare:
        retriever = open_retriever(
            RetrieverArguments(retriever=context.context_retriever),
            data.model_name_or_path,
            documents,
            encoder,
            index,
            data.full_dataset_index_path,
            device,
            **loop.loading,
        )
        hits = retriever.retrieve_once([retrieval_query(examples[number]) for number in bare], context.n_context)
        for number, found in zip(bare, retriever.documents_of(hits), strict=True):
            contexts[number] = found
    return contexts


@dataclass
class ReaderTeacherArguments:
    """The reader whose cross-attention is distilled."""

    reader_model_path: str | None = field(
        default=None,
        metadata={"help": "The frozen encoder-decoder: a directory or a hub name. Not needed with --with_score true."},
    )
    with_score: bool = field(default=False, metadata={"help": "Take the scores that stand beside the ctxs instead."})
    reader_batch_size: int = field(default=4, metadata={"help": "Questions that the reader reads at once."})
    attention_score: str = field(
        default="plain",
        metadata={
            "help": "The score before the softmax, or the probability times the norm of the value (Atlas).",
            "choices": ["plain", "value_norm"],
        },
    )

    def __post_init__(self) -> None:
        if self.with_score == bool(self.reader_model_path):
            raise UserError("--reader_model_path: give it, or --with_score true to read scores from the data file")
        check_bounds(self, "reader_batch_size", at_least=1)


def load_reader_teacher(
    reader: ReaderTeacherArguments,
    prompt: PassagePromptArguments,
    loop: LoopArguments,
    examples: Sequence[Example],
    device: torch.device,
) -> Teacher | GivenScores:
    """How much the reader attends to each passage of a list, each list read once."""
    if reader.with_score:
        return GivenScores(examples)
    dtype = compute_dtype(loop.bf16, loop.fp16, device)
    with distributed.in_turn():
        model, prompter = load_fusion(reader.reader_model_path, prompt, dtype=dtype, **loop.loading)
        refuse_overflow(model, dtype)
        model.to(device)
    identity = fingerprint(
        model_fingerprint(model, prompter.tokenizer),
        prompter.template,
        str(prompt.max_encoder_seq_length),
        reader.attention_score,
    )
    scorer = CrossAttentionScorer(model, prompter, reader.reader_batch_size, reader.attention_score)
    return Teacher(scorer, identity, cache_root() / "teacher.sqlite")
