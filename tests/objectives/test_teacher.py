"""Teachers: the language model's scores are those of a plain forward pass, and none is computed twice."""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import pytest
from torch.nn.functional import dropout
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from rqa.data import Document, Example, Turn
from rqa.models.loading import load_causal_lm
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
def plain_score(plain: PreTrainedModel, prompter: Prompter, example: Example, passages: Sequence[Document]) -> float:
    """The mean log-probability of the answer's tokens behind the prompt that generation would get."""
    prompt = prompter.encode(example, passages).ids
    answer = prompter.tokenizer.encode(" " + str(example.gold_answer), add_special_tokens=False)
    log_probabilities = plain(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
    return sum(float(log_probabilities[len(prompt) - 1 + i, token]) for i, token in enumerate(answer)) / len(answer)


def ask(lm: PreTrainedModel, prompter: Prompter, pairs: Sequence[Pair], tokens: int = 400) -> list[float]:
    found = list(AnswerScorer(lm, prompter, tokens)(pairs))
    assert sorted(position for position, _ in found) == list(range(len(pairs)))
    return [score for _, score in sorted(found)]


@pytest.mark.parametrize("tokens_per_batch", [1, 300, 100_000])
def test_scores_are_the_mean_log_probability_of_a_plain_forward_pass_in_float64_whatever_is_asked_beside_them(
    tokens_per_batch: int, lm: PreTrainedModel, plain: PreTrainedModel, prompter: Prompter, pairs: list[Pair]
) -> None:
    lm.train().model.norm.register_forward_hook(lambda module, _, states: dropout(states, 0.5, module.training))
    expected = [plain_score(plain, prompter, pair.example, [pair.document]) for pair in pairs]
    assert max(expected) - min(expected) > 0.01
    for order in (range(len(pairs)), torch.randperm(len(pairs)).tolist(), [3], []):
        ours = ask(lm, prompter, [pairs[i] for i in order], tokens_per_batch)
        assert ours == pytest.approx([expected[i] for i in order], abs=1e-5)
    half = ask(lm.to(torch.bfloat16), prompter, pairs, tokens_per_batch)
    assert half == pytest.approx(expected, abs=0.05)
    assert lm.training
    assert not any(parameter.requires_grad for parameter in lm.parameters())


def test_a_prompt_that_is_too_long_loses_passage_tokens_and_not_the_answer(
    lm: PreTrainedModel, plain: PreTrainedModel, prompter: Prompter, pairs: list[Pair]
) -> None:
    example, beginning = pairs[0].example, pairs[1].document.page_content
    tails = [Document(f"{beginning} {word * 80}", {"source": "s"}) for word in ("wool ", "silk ")]
    assert all(len(prompter.encode(example, [tail]).ids) > 120 for tail in tails)
    # A prompter that keeps as much room for a generated answer as this answer takes cuts where the scorer cuts.
    answer, bare = (len(prompter.encode_answer(str(example.gold_answer))), prompter.encode(example, []).ids)
    for limit, shown in ((120, [[tail] for tail in tails]), (len(bare) + answer, [[], []])):
        same = Prompter(prompter.tokenizer, replace(prompter.arguments, max_seq_length=limit, max_new_tokens=answer))
        ours = ask(lm, Prompter(prompter.tokenizer, replace(same.arguments, max_new_tokens=1)),
                   [Pair(example, tail) for tail in tails])  # fmt: skip
        assert ours == pytest.approx([plain_score(plain, same, example, passages) for passages in shown], abs=1e-5)
        assert (abs(ours[0] - ours[1]) > 1e-5) == (limit == 120)  # something of each passage is left, or nothing


def test_where_question_and_answer_do_not_fit_all_documents_score_alike_with_a_warning(
    lm: PreTrainedModel, prompter: Prompter, pairs: list[Pair], caplog: pytest.LogCaptureFixture
) -> None:
    endless = replace(pairs[0].example, question="Why? " * LIMIT, where="train.jsonl:7")
    mixed = [Pair(endless, pairs[0].document), pairs[1], Pair(endless, pairs[2].document)]
    first, other, second = ask(lm, prompter, mixed)
    assert first == pytest.approx(second, abs=1e-6)
    assert math.isfinite(first)
    assert [other] == pytest.approx(ask(lm, prompter, [pairs[1]]), abs=1e-6)
    (warning,) = [record.getMessage() for record in caplog.records]
    assert warning.startswith("train.jsonl:7: ")


class Lengths:
    """A scorer that can be computed by hand: the document's length; it remembers what it was asked."""

    def __init__(self, fail_after: int = 1_000_000) -> None:
        self.asked, self.fail_after = [], fail_after

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


def test_a_teacher_asks_only_for_pairs_never_seen_in_any_run(tmp_path: Path) -> None:
    scorer, pairs = Lengths(), pairs_of(1200)
    teacher = Teacher(scorer, "lm", tmp_path / "new/scores.sqlite")
    assert teacher.hit_rate == 0
    assert teacher(pairs[:40]) == lengths_of(pairs[:40])
    assert teacher.hit_rate == 0
    mixed = [*pairs[30:60], pairs[0], pairs[59]]  # the last one twice in one call
    assert teacher(mixed) == lengths_of(mixed)
    assert scorer.asked == [*pairs[:40][::-1], *pairs[40:60][::-1]]
    assert teacher.hit_rate == (10 + 1) / (40 + 32)
    assert teacher([]) == []
    teacher(pairs)
    idle = Lengths(fail_after=0)
    again = Teacher(idle, "lm", tmp_path / "new/scores.sqlite")
    assert again(pairs[::-1]) == lengths_of(pairs[::-1])
    assert again.hit_rate == 1


EXAMPLE = Example("Why?", gold_answer="So.", chat_history=(Turn("user", "Hm"),))
DOCUMENT = Document("a", {"source": "s"})


def test_whatever_decides_a_score_makes_another_one_and_nothing_else_does(tmp_path: Path) -> None:
    asked = [{}, {"question": "How?"}, {"gold_answer": "No."}, {"question": "Why?So.", "gold_answer": ""},
             {"chat_history": ()}, {"chat_history": (Turn("assistant", "Hm"),)}]  # fmt: skip
    others = [{"page_content": "b"}, {"metadata": {"source": "t"}}, {"formatted": "a"}]
    beside = (DOCUMENT, Document("b", {"source": "s"}))
    pairs = [Pair(replace(EXAMPLE, **other), DOCUMENT) for other in asked]
    pairs += [Pair(EXAMPLE, replace(DOCUMENT, **{"formatted": ""} | other)) for other in others]
    pairs += [Pair(EXAMPLE, DOCUMENT, read) for read in (beside[:1], beside)]
    scorer = Lengths()
    for number, (identity, pair) in enumerate([*(("lm", pair) for pair in pairs), ("another lm", pairs[0])], start=1):
        Teacher(scorer, identity, tmp_path / "scores.sqlite")([pair])
        assert len(scorer.asked) == number
    elsewhere = replace(EXAMPLE, where="train.jsonl:3", gold_docs=(DOCUMENT,), hard_neg_docs=(DOCUMENT,))
    same = [Pair(elsewhere, DOCUMENT), Pair(EXAMPLE, DOCUMENT, beside[::-1])]  # read together in any order
    assert Teacher(Lengths(0), "lm", tmp_path / "scores.sqlite")(same) == [-1.0, -1.0]


def test_an_exception_loses_at_most_one_part_and_what_is_read_together_is_one_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rqa.objectives.teacher.PAIRS_AT_ONCE", 16)
    pairs, after = pairs_of(100), Lengths()
    with pytest.raises(RuntimeError, match="out of memory"):
        Teacher(Lengths(fail_after=77), "lm", tmp_path / "scores.sqlite")(pairs)
    assert Teacher(after, "lm", tmp_path / "scores.sqlite")(pairs) == lengths_of(pairs)
    assert len(after.asked) == 100 - 64
    groups = [pairs[:10], pairs[10:20], pairs[20:30]]
    beside = [pair._replace(beside=tuple(p.document for p in group)) for group in groups for pair in group]
    sizes: list[int] = []
    Teacher(lambda part: sizes.append(len(part)) or enumerate(lengths_of(part)), "fid", tmp_path / "fid.sqlite")(beside)
    assert sizes == [20, 10]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_score_that_is_not_finite_is_refused_by_model_and_question_and_not_kept(
    value: float, lm: PreTrainedModel, prompter: Prompter, tmp_path: Path
) -> None:
    (pair,) = pairs_of(1)
    lm.model.norm.weight.data.fill_(value)
    with pytest.raises(UserError, match=rf"model {re.escape(lm.name_or_path)}: the score of 'Why\?' is not finite"):
        Teacher(AnswerScorer(lm, prompter, 400), "lm", tmp_path / "scores.sqlite")([pair])
    assert Teacher(Lengths(), "lm", tmp_path / "scores.sqlite")([pair]) == [-1.0]
