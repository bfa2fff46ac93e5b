"""DCA: the retriever learns the reader's cross-attention (Izacard & Grave 2020, knowledge distillation).

The objective is `rpg.ListObjective`; this file holds the reader that scores passages, and the choice of passages.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel

from rqa.data import Document, Example
from rqa.models import encoder_decoder
from rqa.models.encoder_decoder import EncoderDecoderArguments, FiDPrompter, FiDSequence
from rqa.models.loading import choose_collate, evaluating, model_fingerprint
from rqa.objectives.encoding import numbered
from rqa.objectives.rpg import ListArguments
from rqa.objectives.teacher import NOT_TOLD_APART, Pair, Teacher
from rqa.prompts import fitting, retrieval_query, warn_once
from rqa.retrieval.hybrid import RetrieverArguments, open_retriever
from rqa.runtime.cli import progress
from rqa.runtime.errors import UserError
from rqa.runtime.files import fingerprint
from rqa.runtime.flags import flag


@dataclass(kw_only=True)
class DCAArguments(ListArguments, EncoderDecoderArguments, RetrieverArguments):
    """DCA's own flags."""

    reader_model_path: str | None = flag(None, "Frozen encoder-decoder (path or hub name); not with --with_score true.")
    with_score: bool = flag(False, "Whether to use the scores of the examples' ctxs instead of a reader's.")
    reader_batch_size: int = flag(4, "Questions in one forward pass of the reader.", rare=True)
    reader_temperature: float = flag(
        0.1, "Temperature of the reader's softmax over passages; for value_norm use a hundredth."
    )
    attention_score: str = flag(
        "plain", "Score: attention logit, or probability times value norm (Atlas).", ["plain", "value_norm"], rare=True
    )
    boost_gold: bool = flag(
        False, "Whether to raise gold scores to the list's maximum plus its standard deviation.", rare=True
    )
    n_context: int = flag(20, "Passages of each question.")
    retriever: str = flag(
        "dense", "Retriever for examples without ctxs: the model before training, BM25, or both.",
        choices=["dense", "bm25", "hybrid"], also="context_retriever",
    )  # fmt: skip
    projection: bool = flag(False, "Whether to train a linear map and LayerNorm on top of the encoder.", rare=True)
    indexing_dimension: int = flag(768, "Width of the projection.", rare=True)

    def check(self) -> None:
        if self.with_score == bool(self.reader_model_path):
            raise UserError("--reader_model_path: give it, or --with_score true to read scores from the data file")
        self.check_bounds("reader_batch_size", at_least=1)
        self.check_bounds("n_context", at_least=2)  # the softmax over one is constant
        self.check_bounds("reader_temperature", "indexing_dimension", above=0)


def find_contexts(
    flags: DCAArguments, model: str, examples: Sequence[Example], documents: Sequence[Document]
) -> tuple[Sequence[Document], list[list[int]]]:
    """All passages, and the numbers of each example's: its `ctxs`, or else retrieved ones, without duplicates.

    `model` is the encoder before training, even in a resumed run, which so finds the same passages.
    """
    known, contexts = numbered(documents, [example.ctxs[: flags.n_context] for example in examples])
    bare = [number for number, row in enumerate(contexts) if not row]
    if bare:
        retriever = open_retriever(flags, model, documents, examples)
        hits = retriever.retrieve_once([retrieval_query(examples[number]) for number in bare], flags.n_context)
        for number, ids in zip(bare, hits.ids.tolist(), strict=True):
            contexts[number] = [position for position in ids if position >= 0]
    return known, [list(dict.fromkeys(row)) for row in contexts]


def reader_teacher(path: str, flags: EncoderDecoderArguments, batch_size: int = 4, kind: str = "plain") -> Teacher:
    """A cached `CrossAttentionScorer` over the reader at `path`."""
    model, prompter = encoder_decoder.load_encoder_decoder(path, flags)
    settings = (str(model.dtype), prompter.template, str(flags.max_encoder_seq_length), kind)
    identity = fingerprint(model_fingerprint(model, prompter.tokenizer), *settings)
    return Teacher(CrossAttentionScorer(model, prompter, batch_size, kind), identity)


class CrossAttentionScorer:
    """G(q, p_k): the frozen reader's cross-attention score of each passage, from one decoder step.

    From the second layer on, the decoder's queries depend on all passages, so a score belongs to the whole set of
    passages that are read together, in any order. A `Pair` lists that set in `beside`, and `Teacher` caches scores by
    question, passage and set. `batch_size` counts questions; for `kind` see `passage_scores`.
    """

    def __init__(self, model: PreTrainedModel, prompter: FiDPrompter, batch_size: int, kind: str = "plain") -> None:
        self.model = model.requires_grad_(False)
        self.prompter, self.batch_size, self.kind = prompter, batch_size, kind
        self._collate = choose_collate(model.get_encoder())
        encoder_decoder.observe(model)

    def __call__(self, pairs: Sequence[Pair]) -> Iterable[tuple[int, float]]:
        rows: dict[tuple[Example, tuple[Document, ...]], list[int]] = {}
        for position, pair in enumerate(pairs):
            rows.setdefault((pair.example, pair.beside), []).append(position)
        fit = fitting(self.prompter.encode, rows, NOT_TOLD_APART, warn_once)
        unread = FiDSequence([[self.prompter.end_token]], [])
        encoded = [(fit.get(number, unread), positions) for number, positions in enumerate(rows.values())]
        encoded.sort(key=lambda row: -sum(map(len, row[0].passages)))  # similar lengths together
        batches = [encoded[start : start + self.batch_size] for start in range(0, len(encoded), self.batch_size)]
        with evaluating(self.model):
            for batch in progress(batches, desc="reader", unit="batch", disable=len(batches) < 8):
                sequences = [sequence for sequence, _ in batch]
                inputs = encoder_decoder.fid_batch(sequences, self._collate).to(self.model.device)
                scores = encoder_decoder.passage_scores(self.model, inputs, self.kind).tolist()
                for (_, positions), row in zip(batch, scores, strict=True):
                    for position in positions:
                        place = pairs[position].beside.index(pairs[position].document)
                        # A question that does not fit was read without passages, which all get its one score.
                        yield position, row[place] if place < len(row) and row[place] > float("-inf") else row[0]


class GivenScores:
    """A teacher that reads its scores from the data file's contexts."""

    hit_rate = 1.0

    def __init__(self, examples: Sequence[Example]) -> None:
        for example in examples:
            if not example.ctxs or example.ctx_scores is None:
                raise UserError(f"{example.where}: field 'ctxs' must hold documents with a 'score'; --with_score true")

    def __call__(self, pairs: Sequence[Pair]) -> list[float]:
        known = [([context.key for context in pair.example.ctxs], pair.example.ctx_scores or ()) for pair in pairs]
        return [scores[keys.index(pair.document.key)] for pair, (keys, scores) in zip(pairs, known, strict=True)]
