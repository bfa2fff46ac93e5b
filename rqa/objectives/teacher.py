"""Frozen teachers, whose scores are cached: a score depends on question, answer, document and teacher alone."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rqa import prompts
from rqa.data import Document, Example
from rqa.models import loading
from rqa.models.loading import LoadingArguments, choose_collate, evaluating
from rqa.models.reranker import load_reranker
from rqa.objectives.losses import answer_nll
from rqa.packing import answer_batch, answer_logits, pack, token_budget_batches
from rqa.prompts import ChatTemplateArguments, PromptArguments, Prompter, TokenSequence
from rqa.runtime.cli import progress
from rqa.runtime.files import Store, cache_root, fingerprint
from rqa.runtime.flags import flag

PAIRS_AT_ONCE = 256
NOT_TOLD_APART = "all its documents get the same score"
RERANKER = "reranker::"


def is_reranker(name: str) -> bool:
    """Whether a teacher's name, such as `reranker::M`, means a cross-encoder."""
    return name.startswith(RERANKER)


@dataclass(kw_only=True)
class LanguageModelArguments(LoadingArguments, ChatTemplateArguments):
    """The frozen language model that scores documents, local or on a server."""

    lm_model_path: str = flag(
        help="Language model: a directory, a hub name or openai::http://host:port/v1; for RPG also reranker::M.",
        also="teacher",
    )
    text_maxlength: int = flag(512, "Tokens of the language model's prompt and answer, at most.")
    lm_tokens_per_batch: int = flag(8192, "Tokens in one forward pass of the language model.", rare=True)
    lm_chat_format: str | None = flag(
        None, "Prompt format. Default: the chat template if the model has one.", ["prefix", "template"]
    )
    lm_tokenizer: str | None = flag(None, "Tokenizer of a server's model. Default: 3 bytes a token.", rare=True)

    def check(self) -> None:
        self.check_bounds("text_maxlength", "lm_tokens_per_batch", at_least=1)

    def lm_prompt(self, tokenizer: Any) -> PromptArguments:
        """Its prompt format; it generates nothing, so that one token of room is enough."""
        chat_format = self.lm_chat_format or ("template" if tokenizer.chat_template else "prefix")
        options = {"chat_format": chat_format, "chat_template_kwargs": self.chat_template_kwargs}
        return PromptArguments(**options, max_seq_length=self.text_maxlength, max_new_tokens=1)


@dataclass(kw_only=True)
class DistilledArguments(LanguageModelArguments):
    """The teacher's distribution over documents."""

    lm_temperature: float | None = flag(
        None, "Temperature of the teacher's softmax over documents. Default: 1 for a reranker, else 0.1.",
        also="teacher_temperature",
    )  # fmt: skip

    def check(self) -> None:
        self.check_bounds("lm_temperature", above=0)

    @property
    def teacher_temperature(self) -> float:
        """Its default is low for language models, whose means over tokens lie close together."""
        return self.lm_temperature or (1.0 if is_reranker(self.lm_model_path or "") else 0.1)


class Pair(NamedTuple):
    """A question with its answer, and a document to score."""

    example: Example
    document: Document
    beside: tuple[Document, ...] = ()  # if the score depends on it: the set of documents read together, this included


Score = Callable[[Sequence[Pair]], Iterable[tuple[int, float]]]  # yields (position, score) in any order


class Teacher:
    """A scorer whose scores are cached in a database that all runs share.

    Pairs are scored in parts, one transaction each. An interruption loses at most one part, and a resumed run batches
    the other parts in the same way, so that its scores are the same to the last bit.

    `identity` is a fingerprint of everything but the pair that decides a score (model, prompt, settings); `path` is the
    SQLite file.
    """

    def __init__(self, scorer: Score, identity: str, path: str | Path | None = None) -> None:
        self.scorer, self._identity = scorer, identity
        self._store = Store(path or cache_root() / "teacher.sqlite")
        self.asked = self.known = 0

    def __call__(self, pairs: Sequence[Pair]) -> list[float]:
        """The score of each pair; only new pairs are computed."""
        keys = list(map(self._key, pairs))
        kept = self._store.get(set(keys))
        self.asked += len(pairs)
        self.known += sum(key in kept for key in keys)
        for part in _parts(pairs):
            missing = {key: pair for key, pair in zip(keys[part], pairs[part], strict=True) if key not in kept}
            names = list(missing)
            scores = {names[position]: value for position, value in self.scorer(list(missing.values()))}
            if bad := [missing[name] for name, value in scores.items() if not math.isfinite(value)]:
                model = getattr(self.scorer, "model", torch.nn.Module())
                raise loading.not_finite(model, "score", bad[0].example.question)
            kept |= scores
            self._store.put(scores)
        return [kept[key] for key in keys]

    @property
    def hit_rate(self) -> float:
        """Share of all pairs so far whose score was in the cache."""
        return self.known / max(self.asked, 1)

    def _key(self, pair: Pair) -> str:
        example, document, beside = pair
        turns = [text for turn in example.chat_history for text in (turn.speaker, turn.message)]
        # Sorted: a decoder that attends to all documents ignores their order.
        others = [fingerprint(*sorted(other.fmt_content for other in beside))] if beside else []
        parts = (example.question, example.gold_answer or "", document.fmt_content, *turns, *others)
        return fingerprint(self._identity, *parts)


def score_lists(
    teacher: Callable[[Sequence[Pair]], Sequence[float]] | None,  # None: the first document of each list is gold
    examples: Sequence[Example], rows: Sequence[Sequence[Document]], temperature: float,
    together: bool,  # whether a document's score depends on the others in its list
) -> tuple[list[Pair], Tensor, Tensor]:  # fmt: skip
    """The teacher's logits for at most K documents of each question.

    -> all pairs [N], the pair's number in each place of a list, -1 where it is shorter [B, K], and logits, there -inf
    [B, K]
    """
    pairs, lengths = [], torch.tensor(list(map(len, rows)))
    for example, row in zip(examples, rows, strict=True):
        pairs += [Pair(example, document, tuple(row) if together else ()) for document in row]
    present = torch.arange(max(1, int(lengths.max()))) < lengths[:, None]
    places, scores = torch.full(present.shape, -1), torch.full(present.shape, float("-inf"))
    places[present] = torch.arange(len(pairs))
    if teacher:
        scores[present] = torch.tensor(teacher(pairs), dtype=torch.float) / temperature
    else:
        scores[:, 0] = 0.0
    return pairs, places, scores


def _parts(pairs: Sequence[Pair]) -> Iterable[slice]:
    """Slices of about `PAIRS_AT_ONCE` pairs that do not separate pairs read together."""
    start = 0
    while start < len(pairs):
        end = min(start + PAIRS_AT_ONCE, len(pairs))
        while end < len(pairs) and pairs[end].beside and pairs[end].beside == pairs[end - 1].beside:
            end += 1
        yield slice(start, end)
        start = end


class AnswerScorer:
    """log p(answer | document, question) by a frozen decoder, the mean over the answer's tokens (Shi et al. 2023).

    Prompts are packed, and only the answers' positions pass through the output layer. A prompt that is too long loses
    passage tokens; if question and answer alone do not fit, all documents get the same score.
    """

    def __init__(self, model: PreTrainedModel, prompter: Prompter, tokens_per_batch: int) -> None:
        self.model = model.requires_grad_(False)
        prompter.arguments = loading.within_positions(model, prompter.arguments, "max_seq_length")
        self.prompter, self.tokens_per_batch = prompter, tokens_per_batch
        self._collate = choose_collate(model)

    @torch.no_grad()
    def __call__(self, pairs: Sequence[Pair]) -> Iterable[tuple[int, float]]:
        rows = [(pair.example, [pair.document], pair.example.gold_answer) for pair in pairs]
        encoded = prompts.fitting(self.prompter.encode, rows, NOT_TOLD_APART, prompts.warn_once)
        end = self.prompter.end_of_turn
        unread = TokenSequence(end * 3, 1)  # replaces what does not fit
        sequences = [encoded.get(number, unread) for number in range(len(pairs))]
        # The end of the turn does not count.
        sequences = [TokenSequence(s.ids[: len(s.ids) - len(end)], s.answer_start) for s in sequences]
        lengths, padded = [len(sequence.ids) for sequence in sequences], self._collate is not pack
        batches = token_budget_batches(lengths, self.tokens_per_batch, padded)
        with evaluating(self.model):
            for indices in progress(batches, desc="teacher", unit="batch", disable=len(batches) < 8):
                chosen = [sequences[i] for i in indices]
                batch = answer_batch(chosen, self._collate).to(self.model.device)
                nll = answer_nll(answer_logits(self.model, batch), batch.targets)  # [N]
                sums = nll.new_zeros(len(chosen)).index_add(0, batch.owners, nll)  # [B]
                means = -sums / batch.owners.bincount(minlength=len(chosen)).clamp(min=1)
                yield from zip(indices, means.tolist(), strict=True)


def local_scorer(flags: LanguageModelArguments) -> tuple[AnswerScorer, str]:
    """A local language model, and its fingerprint."""
    model = loading.load_causal_lm(flags.lm_model_path, flags)  # before the tokenizer: its errors are clearer
    tokenizer = loading.load_tokenizer(flags.lm_model_path, flags.trust_remote_code)
    prompter = Prompter(tokenizer, flags.lm_prompt(tokenizer))
    identity = fingerprint(loading.model_fingerprint(model, tokenizer), str(model.dtype))
    return AnswerScorer(model, prompter, flags.lm_tokens_per_batch), identity


def reranker_scorer(flags: Any) -> tuple[Score, str]:
    """A cross-encoder, which needs no answers, and its fingerprint; `flags` must suit `load_reranker`, too."""
    reranker = load_reranker(flags.lm_model_path.removeprefix(RERANKER), flags).requires_grad_(False)

    def score(pairs: Sequence[Pair]) -> Iterable[tuple[int, float]]:
        texts = [(prompts.retrieval_query(pair.example), pair.document.fmt_content) for pair in pairs]
        return enumerate(reranker.score(texts).tolist())

    return score, fingerprint(reranker.fingerprint(), str(reranker.model.dtype))
