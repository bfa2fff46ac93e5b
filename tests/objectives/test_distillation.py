"""Distillation: the retriever's column and the teacher's are the same document, and only the retriever learns."""

from dataclasses import replace

import torch
import numpy as np
import pytest
from torch import Tensor
from transformers import AutoModelForCausalLM

from rqa.data import Document, Example
from rqa.models.encoder import Encoder, load_encoder
from rqa.objectives import distillation as module
from rqa.objectives.rpg import Distillation, DistillationBatch
from rqa.retrieval.index import IndexArguments
from rqa.retrieval.retriever import Retriever

TEMPERATURE = 0.1
ABSENT = float("-inf")


@pytest.fixture
def encoder(encoder_path: str) -> Encoder:
    """Without dropout, that runs can be compared."""
    return load_encoder(encoder_path).eval()


@pytest.fixture
def batch(encoder: Encoder, examples: list[Example], documents: list[Document]) -> DistillationBatch:
    """Three questions with four documents of six, the last question with two."""
    return DistillationBatch(
        queries=encoder.tokenize_queries([example.question for example in examples[:3]]),
        passages=encoder.tokenize_passages([document.fmt_content for document in documents[:6]]),
        columns=torch.tensor([[0, 1, 2, 3], [5, 4, 1, 0], [2, 3, 0, 0]]),
        teacher=torch.tensor([[-1.0, -9.0, -3.0, -4.0], [-2.0, -2.5, -7.0, -1.5], [-3.0, -6.0, ABSENT, ABSENT]]),
        indices=[0, 1, 2],
    )


def gradients(objective: Distillation, batch: DistillationBatch) -> tuple[Tensor, dict[str, Tensor]]:
    objective.zero_grad()
    loss, _ = objective(batch)
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in objective.named_parameters() if p.grad is not None}


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    largest = max(float(gradient.abs().max()) for gradient in theirs.values())
    for name, gradient in theirs.items():
        assert (ours[name] - gradient).abs().max() <= 5e-5 * largest, name


@pytest.mark.parametrize("direction", ["teacher_to_student", "student_to_teacher"])
def test_the_loss_is_the_naive_divergence_of_one_text_at_a_time(
    direction: str, encoder: Encoder, batch: DistillationBatch
) -> None:
    expected = 0.0
    for query, columns, logits in zip(batch.queries, batch.columns.tolist(), batch.teacher.double(), strict=True):
        there = logits > ABSENT
        question = encoder.embed([query])[0].astype(np.float64)
        passages = [encoder.embed([batch.passages[column]])[0].astype(np.float64) for column in columns]
        student = torch.tensor([float(question @ passage) / TEMPERATURE for passage in passages])[there].double()
        pair = [logits[there].softmax(-1), student.softmax(-1)]
        left, right = pair if direction == "teacher_to_student" else reversed(pair)
        expected += float((left * (left / right).log()).sum())
    loss, _ = Distillation(encoder, TEMPERATURE, direction)(batch)
    assert float(loss) == pytest.approx(expected, rel=1e-4)


def test_renumbering_passages_and_reordering_columns_leaves_loss_and_gradient(
    encoder: Encoder, batch: DistillationBatch
) -> None:
    objective = Distillation(encoder, TEMPERATURE, "teacher_to_student")
    loss, expected = gradients(objective, batch)
    order, columns = torch.tensor([3, 5, 0, 1, 4, 2]), torch.tensor([2, 0, 3, 1])
    permuted = replace(
        batch,
        passages=[batch.passages[i] for i in order],
        columns=order.argsort()[batch.columns][:, columns],
        teacher=batch.teacher[:, columns],
    )
    again, ours = gradients(objective, permuted)
    torch.testing.assert_close(again, loss)
    assert_same(ours, expected)
    misaligned, _ = gradients(objective, replace(batch, columns=batch.columns[:, [1, 0, 2, 3]]))
    assert abs(misaligned - loss) > 1e-2


@pytest.mark.parametrize("chunk_size", [1, 2, 5])
def test_a_batch_in_chunks_has_the_gradient_of_the_whole(
    chunk_size: int, encoder: Encoder, batch: DistillationBatch
) -> None:
    loss, expected = gradients(Distillation(encoder, TEMPERATURE, "teacher_to_student"), batch)
    again, ours = gradients(Distillation(encoder, TEMPERATURE, "teacher_to_student", chunk_size), batch)
    torch.testing.assert_close(again, loss)
    assert_same(ours, expected)


def test_an_absent_document_gets_no_gradient_though_its_column_names_a_passage(
    encoder: Encoder, batch: DistillationBatch
) -> None:
    objective = Distillation(encoder, TEMPERATURE, "teacher_to_student")
    loss, expected = gradients(objective, batch)
    columns = batch.columns.clone()
    columns[2, 2:] = 5
    again, ours = gradients(objective, replace(batch, columns=columns))
    torch.testing.assert_close(again, loss)
    assert_same(ours, expected)
    assert all(gradient.isfinite().all() for gradient in ours.values())


def test_the_gradient_reaches_the_encoder_and_not_the_language_model(
    encoder: Encoder, batch: DistillationBatch, lm_path: str
) -> None:
    lm = AutoModelForCausalLM.from_pretrained(lm_path)
    scores = torch.stack([lm(torch.tensor([ids])).logits.mean((1, 2))[0] for ids in batch.passages])  # has a gradient
    objective = Distillation(encoder, TEMPERATURE, "teacher_to_student")
    _, found = gradients(objective, replace(batch, teacher=1000 * scores[batch.columns]))
    assert all(parameter.grad is None for parameter in lm.parameters())
    assert {id(parameter) for parameter in objective.parameters()} == {id(p) for p in encoder.parameters()}
    unused = {name for name, _ in objective.named_parameters()} - found.keys()
    assert all("pooler" in name for name in unused)
    assert all(gradient.abs().sum() > 0 for name, gradient in found.items() if "key.bias" not in name)


@pytest.mark.parametrize("bf16", [False, True])
def test_the_similarity_is_the_score_by_which_the_index_ranks(
    bf16: bool,
    encoder: Encoder,
    batch: DistillationBatch,
    examples: list[Example],
    documents: list[Document],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    retriever = Retriever(encoder, documents, IndexArguments())
    seen = []
    monkeypatch.setattr(module, "distillation", lambda teacher, student, _: seen.append(student) or student)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        retriever.refresh()
        hits = retriever.retrieve([example.question for example in examples[:3]], len(documents))
        Distillation(encoder, TEMPERATURE, "teacher_to_student")(batch)
    (similarity,) = seen
    ranked = [dict(zip(*row, strict=True)) for row in zip(hits.ids.tolist(), hits.scores.tolist(), strict=True)]
    for row, columns in enumerate(batch.columns.tolist()):
        present = [k for k in range(4) if batch.teacher[row, k] > ABSENT]
        ours = (similarity[row, present] * TEMPERATURE).tolist()
        # In bf16 the embeddings of differently packed rows differ by rounding; products are exact either way.
        assert ours == pytest.approx([ranked[row][columns[k]] for k in present], abs=1e-3 if bf16 else 1e-6)


def test_statistics_tell_the_agreement_and_the_teachers_hit_rate(encoder: Encoder, batch: DistillationBatch) -> None:
    objective = Distillation(encoder, TEMPERATURE, "teacher_to_student")
    similarity = torch.from_numpy(encoder.embed(batch.queries) @ encoder.embed(batch.passages).T)
    ranking = similarity.gather(1, batch.columns)
    ranking[2, 2:] = ABSENT
    assert objective(replace(batch, teacher=ranking))[1]["agreement"] == 1
    turned = ranking.clone()
    turned[0] = -turned[0]
    assert objective(replace(batch, teacher=turned))[1]["agreement"] == pytest.approx(2 / 3)
    assert objective(replace(batch, hit_rate=0.25))[1]["teacher_hit_rate"] == 0.25
