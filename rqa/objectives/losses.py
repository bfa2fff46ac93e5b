"""The losses that the algorithms minimise, as pure functions of tensors."""

import torch
from torch import Tensor
from torch.nn import functional


def answer_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood of each answer token, in float32. [N, V], [N] -> [N]"""
    return functional.cross_entropy(logits.float(), targets, reduction="none")


def contrastive(similarity: Tensor, documents: Tensor, targets: Tensor, gold: Tensor) -> tuple[Tensor, Tensor]:
    """Negative log-softmax of each question's positive among the documents (Karpukhin et al. 2020, eq. 2).

    A document that is gold for a question is never its negative, and a repeated document counts once.
    `similarity` is already divided by the temperature [B, P]. `documents` are the document numbers of its columns [P],
    `targets` is the positive of each question [B], and `gold` holds all its gold documents, padded with -1 [B, G].
    -> the loss of each question, and whether its positive scores highest. [B], [B]
    """
    same = documents[:, None] == documents[None, :]  # [P, P]
    repeated = same.tril(-1).any(1)  # [P]
    target = (documents == targets[:, None]).int().argmax(1)  # [B], the first column of the positive
    gold_columns = (documents[None, :, None] == gold[:, None, :]).any(-1)  # [B, P]
    excluded = (gold_columns | repeated).scatter(1, target[:, None], False)
    logits = similarity.float().masked_fill(excluded, float("-inf"))
    return functional.cross_entropy(logits, target, reduction="none"), logits.argmax(1) == target


def boost_gold(scores: Tensor, gold: Tensor) -> Tensor:
    """The scores, with gold ones raised to their row's maximum plus its population standard deviation.

    Scores are -inf where a question has fewer than K documents; these are ignored. [B, K] x 2 -> [B, K]
    """
    present = scores.isfinite()
    known = scores.masked_fill(~present, torch.nan)
    deviation = (known - known.nanmean(-1, keepdim=True)).square().nanmean(-1, keepdim=True).sqrt()
    highest = scores.max(-1, keepdim=True).values
    return (highest + deviation).where(gold & present, scores)


def distillation(teacher: Tensor, student: Tensor, direction: str = "teacher_to_student") -> Tensor:
    """KL divergence of each question's distribution over its K documents, summed over documents. [B, K] x 2 -> [B]

    Both are logits, -inf where a question has fewer than K documents; the teacher's get no gradient. A question without
    documents contributes zero loss and no gradient. `teacher_to_student` is KL(teacher || student);
    `student_to_teacher` is the reverse (Shi et al. 2023).
    """
    empty = teacher.isneginf().all(-1, keepdim=True)  # [B, 1]; both become uniform here, so their divergence is 0
    target, ours = (logits.float().masked_fill(empty, 0.0).log_softmax(-1) for logits in (teacher.detach(), student))
    left, right = (target, ours) if direction == "teacher_to_student" else (ours, target)
    present = target.isfinite()
    terms = left.exp() * (left.masked_fill(~present, 0.0) - right.masked_fill(~present, 0.0))
    return terms.sum(-1)


def marginal_nll(log_likelihood: Tensor, student: Tensor) -> Tensor:
    """-log sum_k P_R(d_k | q) p_LM(a | q, d_k), where P_R is the retriever's softmax (Sachan et al. 2021).

    `log_likelihood` is log p_LM of the whole answer and gets no gradient; `student` holds the retriever's logits. Both
    are -inf where a question has fewer than K documents. A question without documents contributes zero loss and no
    gradient. [B, K] x 2 -> [B]
    """
    empty = log_likelihood.isneginf().all(-1, keepdim=True)  # [B, 1]
    target, logits = (x.float().masked_fill(empty, 0.0) for x in (log_likelihood.detach(), student))
    present = target.isfinite()  # -inf minus -inf would make the gradient NaN
    joint = (logits.log_softmax(-1).masked_fill(~present, 0.0) + target).logsumexp(-1)  # [B]
    return -joint.masked_fill(empty[:, 0], 0.0)
