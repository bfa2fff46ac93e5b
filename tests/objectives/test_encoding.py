"""Embeddings with gradient: in chunks as all at once, under dropout too."""

import torch
import pytest
from torch import Tensor

from rqa.models.encoder import Encoder, load_encoder
from rqa.objectives.encoding import embed_in_chunks


@pytest.fixture
def encoder(encoder_path: str) -> Encoder:
    """Without dropout, so that runs can be compared."""
    return load_encoder(encoder_path).eval()


@pytest.fixture
def sequences(encoder: Encoder) -> list[list[int]]:
    texts = ["salt on the market", "wool", "a harbour of amber and silk", "pepper", "a b",
             "the market of Hask each spring", "paper"]  # fmt: skip
    return encoder.tokenize_passages(texts)


def loss_and_gradients(encoder: Encoder, sequences: list[list[int]], size: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Of a loss that every number of every embedding decides."""
    encoder.zero_grad()
    embeddings = embed_in_chunks(encoder, sequences, size)
    weights = torch.linspace(-1, 1, embeddings.numel(), device=embeddings.device).sin().view_as(embeddings)
    loss = (embeddings * weights).sum()
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in encoder.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("size", [0, 1, 2, 3, 7, 100])
def test_chunks_give_the_embeddings_of_one_text_at_a_time_and_the_gradient_of_the_whole_batch(
    size: int, encoder: Encoder, sequences: list[list[int]]
) -> None:
    expected = torch.cat([torch.from_numpy(encoder.embed([ids])) for ids in sequences])
    ours = embed_in_chunks(encoder, sequences, size)
    torch.testing.assert_close(ours.detach().cpu(), expected, atol=1e-5, rtol=1e-4)
    (loss, found), (whole, wanted) = (loss_and_gradients(encoder, sequences, n) for n in (size, 0))
    torch.testing.assert_close(loss, whole)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA"))]
)
def test_under_dropout_the_backward_pass_repeats_the_choice_of_the_forward_pass(
    device: str, encoder: Encoder, sequences: list[list[int]]
) -> None:
    encoder.train().to(device)
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(loss_and_gradients(encoder, sequences, 2))
    (loss, gradients), (_, again), (other, _) = found
    assert loss != other  # dropout is on
    torch.testing.assert_close(gradients, again, atol=1e-6, rtol=1e-4)
    # A step along the gradient changes the loss under the very same dropout as the gradient says.
    slope = sum(float((gradient.double() ** 2).sum()) for gradient in gradients.values())
    step = 0.002 / slope
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if name in gradients:
                parameter -= step * gradients[name]
    torch.manual_seed(1)
    lower, _ = loss_and_gradients(encoder, sequences, 2)
    assert (loss - lower).item() == pytest.approx(step * slope, rel=0.1)
