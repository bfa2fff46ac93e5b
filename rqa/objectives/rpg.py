"""The frozen language model that RPG and EMDR2 ask, behind its kept scores."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor

from rqa.data import Document, Example
from rqa.endpoint.client import Endpoint, EndpointArguments, is_endpoint
from rqa.endpoint.roles import EndpointScorer, EstimatedTokens
from rqa.models.causal_lm import load_causal_lm
from rqa.models.encoder import Encoder
from rqa.models.loading import load_tokenizer, model_fingerprint
from rqa.objectives.encoding import EncoderBatch, EncoderObjective
from rqa.objectives.losses import distillation
from rqa.objectives.teacher import AnswerScorer, Pair, Teacher
from rqa.prompts import PromptArguments, Prompter, retrieval_query
from rqa.retrieval.retriever import Retriever
from rqa.runtime import distributed
from rqa.runtime.distributed import autocast, compute_dtype
from rqa.runtime.errors import UserError, check_bounds
from rqa.runtime.files import cache_root, fingerprint
from rqa.training.arguments import LoopArguments


@dataclass(frozen=True)
class DistillationBatch(EncoderBatch):
    """Questions with K documents each, and what the teacher thinks of them.

    A question without any document counts in the weight, and its loss is zero.

    Attributes:
        columns: Which of `passages` each document is. [B, K]
        teacher: The teacher's logits, -inf where a question has fewer than K documents. [B, K]
        hit_rate: Share of the teacher's scores, so far in this run, that did not have to be computed.
    """

    columns: Tensor
    teacher: Tensor
    hit_rate: float = 1.0


class ListObjective(EncoderObjective):
    """An objective over K documents of each question, which a teacher has scored."""

    def logits(self, batch: DistillationBatch) -> Tensor:
        """Similarities over temperature, with gradient; -inf where a question has fewer than K documents. -> [B, K]"""
        queries = self.embed_queries(batch.queries)  # [B, D]
        passages = self.embed_passages(batch.passages)  # [P, D]
        with autocast(queries.device, torch.float32):  # the index compares in float32, too
            similarity = torch.einsum("bd,bkd->bk", queries, passages[batch.columns]) / self.temperature
        return similarity.masked_fill(batch.teacher.isneginf(), float("-inf"))


class Distillation(ListObjective):
    """KL divergence between the teacher's softmax over the K documents and the retriever's.

    Args:
        direction: As in `losses.distillation`.
    """

    def __init__(self, encoder: Encoder, temperature: float, direction: str, chunk_size: int = 0) -> None:
        super().__init__(encoder, temperature, chunk_size)
        self.direction = direction

    def forward(self, batch: DistillationBatch) -> tuple[Tensor, dict[str, float]]:
        """The divergence summed over questions, and how often both rank the same document first. -> []"""
        logits = self.logits(batch)
        return distillation(batch.teacher, logits, self.direction).sum(), agreement(batch, logits)


def agreement(batch: DistillationBatch, logits: Tensor) -> dict[str, float]:
    """How often teacher and retriever rank the same document first, and how often the teacher had to be asked."""
    same = (logits.argmax(-1) == batch.teacher.argmax(-1)).float().mean()
    return {"agreement": float(same), "teacher_hit_rate": batch.hit_rate}


@dataclass
class CandidateArguments:
    """Which documents a question is trained on."""

    num_docs: int = field(default=20, metadata={"help": "Documents retrieved for each question."})
    include_gold: bool = field(default=True, metadata={"help": "The gold passage replaces the last one if missing."})

    def __post_init__(self) -> None:
        check_bounds(self, "num_docs", at_least=2)  # one cannot be told from others


class RetrievedCandidates:
    """The live retriever's top K, all questions of a batch in one call; gold passages replace the last if missing.

    Args:
        dtype: In which the questions are encoded, as the documents of the index were.
    """

    def __init__(
        self, examples: Sequence[Example], retriever: Retriever, arguments: CandidateArguments, dtype: torch.dtype
    ) -> None:
        self.examples = examples
        self.retriever = retriever
        self.arguments = arguments
        self.dtype = dtype
        self._numbers = {document.key: number for number, document in enumerate(retriever.documents)}

    def __call__(self, indices: Sequence[int]) -> list[list[int]]:
        """Positions in the database of each example's documents, K at most. [B] lists"""
        questions = [retrieval_query(self.examples[i]) for i in indices]
        with autocast(self.retriever.encoder.backbone.device, self.dtype):
            hits = self.retriever.retrieve(questions, self.arguments.num_docs)
        rows = [[number for number in row if number >= 0] for row in hits.ids.tolist()]
        return [self._with_gold(self.examples[i], row) for i, row in zip(indices, rows, strict=True)]

    def _with_gold(self, example: Example, found: list[int]) -> list[int]:
        K = self.arguments.num_docs
        if not self.arguments.include_gold:
            return found[:K]
        gold = {self._numbers[document.key]: None for document in example.gold_docs if document.key in self._numbers}
        missing = [number for number in gold if number not in found]
        others = [number for number in found if number not in gold]
        dropped = set(others[max(K - len(gold), 0) :])
        return ([number for number in found if number not in dropped] + missing)[:K]


class ScoredCandidates:
    """The collate function: candidates chosen, scored by the teacher and packed, each distinct document once.

    Args:
        documents: All that may be chosen.
        choose: Example numbers -> positions in `documents`, some for each example; called once a batch.
        teacher: Asked for every pair of an example and one of its documents.
        temperature: The teacher's scores are divided by it. 1: the batch holds the scores themselves.
        together: Whether a document's score depends on those that stand beside it.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        documents: Sequence[Document],
        encoder: Encoder,
        choose: Callable[[Sequence[int]], Sequence[Sequence[int]]],
        teacher: Teacher,
        temperature: float = 1.0,
        together: bool = False,
    ) -> None:
        self.examples = examples
        self.documents = documents
        self.choose = choose
        self.teacher = teacher
        self.temperature = temperature
        self.together = together
        self._queries = encoder.tokenize_queries([retrieval_query(example) for example in examples])
        self._passages = encoder.tokenize_passages([document.fmt_content for document in documents])

    def __call__(self, indices: Sequence[int]) -> DistillationBatch:
        """One micro-batch: column k is one and the same document for retriever and teacher."""
        chosen = self.choose(indices)
        # An index may find nothing for anyone; the encoder still needs a passage to encode.
        distinct = list(dict.fromkeys(number for row in chosen for number in row)) or [0]
        position = {number: column for column, number in enumerate(distinct)}
        shape = (len(indices), max(1, *map(len, chosen)))
        columns = torch.zeros(shape, dtype=torch.long)  # [B, K]
        scores = torch.full(shape, float("-inf"))  # [B, K]
        found = iter(self.teacher(self._pairs(indices, chosen)))
        for row, numbers in enumerate(chosen):
            columns[row, : len(numbers)] = torch.tensor([position[number] for number in numbers])
            scores[row, : len(numbers)] = torch.tensor([next(found) for _ in numbers])
        return DistillationBatch(
            queries=[self._queries[i] for i in indices],
            passages=[self._passages[number] for number in distinct],
            columns=columns,
            teacher=scores / self.temperature,
            indices=indices,
            hit_rate=self.teacher.hit_rate,
        )

    def _pairs(self, indices: Sequence[int], chosen: Sequence[Sequence[int]]) -> list[Pair]:
        pairs = []
        for i, numbers in zip(indices, chosen, strict=True):
            documents = tuple(self.documents[number] for number in numbers)
            beside = documents if self.together else ()
            pairs += [Pair(self.examples[i], document, beside) for document in documents]
        return pairs


@dataclass
class LanguageModelArguments(EndpointArguments):
    """The language model that finds documents useful, here or behind a server."""

    lm_model_path: str = field(
        metadata={"help": "The frozen language model: a directory, a hub name, or openai::http://host:port/v1."}
    )
    text_maxlength: int = field(default=512, metadata={"help": "Tokens of document, question and answer for the LM."})
    lm_tokens_per_batch: int = field(default=8192, metadata={"help": "Tokens of one forward pass of the LM."})
    lm_tokenizer: str | None = field(
        default=None, metadata={"help": "A server's tokenizer, to cut by; by default three bytes count as a token."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lm_tokenizer and not is_endpoint(self.lm_model_path):
            raise UserError("--lm_tokenizer: a local model brings its own; give it with --lm_model_path openai::URL")


def load_teacher(lm: LanguageModelArguments, loop: LoopArguments, device: torch.device) -> Teacher:
    """The mean log-likelihood of the answer given one document, each pair computed once."""
    prompt = PromptArguments(max_seq_length=lm.text_maxlength, max_new_tokens=1)
    if is_endpoint(lm.lm_model_path):
        scorer, model = _remote_scorer(lm, prompt, loop)
    else:
        scorer, model = _local_scorer(lm, prompt, loop, device)
    identity = fingerprint(model, str(asdict(prompt)), scorer.prompter.instruction)
    return Teacher(scorer, identity, cache_root() / "teacher.sqlite")


def _local_scorer(
    lm: LanguageModelArguments, prompt: PromptArguments, loop: LoopArguments, device: torch.device
) -> tuple[AnswerScorer, str]:
    prompter = Prompter(load_tokenizer(lm.lm_model_path, loop.trust_remote_code), prompt)
    dtype = compute_dtype(loop.bf16, loop.fp16, device)
    with distributed.in_turn():
        model = load_causal_lm(lm.lm_model_path, dtype=dtype, **loop.loading).to(device)
    return AnswerScorer(model, prompter, lm.lm_tokens_per_batch), model_fingerprint(model, prompter.tokenizer)


def _remote_scorer(
    lm: LanguageModelArguments, prompt: PromptArguments, loop: LoopArguments
) -> tuple[EndpointScorer, str]:
    endpoint = Endpoint(lm.lm_model_path, lm)
    tokenizer = load_tokenizer(lm.lm_tokenizer, loop.trust_remote_code) if lm.lm_tokenizer else EstimatedTokens()
    identity = fingerprint(endpoint.base_url, endpoint.model)
    return EndpointScorer(endpoint, Prompter(tokenizer, prompt)), identity
