"""Teachers: the language model's scores are those of a plain forward pass, and none is computed twice."""

import itertools
import json
import logging
import math
import multiprocessing
import os
import signal
from collections.abc import Iterable, Sequence
from dataclasses import replace
from multiprocessing.synchronize import Barrier
from pathlib import Path

import torch
import pytest
from torch.nn.functional import dropout
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from rqa.data import Document, Example, Turn
from rqa.models.causal_lm import load_causal_lm
from rqa.objectives.teacher import AnswerScorer, Pair, Teacher
from rqa.prompts import PromptArguments, Prompter
from rqa.runtime.errors import UserError

LIMIT = 256


@pytest.fixture
def lm(lm_path: str) -> PreTrainedModel:
    return load_causal_lm(lm_path)


@pytest.fixture
def prompter(tokenizer: PreTrainedTokenizerBase) -> Prompter:
    return Prompter(tokenizer, PromptArguments(max_seq_length=LIMIT, max_new_tokens=1))


@pytest.fixture
def pairs(examples: list[Example], documents: list[Document]) -> list[Pair]:
    """Answers of different lengths over documents of different lengths."""
    long = Document(documents[2].page_content + " " + documents[3].page_content, {"source": "long"})
    return [Pair(example, document) for example in examples[:4] for document in (documents[0], documents[5], long)]


@pytest.fixture(scope="module")
def plain(lm_path: str) -> PreTrainedModel:
    """`transformers` alone, in float64."""
    return AutoModelForCausalLM.from_pretrained(lm_path, attn_implementation="eager").double().eval()


@torch.no_grad()
def plain_score(plain: PreTrainedModel, prompter: Prompter, pair: Pair, passages: Sequence[Document]) -> float:
    """The mean log-probability of the answer's tokens behind the prompt that generation would get."""
    prompt = prompter.encode(pair.example, passages).ids
    answer = prompter.tokenizer.encode(" " + pair.example.gold_answer, add_special_tokens=False)
    log_probabilities = plain(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
    return sum(float(log_probabilities[len(prompt) - 1 + i, token]) for i, token in enumerate(answer)) / len(answer)


def in_order(scores: Iterable[tuple[int, float]]) -> list[float]:
    found = list(scores)
    assert sorted(position for position, _ in found) == list(range(len(found)))
    return [score for _, score in sorted(found)]


@pytest.mark.parametrize("tokens_per_batch", [1, 300, 100_000])
def test_scores_are_the_mean_log_probability_of_a_plain_forward_pass_in_float64(
    tokens_per_batch: int, lm: PreTrainedModel, plain: PreTrainedModel, prompter: Prompter, pairs: list[Pair]
) -> None:
    expected = [plain_score(plain, prompter, pair, [pair.document]) for pair in pairs]
    assert max(expected) - min(expected) > 0.01
    assert in_order(AnswerScorer(lm, prompter, tokens_per_batch)(pairs)) == pytest.approx(expected, abs=1e-5)


def test_a_score_does_not_depend_on_the_pairs_beside_it(
    lm: PreTrainedModel, prompter: Prompter, pairs: list[Pair]
) -> None:
    scorer = AnswerScorer(lm, prompter, 400)
    expected = in_order(scorer(pairs))
    order = torch.randperm(len(pairs)).tolist()
    assert in_order(scorer([pairs[i] for i in order])) == pytest.approx([expected[i] for i in order], abs=1e-6)
    assert in_order(scorer([pairs[3]])) == pytest.approx([expected[3]], abs=1e-6)
    assert in_order(scorer([])) == []


def test_scores_in_bf16_are_finite_and_near(
    lm: PreTrainedModel, plain: PreTrainedModel, prompter: Prompter, pairs: list[Pair]
) -> None:
    ours = in_order(AnswerScorer(lm.to(torch.bfloat16), prompter, 400)(pairs))
    assert ours == pytest.approx([plain_score(plain, prompter, pair, [pair.document]) for pair in pairs], abs=0.05)


def test_scoring_leaves_the_models_mode_and_asks_for_no_gradient(
    lm: PreTrainedModel, prompter: Prompter, pairs: list[Pair]
) -> None:
    lm.model.norm.register_forward_hook(lambda module, _, states: dropout(states, 0.5, module.training))
    lm.train()
    first, second = (in_order(AnswerScorer(lm, prompter, 400)(pairs)) for _ in range(2))
    assert first == second
    assert lm.training
    assert not any(parameter.requires_grad for parameter in lm.parameters())


def test_a_prompt_that_is_too_long_loses_passage_tokens_and_not_the_answer(
    lm: PreTrainedModel, plain: PreTrainedModel, prompter: Prompter, pairs: list[Pair]
) -> None:
    example = pairs[0].example
    beginning = pairs[1].document.page_content
    answer = len(prompter.encode_answer(example.gold_answer))
    short = Prompter(prompter.tokenizer, replace(prompter.arguments, max_seq_length=120))
    tails = [Pair(example, Document(f"{beginning} {word * 80}", {"source": "s"})) for word in ("wool ", "silk ")]
    assert all(len(prompter.encode(example, [pair.document]).ids) > 120 for pair in tails)
    # A prompter that keeps as much room for a generated answer as this answer takes cuts where the scorer cuts.
    same = Prompter(prompter.tokenizer, replace(short.arguments, max_new_tokens=answer))
    expected = [plain_score(plain, same, pair, [pair.document]) for pair in tails]
    ours = in_order(AnswerScorer(lm, short, 400)(tails))
    assert ours == pytest.approx(expected, abs=1e-5)
    assert abs(ours[0] - ours[1]) > 1e-5  # something of each passage is left


def test_where_only_question_and_answer_fit_all_documents_score_as_none(
    lm: PreTrainedModel, plain: PreTrainedModel, prompter: Prompter, pairs: list[Pair], documents: list[Document]
) -> None:
    bare = len(prompter.encode(pairs[0].example, [], pairs[0].example.gold_answer).ids)
    exact = Prompter(prompter.tokenizer, replace(prompter.arguments, max_seq_length=bare))
    ours = in_order(AnswerScorer(lm, exact, 400)(pairs[:3]))
    assert ours == pytest.approx([plain_score(plain, prompter, pairs[0], [])] * 3, abs=1e-5)


def test_where_question_and_answer_do_not_fit_all_documents_score_alike_with_a_warning(
    lm: PreTrainedModel,
    prompter: Prompter,
    pairs: list[Pair],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(logging.getLogger("rqa"), "propagate", True)  # an executable turns it off
    endless = replace(pairs[0].example, question="Why? " * LIMIT, where="train.jsonl:7")
    mixed = [Pair(endless, pairs[0].document), pairs[1], Pair(endless, pairs[2].document)]
    first, other, second = in_order(AnswerScorer(lm, prompter, 400)(mixed))
    assert first == pytest.approx(second, abs=1e-6)
    assert math.isfinite(first)
    assert [other] == pytest.approx(in_order(AnswerScorer(lm, prompter, 400)([pairs[1]])), abs=1e-6)
    assert "train.jsonl:7" in caplog.text


class Lengths:
    """A scorer that can be computed by hand: the document's length; it remembers what it was asked."""

    def __init__(self, fail_after: int = 1_000_000) -> None:
        self.asked: list[Pair] = []
        self.fail_after = fail_after

    def __call__(self, pairs: Sequence[Pair]) -> Iterable[tuple[int, float]]:
        for position in reversed(range(len(pairs))):  # any order will do
            if len(self.asked) == self.fail_after:
                raise RuntimeError("out of memory")
            self.asked.append(pairs[position])
            yield position, -float(len(pairs[position].document.page_content))


def pairs_of(size: int) -> list[Pair]:
    return [Pair(Example("Why?", gold_answer="So."), Document("a" * (length + 1))) for length in range(size)]


def lengths_of(pairs: Sequence[Pair]) -> list[float]:
    return [-float(len(pair.document.page_content)) for pair in pairs]


def test_a_teacher_asks_only_for_pairs_never_seen(tmp_path: Path) -> None:
    scorer, pairs = Lengths(), pairs_of(60)
    teacher = Teacher(scorer, "lm", tmp_path / "new/scores.sqlite")
    assert teacher(pairs[:40]) == lengths_of(pairs[:40])
    assert len(scorer.asked) == 40
    mixed = [*pairs[30:], pairs[0], pairs[59]]
    assert teacher(mixed) == lengths_of(mixed)
    assert scorer.asked[40:] == pairs[40:][::-1]
    assert teacher([]) == []


def test_a_pair_that_stands_twice_in_one_call_is_scored_once(tmp_path: Path) -> None:
    scorer, (pair, other) = Lengths(), pairs_of(2)
    assert Teacher(scorer, "lm", tmp_path / "scores.sqlite")([pair, other, pair]) == [-1.0, -2.0, -1.0]
    assert len(scorer.asked) == 2


def test_scores_outlive_the_teacher(tmp_path: Path) -> None:
    pairs = pairs_of(1200)  # more than one query to the database
    Teacher(Lengths(), "lm", tmp_path / "scores.sqlite")(pairs)
    idle = Lengths(fail_after=0)
    teacher = Teacher(idle, "lm", tmp_path / "scores.sqlite")
    assert teacher(pairs[::-1]) == lengths_of(pairs[::-1])
    assert not idle.asked
    assert teacher.hit_rate == 1


def test_the_hit_rate_is_the_share_of_pairs_known_before_they_were_asked_for(tmp_path: Path) -> None:
    pairs = pairs_of(10)
    teacher = Teacher(Lengths(), "lm", tmp_path / "scores.sqlite")
    assert teacher.hit_rate == 0
    teacher(pairs[:6])
    assert teacher.hit_rate == 0
    teacher(pairs)
    assert teacher.hit_rate == 6 / 16
    again = Teacher(Lengths(), "lm", tmp_path / "scores.sqlite")
    again(pairs[:4])
    assert again.hit_rate == 1


EXAMPLE, DOCUMENT = (
    Example("Why?", gold_answer="So.", chat_history=(Turn("user", "Hm"),)),
    Document("a", {"source": "s"}),
)


@pytest.mark.parametrize(
    ("example", "document", "identity"),
    [
        (replace(EXAMPLE, question="How?"), DOCUMENT, "lm"),
        (replace(EXAMPLE, gold_answer="No."), DOCUMENT, "lm"),
        (replace(EXAMPLE, question="Why?So.", gold_answer=""), DOCUMENT, "lm"),
        (replace(EXAMPLE, chat_history=()), DOCUMENT, "lm"),
        (replace(EXAMPLE, chat_history=(Turn("assistant", "Hm"),)), DOCUMENT, "lm"),
        (EXAMPLE, Document("b", {"source": "s"}), "lm"),
        (EXAMPLE, Document("a", {"source": "t"}), "lm"),
        (EXAMPLE, Document("a", {"source": "s"}, fmt_content="a"), "lm"),
        (EXAMPLE, DOCUMENT, "another lm"),
    ],
)
def test_whatever_decides_a_score_makes_another_one(
    example: Example, document: Document, identity: str, tmp_path: Path
) -> None:
    Teacher(Lengths(), "lm", tmp_path / "scores.sqlite")([Pair(EXAMPLE, DOCUMENT)])
    scorer = Lengths()
    Teacher(scorer, identity, tmp_path / "scores.sqlite")([Pair(example, document)])
    assert len(scorer.asked) == 1


def test_what_decides_nothing_makes_no_other_score(tmp_path: Path) -> None:
    Teacher(Lengths(), "lm", tmp_path / "scores.sqlite")([Pair(EXAMPLE, DOCUMENT)])
    elsewhere = replace(EXAMPLE, where="train.jsonl:3", gold_docs=(DOCUMENT,), hard_neg_docs=(DOCUMENT,))
    assert Teacher(Lengths(0), "lm", tmp_path / "scores.sqlite")([Pair(elsewhere, DOCUMENT)]) == [-1.0]


def test_an_exception_loses_at_most_one_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rqa.objectives.teacher.PAIRS_AT_ONCE", 16)
    pairs = pairs_of(100)
    teacher = Teacher(Lengths(fail_after=77), "lm", tmp_path / "scores.sqlite")
    with pytest.raises(RuntimeError, match="out of memory"):
        teacher(pairs)
    after = Lengths()
    assert Teacher(after, "lm", tmp_path / "scores.sqlite")(pairs) == lengths_of(pairs)
    assert len(after.asked) <= 100 - 77 + 16


def ask(path: Path, pairs: Sequence[Pair], die_after: int | None, together: Barrier) -> None:
    """Another process: asks for 50 pairs at a time, and may be killed in the middle."""
    scored = itertools.count()

    def score(part: Sequence[Pair]) -> Iterable[tuple[int, float]]:
        for position, value in enumerate(lengths_of(part)):
            if next(scored) == die_after:
                os.kill(os.getpid(), signal.SIGKILL)
            yield position, value

    together.wait(60)
    teacher = Teacher(score, "lm", path)
    for start in range(0, len(pairs), 50):
        assert teacher(pairs[start : start + 50]) == lengths_of(pairs[start : start + 50])


def test_a_kill_loses_at_most_one_part_and_two_processes_share_one_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two run to their end at the same time, on pairs that overlap; a third dies among them, by a real kill -9."""
    monkeypatch.setattr("rqa.objectives.teacher.PAIRS_AT_ONCE", 16)
    path, pairs, fork = tmp_path / "scores.sqlite", pairs_of(500), multiprocessing.get_context("fork")
    together = fork.Barrier(3)
    parts = [(pairs[:300], None), (pairs[150:450], None), (pairs[450:], 37)]
    workers = [fork.Process(target=ask, args=(path, *part, together)) for part in parts]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    assert [worker.exitcode for worker in workers] == [0, 0, -signal.SIGKILL]
    assert Teacher(Lengths(fail_after=0), "lm", path)(pairs[:450]) == lengths_of(pairs[:450])
    late = Lengths()
    assert Teacher(late, "lm", path)(pairs[450:]) == lengths_of(pairs[450:])
    assert 50 - 37 <= len(late.asked) < 50 - 37 + 16


def test_many_processes_may_be_the_first_to_open_the_file(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    for attempt in range(5):
        together = fork.Barrier(8)
        arguments = (tmp_path / f"{attempt}.sqlite", pairs_of(3), None, together)
        workers = [fork.Process(target=ask, args=arguments) for _ in range(8)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(120)
        assert [worker.exitcode for worker in workers] == [0] * 8


def test_a_score_that_is_not_a_number_is_not_kept(tmp_path: Path) -> None:
    (pair,) = pairs_of(1)
    (score,) = Teacher(lambda pairs: [(0, math.nan)], "lm", tmp_path / "scores.sqlite")([pair])
    assert math.isnan(score)
    assert Teacher(Lengths(), "lm", tmp_path / "scores.sqlite")([pair]) == [-1.0]


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "scores.sqlite").write_text(json.dumps({"not": "a database"}) * 100)
    with pytest.raises(UserError, match=r"scores\.sqlite: nothing can be kept there"):
        Teacher(Lengths(), "lm", tmp_path / "scores.sqlite")
