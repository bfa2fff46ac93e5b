"""Pure tensor functions: what the algorithms minimise."""

from torch import Tensor
from torch.nn import functional


def answer_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood of each answer token, in float32. [N, V], [N] -> [N]"""
    return functional.cross_entropy(logits.float(), targets, reduction="none")
