"""CTL: one gradient, however the batch is cut, ordered and spread over processes."""

import pickle
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch
import pytest
from torch import Tensor

from rqa.data import Document, Example
from rqa.models.encoder import Encoder, load_encoder
from rqa.objectives.ctl import Contrastive, ContrastiveBatch
from rqa.objectives.encoding import embed_in_chunks

TEMPERATURE = 0.1


@pytest.fixture
def encoder(encoder_path: str) -> Encoder:
    """Without dropout, that runs can be compared."""
    return load_encoder(encoder_path).eval()


@pytest.fixture
def batch(encoder: Encoder, examples: list[Example], documents: list[Document]) -> ContrastiveBatch:
    """Five questions, two of them with one gold passage, one with two; hard negatives, one of them a gold passage."""
    targets = [0, 1, 4, 4, 6]
    numbers = [0, 1, 4, 6, 7, 9, 10]
    return ContrastiveBatch(
        queries=encoder.tokenize_queries([examples[i].question for i in (0, 1, 4, 5, 6)]),
        passages=encoder.tokenize_passages([documents[number].fmt_content for number in numbers]),
        documents=torch.tensor(numbers),
        targets=torch.tensor(targets),
        gold=torch.tensor([[0, -1], [1, -1], [4, -1], [4, -1], [6, 7]]),
        indices=range(5),
    )


def gradients(encoder: Encoder, batch: ContrastiveBatch, chunk_size: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
    objective = Contrastive(encoder, TEMPERATURE, chunk_size)
    objective.zero_grad()
    loss, _ = objective(batch)
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in encoder.named_parameters() if p.grad is not None}


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert ours.keys() == theirs.keys()
    largest = max(float(gradient.abs().max()) for gradient in theirs.values())
    for name, gradient in theirs.items():
        assert (ours[name] - gradient).abs().max() <= tolerance * largest, name


def test_the_loss_is_the_mean_formula_one_text_at_a_time(encoder: Encoder, batch: ContrastiveBatch) -> None:
    queries, passages = (
        [torch.from_numpy(encoder.embed([ids])[0]).double() for ids in part] for part in (batch.queries, batch.passages)
    )
    expected = 0.0
    for query, target, gold in zip(queries, batch.targets.tolist(), batch.gold.tolist(), strict=True):
        weights = {
            number: torch.exp(query @ passage / TEMPERATURE)
            for number, passage in zip(batch.documents.tolist(), passages, strict=True)
            if number == target or number not in gold
        }
        expected -= float(torch.log(weights[target] / sum(weights.values())))
    assert float(gradients(encoder, batch)[0]) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("chunk_size", [1, 2, 3, 6, 100])
def test_a_batch_in_chunks_has_the_gradient_of_the_whole(
    chunk_size: int, encoder: Encoder, batch: ContrastiveBatch
) -> None:
    loss, expected = gradients(encoder, batch)
    chunked_loss, ours = gradients(encoder, batch, chunk_size)
    torch.testing.assert_close(chunked_loss, loss)
    assert_same(ours, expected)


@pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA"))]
)
def test_under_dropout_the_backward_pass_repeats_the_choice_of_the_forward_pass(
    device: str, encoder: Encoder, batch: ContrastiveBatch
) -> None:
    encoder.train().to(device)
    found = []
    for chunk_size, seed in ((2, 1), (2, 1), (2, 2)):
        torch.manual_seed(seed)
        found.append(gradients(encoder, batch.to(torch.device(device)), chunk_size))
    (loss, first), (_, second), (other, _) = found
    assert loss != other  # dropout is on
    assert_same(first, second, tolerance=1e-6)
    # A step along the gradient changes the loss under the very same dropout as the gradient says.
    slope = sum(float((gradient.double() ** 2).sum()) for gradient in first.values())
    step = 0.002 / slope
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if name in first:
                parameter -= step * first[name]
    torch.manual_seed(1)
    lower, _ = Contrastive(encoder, TEMPERATURE, 2)(batch.to(torch.device(device)))
    assert (loss - lower).item() == pytest.approx(step * slope, rel=0.1)


def test_the_gradient_reaches_the_whole_encoder_and_nothing_else(encoder: Encoder, batch: ContrastiveBatch) -> None:
    objective = Contrastive(encoder, TEMPERATURE)
    assert {id(p) for p in objective.parameters()} == {id(p) for p in encoder.parameters()}
    _, found = gradients(encoder, batch)
    unused = {name for name, _ in encoder.named_parameters()} - found.keys()
    assert all("pooler" in name for name in unused)
    assert all(gradient.abs().sum() > 0 for name, gradient in found.items() if "key.bias" not in name)


def test_a_batch_without_hard_negatives_and_one_of_a_single_question_train(
    encoder: Encoder, batch: ContrastiveBatch
) -> None:
    plain = replace(batch, passages=batch.passages[:4], documents=batch.documents[:4])
    loss, found = gradients(encoder, plain)
    assert 0 < loss < gradients(encoder, batch)[0]  # fewer documents to tell it from
    alone = replace(
        plain, queries=batch.queries[:1], passages=batch.passages[:1], documents=batch.documents[:1],
        targets=batch.targets[:1], gold=batch.gold[:1], indices=[0],
    )  # fmt: skip
    assert gradients(encoder, alone)[0] == 0
    assert found


def test_permuting_questions_and_documents_changes_nothing(encoder: Encoder, batch: ContrastiveBatch) -> None:
    questions, columns = torch.randperm(5), torch.randperm(7)
    permuted = ContrastiveBatch(
        queries=[batch.queries[i] for i in questions],
        passages=[batch.passages[i] for i in columns],
        documents=batch.documents[columns],
        targets=batch.targets[questions],
        gold=batch.gold[questions],
        indices=questions.tolist(),
    )
    (first, expected), (second, ours) = gradients(encoder, batch), gradients(encoder, permuted, chunk_size=3)
    torch.testing.assert_close(first, second)
    assert_same(ours, expected)


def test_the_similarity_is_computed_in_float32_under_autocast(encoder: Encoder, batch: ContrastiveBatch) -> None:
    """At a temperature of 0.001, bf16's rounding of a similarity near 1 would be a logit of 4."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        embeddings = [embed_in_chunks(encoder, part, 0).detach() for part in (batch.queries, batch.passages)]
        loss, _ = Contrastive(encoder, 0.001)(batch)
    logits = embeddings[0].double() @ embeddings[1].double().T / 0.001
    for row, (target, gold) in enumerate(zip(batch.targets.tolist(), batch.gold.tolist(), strict=True)):
        masked = [n in gold and n != target for n in batch.documents.tolist()]
        logits[row, masked] = float("-inf")
    columns = [batch.documents.tolist().index(target) for target in batch.targets.tolist()]
    expected = -logits.log_softmax(-1)[range(5), columns].sum()
    assert float(loss) == pytest.approx(float(expected), rel=1e-3)


@pytest.mark.parametrize("size", [0, 1, 2, 3, 7, 8])
def test_embeddings_in_chunks_keep_the_order_of_the_sequences(size: int, encoder: Encoder) -> None:
    sequences = encoder.tokenize_passages(["salt on the market", "wool", "a harbour of amber and silk", "pepper", "a b",
                                           "the market of Hask each spring", "paper"])  # fmt: skip
    expected = torch.cat([torch.from_numpy(encoder.embed([ids])) for ids in sequences])
    ours = embed_in_chunks(encoder, sequences, size)
    torch.testing.assert_close(ours.detach(), expected, atol=1e-5, rtol=1e-4)
    assert ours.requires_grad


WORKER = """
import pickle, sys
import torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from rqa.models.encoder import (load_encoder)
from rqa.objectives.ctl import (Contrastive)
from rqa.runtime import (distributed)

rank, port, folder = int(sys.argv[1]), sys.argv[2], sys.argv[3]
torch.set_num_threads(1)
dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", world_size=2, rank=rank)
encoder = load_encoder(f"{folder}/encoder").eval()
batch = pickle.load(open(f"{folder}/{rank}.pkl", "rb"))
objective = Contrastive(encoder, 0.1, chunk_size=2 * rank)  # here at once, there in chunks
module = DistributedDataParallel(objective, find_unused_parameters=True)
(weight,) = distributed.total([batch.weight])
loss, _ = module(batch)
(loss * (distributed.world_size() / weight)).backward()
if rank == 0:
    found = {name: p.grad for name, p in encoder.named_parameters() if p.grad is not None}
    torch.save({"loss": distributed.total([float(loss)])[0], "gradients": found}, f"{folder}/found.pt")
else:
    distributed.total([float(loss)])
dist.destroy_process_group()
"""


def test_two_processes_with_unequal_shares_have_the_gradient_of_one(
    encoder: Encoder, batch: ContrastiveBatch, tmp_path: Path
) -> None:
    encoder.save_pretrained(tmp_path / "encoder")
    (tmp_path / "worker.py").write_text(WORKER)
    # Four questions with six documents here; one question with three documents there, two of them known here, too.
    for rank, (rows, columns) in enumerate([([0, 1, 2, 4], [0, 1, 2, 3, 4, 5]), ([3], [2, 6, 5])]):
        part = ContrastiveBatch(
            queries=[batch.queries[i] for i in rows],
            passages=[batch.passages[i] for i in columns],
            documents=batch.documents[columns] + 100,  # no number that rows of padding might have
            targets=batch.targets[rows] + 100,
            gold=(batch.gold + 100).masked_fill(batch.gold < 0, -1)[rows],
            indices=rows,
        )
        (tmp_path / f"{rank}.pkl").write_bytes(pickle.dumps(part))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, str(tmp_path / "worker.py")]
    processes = [
        subprocess.Popen([*command, str(rank), str(port), str(tmp_path)], stderr=subprocess.PIPE) for rank in (0, 1)
    ]
    errors = [process.communicate(timeout=300)[1].decode() for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(errors)
    found = torch.load(tmp_path / "found.pt")
    loss, expected = gradients(encoder, batch)
    assert found["loss"] == pytest.approx(float(loss), rel=1e-4)
    assert_same(found["gradients"], {name: gradient / batch.weight for name, gradient in expected.items()})
