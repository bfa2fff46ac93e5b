"""RERANK: the loss over lists, who is in them, who judges them, and runs of train_rerank as a user makes them."""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import numpy as np
import pytest
from fakes import gradients
from trainers import Train, calls, history, scores, written

from rqa.data import Document, Example, write_examples
from rqa.models.reranker import Reranker, load_reranker
from rqa.objectives.dca import CrossAttentionScorer
from rqa.objectives.rerank import Lists, ListwiseReranking, RerankArguments
from rqa.retrieval.hybrid import LexicalRetriever
from rqa.runtime.errors import UserError

TEACHERS = ((CrossAttentionScorer, "__call__"), (Reranker, "score"))
UNTESTED = {"eval_file": None, "test_file": None}
TEMPERATURE = 0.5


class Lengths:
    """A teacher that can be computed by hand: the shorter, the better."""

    hit_rate = 0.25

    def __call__(self, pairs: Sequence[Any]) -> list[float]:
        return [-len(pair.document.page_content) / 10 for pair in pairs]


@pytest.fixture
def reranker(encoder_path: str) -> Reranker:
    """A plain BERT with a new head."""
    return load_reranker(encoder_path, new_head=True)


@pytest.fixture
def asked(examples: list[Example], documents: list[Document]) -> list[Example]:
    """Eight questions with three hard negatives; the second has none, the third one and no gold passage."""
    rows = [replace(e, hard_neg_docs=tuple(documents[n + 2 : n + 5])) for n, e in enumerate(examples[:8])]
    rows[1], rows[2] = replace(rows[1], hard_neg_docs=()), replace(rows[2], gold_docs=(), hard_neg_docs=(documents[9],))
    return rows


def lists(reranker: Reranker, asked: list[Example], documents: list[Document], teacher: Any = None) -> Lists:
    flags = {"lm_model_path": "x", "lm_temperature": TEMPERATURE} if teacher else {"num_other_gold": 0}
    return Lists(asked, documents, reranker, None, RerankArguments(negatives_from="file", **flags), 1, teacher)


@pytest.mark.parametrize("teacher", [None, Lengths()], ids=["gold", "teacher"])
def test_the_loss_is_that_of_one_pair_at_a_time_in_float64_and_any_split_has_its_gradient(
    teacher: Lengths | None, reranker: Reranker, asked: list[Example], documents: list[Document]
) -> None:
    asked = asked if teacher else [e for e in asked if e.gold_docs]
    collate, objective = lists(reranker, asked, documents, teacher), ListwiseReranking(reranker)
    expected = 0.0
    for example in asked:
        row = [*example.gold_docs, *example.hard_neg_docs]
        student = torch.tensor([float(reranker.score([(example.question, d.fmt_content)])[0]) for d in row]).double()
        wanted = torch.tensor([1.0] + [0.0] * (len(row) - 1)).double()
        if teacher:
            wanted = torch.tensor([-len(d.page_content) / 10 / TEMPERATURE for d in row]).double().softmax(0)
        terms = [float(p) * (float(p.log()) - s) for p, s in zip(wanted, student.log_softmax(0), strict=True) if p]
        expected += float(sum(terms))
    loss, whole = gradients(objective, collate(range(len(asked))))
    assert float(loss) == pytest.approx(expected, rel=1e-4)
    for size in (4, 2, 1):
        parts = [gradients(objective, collate(range(n, min(n + size, len(asked))))) for n in range(0, len(asked), size)]
        assert float(sum(part for part, _ in parts)) == pytest.approx(expected, rel=1e-4)
        for name, gradient in whole.items():
            torch.testing.assert_close(sum(part[name] for _, part in parts), gradient, atol=1e-5, rtol=1e-3)


def test_no_gold_passage_is_a_negative_and_one_of_them_leads_each_list(
    reranker: Reranker, examples: list[Example], documents: list[Document], caplog: pytest.LogCaptureFixture
) -> None:
    copy = Document(documents[0].page_content.upper(), {"source": "elsewhere"})
    example = replace(examples[0], gold_docs=tuple(documents[:2]), hard_neg_docs=(copy, *documents[1:4], documents[2]))
    seen = []
    judge = lambda pairs: seen.append([pair.document for pair in pairs]) or [0.0] * len(pairs)  # noqa: E731
    judge.hit_rate = 0.0
    collate = lists(reranker, [example, examples[1]], documents, judge)
    assert "3 passages of hard_neg_docs are left out" in caplog.text
    collate.count()
    assert "1 of 2 questions have no two passages to rank" in caplog.text
    for seed in range(8):
        collate.seed = seed
        assert collate([0]).present[0].tolist() == [True] * 3 + [False] * 8
    assert {row[0].key for row in seen} == {document.key for document in documents[:2]}
    assert all({d.key for d in row[1:]} == {d.key for d in documents[2:4]} for row in seen)
    with pytest.raises(UserError, match="no question gets a negative"):
        lists(reranker, [examples[1]], documents).count()
    with pytest.raises(UserError, match=r"train\.jsonl:2: field 'gold_docs' is empty; RERANK needs a gold passage"):
        lists(reranker, [replace(example, gold_docs=(), where="train.jsonl:2")], documents)


def test_other_questions_gold_passages_are_negatives_but_not_the_same_question_s(
    reranker: Reranker, examples: list[Example], documents: list[Document]
) -> None:
    again = replace(examples[0], gold_docs=(documents[1],))
    flags = RerankArguments(negatives_from="file", num_other_gold=4)
    collate = Lists([*examples[:5], again], documents, reranker, None, flags, seed=1)
    first = collate([0])
    assert first.present[0].sum() == 1 + 3  # the golds of 2, 3, 4; 1 is gold in the last line
    shown = [
        reranker.tokenizer.decode(reranker.tokenize([(examples[0].question, documents[n].fmt_content)])[0])
        for n in (0, 2, 3, 4)
    ]
    ids, lengths = first.pairs.inputs["input_ids"].flatten()[first.pairs.rows], first.pairs.lengths.tolist()
    assert sorted(map(reranker.tokenizer.decode, ids.split(lengths))) == sorted(shown)


def test_train_rerank_learns_and_saves_what_it_measured(
    train: Train, documents: list[Document], examples: list[Example]
) -> None:
    """Its test score is that of the saved model on all passages, ranked here."""
    output = train("train_rerank", learning_rate=3e-3, lr_scheduler_type="constant", max_steps=40, eval_steps=20,
                   per_device_train_batch_size=8, save_strategy="no", rerank_depth=24)  # fmt: skip
    loss, mrr = history(output, "loss"), history(output, "eval_retr/mrr@10")
    assert np.mean(loss[-5:]) < 0.9 * np.mean(loss[:5])
    assert len(mrr) == len(history(output, "eval_retr/ndcg@10")) == 3
    assert written(output, "trainer_state.json")["best_metric"] == max(mrr)
    for name in ("eval", "test"):
        assert (output / "train.log").read_text().count(f"first stage alone  {name}_retr/recall@1 1  ") == 1
    last, expected = load_reranker(str(output)), []
    first = LexicalRetriever(documents)
    for example in examples[20:]:
        (found,) = first.documents_of(first.retrieve([example.question], 24))
        rated = last.score([(example.question, document.fmt_content) for document in found])
        rank = 1 + int((rated > rated[found.index(example.gold_docs[0])]).sum())
        expected.append(1 / rank if rank <= 10 else 0.0)
    assert scores(output)["test_retr/mrr@10"] == pytest.approx(np.mean(expected))


MINED = {"mine_negatives": "true", "refresh_step": 3, "num_hard_negatives": 2, "negatives_to_rank": 4, "max_steps": 8,
         "learning_rate": 1e-3, "save_steps": 1, "save_total_limit": 40}  # fmt: skip


def test_negatives_that_the_reranker_ranks_first_are_there_again_after_a_kill_between_two_minings(
    train: Train, tmp_path: Path
) -> None:
    output = train("train_rerank", **MINED, **UNTESTED)
    assert sorted(path.name for path in output.glob("index-*")) == ["index-3", "index-6"]
    pools = [written(output / name, "negatives.json") for name in ("index-3", "index-6")]
    assert pools[0] != pools[1]
    for step in (2, 5):
        half = tmp_path / f"from {step}"
        shutil.copytree(output / f"checkpoint-{step}", half / f"checkpoint-{step}")
        if step == 5:
            shutil.copytree(output / "index-3", half / "index-3")
        train("train_rerank", **MINED, **UNTESTED, output_dir=half, resume_from_checkpoint="true")
        for name in ("model.safetensors", "training_state.pt"):
            assert (half / "checkpoint-8" / name).read_bytes() == (output / "checkpoint-8" / name).read_bytes(), name


def test_a_reranker_and_a_reader_teach_without_answers_and_are_asked_once(
    train: Train, examples: list[Example], t5_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reader sees each list whole; a question without a gold passage has a list, too."""
    bare = [replace(example, gold_answer=None) for example in examples[:8]]
    write_examples(tmp_path / "bare.jsonl", [replace(bare[0], gold_docs=()), *bare[1:]])
    taught = {**UNTESTED, "train_file": tmp_path / "bare.jsonl"}
    asked = [calls(monkeypatch, kind, method) for kind, method in TEACHERS]
    reader = train("train_rerank", **taught, lm_model_path=t5_path, negatives_to_rank=4, max_steps=6)
    assert sum(len(pairs) for (pairs,) in asked[0]) == 7 * 5 + 4
    assert {len(pair.beside) for (pairs,) in asked[0] for pair in pairs} == {4, 5}
    assert history(reader, "teacher_hit_rate")[-1] == pytest.approx(2 / 3)  # each list three times
    for trainer, own, new in (("rerank", {"negatives_to_rank": 4}, 7 * 5 + 4), ("rpg", {}, None), ("rpg", {}, 0)):
        asked[1].clear()
        output = tmp_path / f"{trainer} {new}"
        train(f"train_{trainer}", **taught, **own, lm_model_path=f"reranker::{reader}", output_dir=output)
        assert new is None or sum(len(pairs) for (pairs,) in asked[1]) == new
    assert set(history(output, "teacher_hit_rate")) == {1}
