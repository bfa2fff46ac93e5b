"""DCA: the targets are the reader's cross-attention over a question's own passages, in the retriever's columns."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
import pytest
from transformers import AutoModelForSeq2SeqLM

from rqa.data import Document, Example
from rqa.models.encoder import Encoder, load_encoder
from rqa.models.encoder_decoder import load_fusion, passage_scores
from rqa.objectives.dca import CrossAttentionScorer, GivenScores, ReaderScores
from rqa.objectives.fid import FusionLikelihood
from rqa.objectives.losses import boost_gold
from rqa.objectives.rpg import Distillation
from rqa.objectives.teacher import Pair, Teacher
from rqa.packing import fusion_batch, pad
from rqa.prompts import FusionPromptArguments
from rqa.runtime.errors import UserError

ARGUMENTS = FusionPromptArguments(max_encoder_seq_length=64, max_decoder_seq_length=16)


def scorer(path: str, batch_size: int = 2, kind: str = "plain") -> CrossAttentionScorer:
    return CrossAttentionScorer(*load_fusion(path, ARGUMENTS), batch_size, kind)


def pairs_of(examples: Sequence[Example], lists: Sequence[Sequence[Document]]) -> list[Pair]:
    return [
        Pair(example, document, tuple(row)) for example, row in zip(examples, lists, strict=True) for document in row
    ]


@pytest.fixture
def lists(documents: list[Document]) -> list[list[Document]]:
    """The passages of five questions: 4, 3, 2, 1 and 4."""
    return [documents[:4], documents[3:6], documents[6:8], documents[9:10], documents[10:14]]


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_every_pair_gets_its_own_score_whatever_is_read_at_once(
    batch_size: int, t5_path: str, examples: list[Example], lists: list[list[Document]]
) -> None:
    teacher = scorer(t5_path, batch_size)
    pairs = pairs_of(examples[:5], lists)
    order = torch.randperm(len(pairs)).tolist()
    found = dict(teacher([pairs[i] for i in order]))
    assert sorted(found) == list(range(len(pairs)))
    expected = []
    for example, row in zip(examples, lists, strict=False):
        batch = fusion_batch([teacher.prompter.encode(example, row)], pad, 16384)
        expected += passage_scores(teacher.model, batch)[0].tolist()
    assert [found[order.index(i)] for i in range(len(pairs))] == pytest.approx(expected, abs=1e-5)


def test_a_list_is_read_once_in_any_order_and_another_list_is_read_anew(
    t5_path: str, examples: list[Example], documents: list[Document], tmp_path: Path
) -> None:
    read: list[int] = []
    reader = scorer(t5_path)
    reader.model.get_decoder().register_forward_hook(lambda *_: read.append(1))
    teacher = Teacher(reader, "reader", tmp_path / "scores.sqlite")
    first = teacher(pairs_of(examples[:1], [documents[:3]]))
    assert teacher(pairs_of(examples[:1], [documents[2::-1]])) == first[::-1]
    assert len(read) == 1
    again = Teacher(reader, "reader", tmp_path / "scores.sqlite")
    assert again(pairs_of(examples[:1], [documents[:3]])) == first
    assert len(read) == 1
    assert again.hit_rate == 1
    again(pairs_of(examples[:1], [documents[:4]]))
    assert len(read) == 2


def test_a_plain_reader_a_random_one_and_a_trained_one_give_different_targets(
    t5_path: str, examples: list[Example], lists: list[list[Document]], tmp_path: Path
) -> None:
    torch.manual_seed(7)  # of dropout
    model, prompter = load_fusion(t5_path, ARGUMENTS)
    objective = FusionLikelihood(model, prompter)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(10):
        batch = objective.batch([prompter.encode(e, d, e.gold_answer) for e, d in zip(examples, lists, strict=False)])
        (objective(batch)[0] / batch.weight).backward()
        optimizer.step()
        optimizer.zero_grad()
    objective.save_pretrained(tmp_path / "fid")
    torch.manual_seed(11)
    random = AutoModelForSeq2SeqLM.from_config(model.config)
    random.save_pretrained(tmp_path / "random")
    prompter.tokenizer.save_pretrained(tmp_path / "random")
    pairs = pairs_of(examples[:1], lists[:1])
    targets = []
    for path in (t5_path, str(tmp_path / "fid"), str(tmp_path / "random")):
        found = dict(scorer(path)(pairs))
        scores = torch.tensor([found[i] for i in range(len(pairs))])
        targets.append(scores - scores.mean())  # what a softmax sees, at any temperature
    for left, right in ((0, 1), (0, 2), (1, 2)):
        assert (targets[left] - targets[right]).abs().max() > 1e-3


def test_a_question_that_does_not_fit_tells_no_passages_apart(
    t5_path: str, examples: list[Example], lists: list[list[Document]]
) -> None:
    long = Example("Why is that so? " * 60)
    found = dict(scorer(t5_path)(pairs_of([long, examples[0]], [lists[0], lists[1]])))
    assert len({found[i] for i in range(4)}) == 1
    assert math.isfinite(found[0])
    assert len({found[i] for i in range(4, 7)}) == 3


def test_scoring_asks_for_no_gradient_and_leaves_the_mode(
    t5_path: str, examples: list[Example], lists: list[list[Document]]
) -> None:
    reader = scorer(t5_path)
    reader.model.train()
    assert list(reader(pairs_of(examples[:1], lists[:1]))) != []
    assert reader.model.training
    assert not any(parameter.requires_grad for parameter in reader.model.parameters())


# ---------------------------------------------------------------- the collate function


class Lengths:
    """A teacher that can be computed by hand: the document's length."""

    hit_rate = 0.5

    def __call__(self, pairs: Sequence[Pair]) -> list[float]:
        return [float(len(pair.document.page_content)) for pair in pairs]


@pytest.fixture
def encoder(encoder_path: str) -> Encoder:
    return load_encoder(encoder_path).eval()


def test_column_k_is_one_document_for_reader_and_retriever(
    encoder: Encoder, examples: list[Example], lists: list[list[Document]]
) -> None:
    repeated = [[*row, row[0]] for row in lists]
    collate = ReaderScores(examples[:5], repeated, 0.1, boost=False, encoder=encoder, teacher=Lengths())
    batch = collate([4, 2])
    passages = {tuple(encoder.tokenize_passages([d.fmt_content])[0]): d for row in lists for d in row}
    for row, number in enumerate((4, 2)):
        shown = [passages[tuple(batch.passages[column])] for column in batch.columns[row].tolist()]
        assert shown[: len(lists[number])] == lists[number]
        expected = [len(document.page_content) / 0.1 for document in lists[number]]
        assert batch.teacher[row, : len(expected)].tolist() == pytest.approx(expected)
        assert batch.teacher[row, len(expected) :].isneginf().all()
    loss, statistics = Distillation(encoder, math.sqrt(encoder.dimension), "teacher_to_student")(batch)
    assert loss.isfinite()
    assert statistics["teacher_hit_rate"] == 0.5


def test_boosting_raises_the_gold_document_alone(
    encoder: Encoder, examples: list[Example], documents: list[Document]
) -> None:
    rows = [[documents[2], documents[0], documents[3]], documents[4:6]]
    plain, boosted = (
        ReaderScores(examples[:2], rows, 2.0, boost, encoder=encoder, teacher=Lengths())([0, 1]).teacher * 2.0
        for boost in (False, True)
    )
    scores = plain[0].double()
    assert float(boosted[0, 1]) == pytest.approx(float(scores.max() + scores.std(correction=0)), rel=1e-6)
    assert boosted[0, [0, 2]].tolist() == plain[0, [0, 2]].tolist()
    assert boosted[1].tolist() == plain[1].tolist()  # its gold document is not among them


def test_the_boost_is_a_naive_loop_in_float64() -> None:
    scores = torch.randn(6, 5)
    scores[1, 3:] = scores[2, 1:] = float("-inf")
    gold = torch.rand(6, 5) < 0.4
    gold[2, 0] = True
    ours = boost_gold(scores, gold)
    for row in range(6):
        known = [float(x) for x in scores[row].double() if x > float("-inf")]
        mean = sum(known) / len(known)
        raised = max(known) + math.sqrt(sum((x - mean) ** 2 for x in known) / len(known))
        for k in range(5):
            expected = raised if gold[row, k] and k < len(known) else float(scores[row, k])
            assert float(ours[row, k]) == pytest.approx(expected, rel=1e-5)


def test_given_scores_stand_beside_the_contexts(examples: list[Example], documents: list[Document]) -> None:
    given = replace(examples[0], ctxs=tuple(documents[:3]), ctx_scores=(0.5, -1.0, 2.0))
    teacher = GivenScores([given])
    assert teacher(pairs_of([given], [documents[2::-1]])) == [2.0, -1.0, 0.5]
    with pytest.raises(UserError, match=r"train.jsonl:4: field 'ctxs' must hold documents with a 'score'"):
        GivenScores([given, replace(given, ctx_scores=None, where="train.jsonl:4")])
