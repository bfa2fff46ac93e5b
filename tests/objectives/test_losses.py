"""The losses against naive loops in float64."""

import math

import torch
import pytest
from torch import Tensor

from rqa.objectives.losses import answer_nll, contrastive, distillation

DIRECTIONS = ["teacher_to_student", "student_to_teacher"]
INF = float("inf")


def naive_contrastive(
    similarity: Tensor, documents: list[int], targets: list[int], gold: list[set[int]]
) -> tuple[list[float], list[bool]]:
    """One question, one distinct document at a time."""
    losses, first = [], []
    for question, target in enumerate(targets):
        scores: dict[int, float] = {}
        for column, document in enumerate(documents):
            scores.setdefault(document, float(similarity[question, column]))
        negatives = [score for document, score in scores.items() if document not in gold[question] | {target}]
        total = math.fsum(math.exp(score) for score in [scores[target], *negatives])
        losses.append(math.log(total) - scores[target])
        first.append(all(scores[target] > score for score in negatives))
    return losses, first


def naive_divergence(left: list[float], right: list[float]) -> float:
    """KL(softmax(left) || softmax(right)) over the documents that exist."""
    there = [i for i, value in enumerate(left) if value != -INF]

    def probabilities(logits: list[float]) -> list[float]:
        highest = max(logits[i] for i in there)
        weights = [math.exp(logits[i] - highest) for i in there]
        return [weight / math.fsum(weights) for weight in weights]

    return math.fsum(p * math.log(p / q) for p, q in zip(probabilities(left), probabilities(right), strict=True))


def padded(gold: list[set[int]]) -> Tensor:
    width = max(map(len, gold))
    return torch.tensor([[*sorted(numbers), *[-1] * (width - len(numbers))] for numbers in gold])


def similarity_of_equal_columns(questions: int, documents: list[int]) -> Tensor:
    """Columns of the same document score alike, as they do for an encoder."""
    scores = {document: 3 * torch.randn(questions) for document in sorted(set(documents))}
    return torch.stack([scores[document] for document in documents], dim=1)


@pytest.mark.parametrize(
    ("documents", "targets", "gold"),
    [
        pytest.param([4, 9, 2], [4, 9, 2], [{4}, {9}, {2}], id="one gold passage each"),
        pytest.param([4, 9], [4, 4, 9], [{4}, {4}, {9}], id="two questions share a gold passage"),
        pytest.param([4, 9, 2, 7], [4, 9], [{4}, {9, 7}], id="a hard negative is another question's gold"),
        pytest.param([4, 9, 4, 2, 9, 9], [4, 9, 2], [{4}, {9}, {2}], id="documents stand twice"),
        pytest.param([4, 9, 2, 0, 4, 0], [9, 0, 2], [{4, 9}, {0, 2, 9}, {2}], id="several gold passages, and twice"),
        pytest.param([4], [4], [{4}], id="nothing to tell it from"),
    ],
)
def test_contrastive_is_the_naive_loop_over_distinct_documents(
    documents: list[int], targets: list[int], gold: list[set[int]]
) -> None:
    similarity = similarity_of_equal_columns(len(targets), documents)
    expected, best = naive_contrastive(similarity.double(), documents, targets, gold)
    losses, first = contrastive(similarity, torch.tensor(documents), torch.tensor(targets), padded(gold))
    torch.testing.assert_close(losses.double(), torch.tensor(expected, dtype=torch.float64), atol=1e-5, rtol=1e-5)
    assert first.tolist() == best


def test_contrastive_has_no_gradient_towards_a_gold_passage_that_is_not_the_target() -> None:
    similarity = torch.randn(2, 5, requires_grad=True)
    documents, gold = torch.tensor([4, 9, 2, 7, 9]), padded([{4, 2}, {9}])
    contrastive(similarity, documents, torch.tensor([4, 9]), gold)[0].sum().backward()
    gradient = similarity.grad
    assert gradient[0].sign().tolist() == [-1, 1, 0, 1, 0]  # up, down, gold, down, the copy of column 1
    assert gradient[1].sign().tolist() == [1, -1, 1, 1, 0]
    torch.testing.assert_close(gradient.sum(1), torch.zeros(2), atol=1e-6, rtol=0)


def test_a_document_that_is_added_again_changes_neither_the_contrastive_loss_nor_its_gradient() -> None:
    documents, targets, gold = [4, 9, 2], torch.tensor([4, 9]), padded([{4}, {9}])
    once = torch.randn(2, 3, requires_grad=True)
    again = once[:, [0, 1, 2, 1, 0, 0]]
    first = contrastive(once, torch.tensor(documents), targets, gold)[0].sum()
    second = contrastive(again, torch.tensor([4, 9, 2, 9, 4, 4]), targets, gold)[0].sum()
    assert torch.equal(first, second)
    assert torch.equal(*(torch.autograd.grad(loss, once, retain_graph=True)[0] for loss in (first, second)))


def test_contrastive_is_finite_in_bf16_with_scores_of_thousands() -> None:
    similarity = torch.tensor([[5000.0, -5000.0, 4000.0], [-5000.0, 5000.0, 5000.0]], dtype=torch.bfloat16)
    similarity.requires_grad_()
    losses, first = contrastive(similarity, torch.tensor([1, 2, 3]), torch.tensor([1, 1]), padded([{1}, {1}]))
    losses.sum().backward()
    assert losses.dtype == torch.float32
    assert losses[0] == 0
    assert losses[1].item() == pytest.approx(10000 + math.log(2), rel=1e-2)
    assert similarity.grad.isfinite().all()
    assert first.tolist() == [True, False]


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_distillation_is_the_naive_divergence(direction: str) -> None:
    teacher, student = 2 * torch.randn(5, 7), 2 * torch.randn(5, 7)
    left, right = (teacher, student) if direction == DIRECTIONS[0] else (student, teacher)
    expected = [naive_divergence(*pair) for pair in zip(left.double().tolist(), right.double().tolist(), strict=True)]
    ours = distillation(teacher, student, direction)
    torch.testing.assert_close(ours.double(), torch.tensor(expected, dtype=torch.float64), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_missing_documents_leave_loss_and_gradient_those_of_the_documents_there_are(direction: str) -> None:
    teacher, student = torch.randn(2, 4), torch.randn(2, 4, requires_grad=True)
    whole = distillation(teacher, student, direction)
    (expected,) = torch.autograd.grad(whole.sum(), student)
    wider = torch.full((2, 7), -INF)
    wide_teacher, wide_student = wider.clone(), wider.clone()
    wide_teacher[:, 1:5], wide_student[:, 1:5] = teacher, student.detach()
    wide_student.requires_grad_()
    ours = distillation(wide_teacher, wide_student, direction)
    ours.sum().backward()
    torch.testing.assert_close(ours, whole)
    torch.testing.assert_close(wide_student.grad[:, 1:5], expected)
    assert (wide_student.grad[:, [0, 5, 6]] == 0).all()


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_permuting_documents_permutes_the_gradient_and_leaves_the_loss(direction: str) -> None:
    teacher, student = torch.randn(3, 6), torch.randn(3, 6, requires_grad=True)
    teacher[0, 2] = -INF
    with torch.no_grad():
        student[0, 2] = -INF
    order = torch.randperm(6)
    first = distillation(teacher, student, direction)
    second = distillation(teacher[:, order], student[:, order], direction)
    torch.testing.assert_close(first, second)
    gradients = [torch.autograd.grad(loss.sum(), student)[0] for loss in (first, second)]
    torch.testing.assert_close(*gradients)
    misaligned = distillation(teacher[1:, order], student[1:], direction)
    assert (misaligned - first[1:]).abs().min() > 1e-3  # the order of one side alone does matter


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_distillation_is_zero_with_zero_gradient_when_both_are_equal_up_to_a_constant(direction: str) -> None:
    teacher = torch.randn(3, 6)
    student = (teacher + torch.tensor([[1.0], [-2.0], [30.0]])).requires_grad_()
    loss = distillation(teacher, student, direction)
    loss.sum().backward()
    torch.testing.assert_close(loss, torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(student.grad, torch.zeros(3, 6), atol=1e-5, rtol=0)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_teacher_gets_no_gradient(direction: str) -> None:
    teacher, student = torch.randn(2, 3, requires_grad=True), torch.randn(2, 3, requires_grad=True)
    distillation(teacher, student, direction).sum().backward()
    assert teacher.grad is None
    assert student.grad.abs().sum() > 0


def test_the_gradient_of_teacher_to_student_is_the_difference_of_the_distributions() -> None:
    teacher, student = torch.randn(4, 5), torch.randn(4, 5, requires_grad=True)
    distillation(teacher, student).sum().backward()
    torch.testing.assert_close(student.grad, student.detach().softmax(-1) - teacher.softmax(-1))


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_divergence_is_summed_over_documents(direction: str) -> None:
    """Every document split in two equal halves: as many bits are lost, over twice as many documents."""
    teacher, student = torch.randn(3, 4), torch.randn(3, 4)
    torch.testing.assert_close(
        distillation(teacher.repeat(1, 2), student.repeat(1, 2), direction), distillation(teacher, student, direction)
    )


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_distillation_is_finite_in_bf16_with_extreme_logits(direction: str) -> None:
    teacher = torch.tensor([[3000.0, -3000.0, 0.0, -INF], [-3000.0, -3000.0, -INF, -INF]], dtype=torch.bfloat16)
    student = torch.tensor([[-3000.0, 3000.0, 0.0, -INF], [3000.0, -3000.0, -INF, -INF]], dtype=torch.bfloat16)
    student.requires_grad_()
    loss = distillation(teacher, student, direction)
    loss.sum().backward()
    assert loss.dtype == torch.float32
    assert loss[0].item() == pytest.approx(6000, rel=1e-2)
    assert loss.isfinite().all()
    assert student.grad.isfinite().all()


def test_answer_nll_is_minus_the_log_of_the_targets_probability() -> None:
    logits, targets = 3 * torch.randn(4, 5), [0, 4, 2, 2]
    expected = [
        -math.log(math.exp(row[t]) / sum(map(math.exp, row))) for row, t in zip(logits.tolist(), targets, strict=True)
    ]
    assert answer_nll(logits, torch.tensor(targets)).tolist() == pytest.approx(expected, rel=1e-5)
