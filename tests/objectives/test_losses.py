"""The losses against naive loops in float64."""

import math
from collections.abc import Callable

import torch
import pytest
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rqa.objectives.losses import boost_gold, contrastive, distillation, marginal_nll

DIRECTIONS = ["teacher_to_student", "student_to_teacher"]
INF = float("inf")


def padded(gold: list[set[int]]) -> Tensor:
    return pad_sequence([torch.tensor(sorted(numbers)) for numbers in gold], batch_first=True, padding_value=-1)


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
def test_contrastive_and_its_gradient_are_those_of_a_loop_over_distinct_documents_that_are_not_gold(
    documents: list[int], targets: list[int], gold: list[set[int]]
) -> None:
    distinct = sorted(set(documents))
    scores = (3 * torch.randn(len(targets), len(distinct))).requires_grad_()
    similarity = scores[:, [distinct.index(document) for document in documents]]  # copies score alike
    losses, first = contrastive(similarity, torch.tensor(documents), torch.tensor(targets), padded(gold))
    losses.sum().backward()
    theirs = scores.detach().double().requires_grad_()
    for row, target in enumerate(targets):
        score = dict(zip(distinct, theirs[row], strict=True))
        negatives = [document for document in distinct if document not in gold[row] | {target}]
        loss = -(score[target].exp() / sum(score[document].exp() for document in [target, *negatives])).log()
        loss.backward(retain_graph=True)
        assert losses[row].item() == pytest.approx(loss.item(), rel=1e-5, abs=1e-6)
        assert bool(first[row]) == all(score[target] > score[document] for document in negatives)
    torch.testing.assert_close(scores.grad.double(), theirs.grad, atol=1e-6, rtol=1e-4)


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


def naive_divergence(left: Tensor, right: Tensor) -> Tensor:
    """KL(softmax(left) || softmax(right)), summed over documents."""
    p, q = (logits.exp() / logits.exp().sum() for logits in (left, right))
    return (p * (p / q).log()).sum()


def naive_marginal(log_likelihood: Tensor, student: Tensor) -> Tensor:
    return -(log_likelihood.exp() * student.exp() / student.exp().sum()).sum().log()


@pytest.mark.parametrize(
    ("ours", "naive"),
    [(distillation, naive_divergence), (marginal_nll, naive_marginal),
     (lambda t, s: distillation(t, s, DIRECTIONS[1]), lambda t, s: naive_divergence(s, t))],
    ids=[DIRECTIONS[0], "marginal", DIRECTIONS[1]],
)  # fmt: skip
def test_losses_over_lists_and_their_gradients_are_those_of_the_documents_there_are(
    ours: Callable[[Tensor, Tensor], Tensor], naive: Callable[[Tensor, Tensor], Tensor]
) -> None:
    """Rows lack documents at other places each; the last row lacks all: its loss and gradient are zero."""
    absent = torch.rand(8, 7) < torch.linspace(0, 0.6, 8)[:, None]
    absent[-1] = True
    teacher, student = ((2 * torch.randn(8, 7)).masked_fill(absent, -INF).requires_grad_() for _ in range(2))
    losses = ours(teacher, student)
    losses.sum().backward()
    theirs = student.detach().double().requires_grad_()
    pairs = zip(teacher.detach().double()[:-1], theirs[:-1], absent, strict=False)
    expected = torch.stack([naive(row[~missing], scores[~missing]) for row, scores, missing in pairs])
    expected.sum().backward()
    torch.testing.assert_close(losses[:-1].double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(student.grad.double(), theirs.grad, atol=1e-6, rtol=1e-4)
    assert losses[-1] == 0
    assert teacher.grad is None


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


def test_an_answer_of_hundreds_of_tokens_underflows_nowhere() -> None:
    loss = marginal_nll(torch.tensor([[-900.0, -905.0]]), torch.zeros(1, 2))
    assert float(loss) == pytest.approx(900 + math.log(2) - math.log1p(math.exp(-5)), 1e-6)


def test_the_boost_raises_gold_documents_to_the_maximum_plus_the_deviation_of_a_naive_loop() -> None:
    scores = torch.randn(6, 5)
    scores[1, 3:] = scores[2, 1:] = -INF
    gold = torch.rand(6, 5) < 0.4
    gold[2, 0] = True
    ours = boost_gold(scores, gold)
    for row in range(6):
        known = [float(x) for x in scores[row].double() if x > -INF]
        mean = sum(known) / len(known)
        raised = max(known) + math.sqrt(sum((x - mean) ** 2 for x in known) / len(known))
        for k in range(5):
            expected = raised if gold[row, k] and k < len(known) else float(scores[row, k])
            assert float(ours[row, k]) == pytest.approx(expected, rel=1e-5)
