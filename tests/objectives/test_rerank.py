"""RERANK: the loss over lists, who is in them, who judges them, and runs of train_rerank as a user makes them."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import numpy as np
import pytest
from fakes import Lengths, gradients
from trainers import UNTESTED, Train, calls, history, scores, written

from rqa.data import Document, Example, write_examples
from rqa.models.reranker import Reranker, load_reranker
from rqa.objectives.dca import CrossAttentionScorer
from rqa.objectives.rerank import Lists, ListwiseReranking, RerankArguments
from rqa.retrieval.hybrid import LexicalRetriever
from rqa.retrieval.reranking import USUAL_SHARE, RerankingArguments, reranking
from rqa.runtime.errors import UserError

TEACHERS = ((CrossAttentionScorer, "__call__"), (Reranker, "score"))
TEMPERATURE = 0.5


@pytest.fixture
def reranker(encoder_path: str) -> Reranker:
    """A plain BERT with a new head."""
    return load_reranker(encoder_path, new_head=True)


@pytest.fixture
def asked(examples: list[Example], documents: list[Document]) -> list[Example]:
    """Eight questions with three hard negatives; the second has none, the third no gold passage, the fourth neither."""
    rows = [replace(e, hard_neg_docs=tuple(documents[n + 2 : n + 5])) for n, e in enumerate(examples[:8])]
    rows[1], rows[2] = replace(rows[1], hard_neg_docs=()), replace(rows[2], gold_docs=(), hard_neg_docs=(documents[9],))
    rows[3] = replace(rows[3], gold_docs=(), hard_neg_docs=())
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


def keys(found: Lists, example: int, seed: int = 1) -> list[tuple[str, ...]]:
    """Which passages a question gets in one step."""
    found.seed = seed
    return [found.documents[number].key for number in found.chosen([example])[0]]


def test_no_gold_passage_is_a_negative_and_one_of_them_leads_each_list(
    reranker: Reranker, examples: list[Example], documents: list[Document], caplog: pytest.LogCaptureFixture
) -> None:
    """By its text, whatever its source; nor is what is gold in another line for the same question."""
    copy, other = (Document(documents[n].page_content.upper(), {"source": "elsewhere"}) for n in (0, 7))
    two = replace(examples[0], gold_docs=tuple(documents[:2]), hard_neg_docs=(copy, *documents[1:4], documents[2]))
    again = replace(two, question=two.question.upper(), gold_docs=(documents[7],), hard_neg_docs=(documents[0],))
    asked = [two, again, *examples[4:8], replace(examples[8], gold_docs=(other,))]
    rows = [keys(lists(reranker, asked, documents), 0, seed) for seed in range(8)]
    assert "4 passages of hard_neg_docs are left out" in caplog.text
    assert {row[0] for row in rows} == {document.key for document in documents[:2]}
    assert all(set(row[1:]) == {document.key for document in documents[2:4]} for row in rows)
    others = Lists(asked, documents, reranker, None, RerankArguments(negatives_from="file"), seed=1)
    rows = [keys(others, 1, seed) for seed in range(30)]
    assert {len(row) for row in rows} == {1 + 2}
    assert {key for row in rows for key in row[1:]} == {document.key for document in documents[4:7]}
    with pytest.raises(UserError, match=r"train\.jsonl:2: field 'gold_docs' is empty; give a gold passage"):
        lists(reranker, [replace(two, gold_docs=(), where="train.jsonl:2")], documents)


@pytest.mark.parametrize("weight", [1.0, None])
def test_train_rerank_learns_and_saves_what_it_measured_and_its_share_of_a_sum(
    weight: float | None, train: Train, documents: list[Document], examples: list[Example],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Its test score is that of the saved model on all passages, ranked here."""
    output = train("train_rerank", learning_rate=3e-3, lr_scheduler_type="constant", max_steps=40, eval_steps=20,
                   per_device_train_batch_size=8, save_strategy="no", rerank_depth=24, rerank_weight=weight,
                   load_best_model_at_end="true")  # fmt: skip
    loss, mrr = history(output, "loss"), history(output, "eval_retr/mrr@10")
    assert np.mean(loss[-5:]) < 0.9 * np.mean(loss[:5])
    assert len(mrr) == len(history(output, "eval_retr/ndcg@10")) == 3
    assert written(output, "trainer_state.json")["best_metric"] == max(mrr)
    told = (output / "train.log").read_text()
    assert told.count("first stage alone  retr/recall@1 1  ") == 2  # before step 0, and of the test file
    assert "16 questions are few for a new head" in told
    last, first = load_reranker(str(output)), LexicalRetriever(documents)

    def reciprocal(example: Example, share: float) -> float:
        hits = first.retrieve([example.question], 24)
        (found,) = first.documents_of(hits)
        rated, bm25 = last.score([(example.question, document.fmt_content) for document in found]), hits.scores[0]
        ranges = [(each - each.min()) / (each.max() - each.min()) for each in (rated, bm25[: len(found)])]
        total = share * ranges[0] + (1 - share) * ranges[1]
        rank = 1 + int((total > total[found.index(example.gold_docs[0])]).sum())
        return 1 / rank if rank <= 10 else 0.0

    if weight is None:  # BM25 alone is right, so any share of the reranker above the usual one is worse
        shares = (USUAL_SHARE, last.weight)
        means = {share: np.mean([reciprocal(e, share) for e in examples[16:20]]) for share in shares}
        assert last.weight <= USUAL_SHARE
        assert means[last.weight] >= means[USUAL_SHARE]
        assert f"--rerank_weight {last.weight:.2f}: chosen by 4 questions" in told
    else:
        assert last.weight == weight
    expected = [reciprocal(example, last.weight) for example in examples[20:]]
    assert scores(output)["test_retr/mrr@10"] == pytest.approx(np.mean(expected))
    used = [reranking(RerankingArguments(reranker=str(output)), stage)(first).weight for stage in ("bm25", "dense")]
    assert used == [last.weight] * 2
    assert ("was chosen behind bm25, not behind dense" in capsys.readouterr().err) == (weight is None)


def test_questions_that_teach_nothing_are_counted_and_harm_nothing(
    train: Train, asked: list[Example], tmp_path: Path
) -> None:
    write_examples(tmp_path / "some.jsonl", [example for example in asked if example.gold_docs])
    output = train("train_rerank", **UNTESTED, train_file=tmp_path / "some.jsonl", negatives_from="file",
                   num_other_gold=0, per_device_train_batch_size=1, max_steps=6)  # fmt: skip
    assert "1 of 6 questions have fewer than two passages to rank" in (output / "train.log").read_text()
    assert history(output, "loss").count(0) == 1


MINED = {"mine_negatives": "true", "refresh_step": 3, "num_hard_negatives": 2, "negatives_to_rank": 4, "max_steps": 8,
         "learning_rate": 1e-3, "save_steps": 1, "save_total_limit": 40}  # fmt: skip


def test_negatives_that_the_reranker_ranks_first_are_there_again_after_a_kill_between_two_minings(
    train: Train, files: dict[str, Path], tmp_path: Path
) -> None:
    """Over the same documents."""
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
    fewer = tmp_path / "fewer.jsonl"
    fewer.write_text("".join(files["full_dataset_file_path"].read_text().splitlines(keepends=True)[1:]))
    own = {"full_dataset_file_path": fewer, "output_dir": half, "resume_from_checkpoint": "true"}
    train("train_rerank", **MINED, **UNTESTED, **own)
    assert "index-6: its index has other documents" in (half / "train.log").read_text()


def test_a_reranker_and_a_reader_teach_without_answers_and_are_asked_once(
    train: Train, examples: list[Example], t5_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reader sees each list whole; a question without a gold passage has a list, too."""
    bare = [replace(example, gold_answer=None) for example in examples[:8]]
    write_examples(tmp_path / "bare.jsonl", [replace(bare[0], gold_docs=()), *bare[1:]])
    taught = {**UNTESTED, "train_file": tmp_path / "bare.jsonl"}
    asked = [calls(monkeypatch, kind, method) for kind, method in TEACHERS]
    (tmp_path / "prompt.txt").write_text("{question} {passage}")
    own = {"prompt_template": tmp_path / "prompt.txt", "max_encoder_seq_length": 64, "lm_model_path": t5_path}
    opened = calls(monkeypatch, CrossAttentionScorer, "__init__")
    reader = train("train_rerank", **taught, **own, negatives_to_rank=4, max_steps=6)
    assert opened[0][1].template == "{question} {passage}"
    assert sum(len(pairs) for (pairs,) in asked[0]) == 7 * 5 + 4
    assert {len(pair.beside) for (pairs,) in asked[0] for pair in pairs} == {4, 5}
    assert history(reader, "teacher_hit_rate")[-1] == pytest.approx(2 / 3)  # each list three times
    for trainer, own, new in (("rerank", {"negatives_to_rank": 4}, 7 * 5 + 4), ("rpg", {}, None), ("rpg", {}, 0)):
        asked[1].clear()
        output = tmp_path / f"{trainer} {new}"
        train(f"train_{trainer}", **taught, **own, lm_model_path=f"reranker::{reader}", output_dir=output)
        assert new is None or sum(len(pairs) for (pairs,) in asked[1]) == new
    assert set(history(output, "teacher_hit_rate")) == {1}


def test_adapters_are_trained_tested_and_merged(
    train: Train, reranker: Reranker, examples: list[Example], documents: list[Document], tmp_path: Path
) -> None:
    """With gradient checkpointing and accumulation; the merged model scores as base and adapters do."""
    reranker.save_pretrained(tmp_path / "base")
    output = train("train_rerank", model_name_or_path=tmp_path / "base", use_lora="true", merge_lora_on_save="true",
                   gradient_checkpointing="true", gradient_accumulation_steps=2, max_steps=3, learning_rate=0.01,
                   save_steps=3, save_total_limit=9, metric_for_best_model="retr/ndcg@10",
                   load_best_model_at_end="true")  # fmt: skip
    pairs = [(examples[0].question, document.fmt_content) for document in documents]
    adapted, base = load_reranker(str(output / "checkpoint-3")).score(pairs), reranker.score(pairs)
    assert np.abs(adapted - base).max() > 1e-3
    best = written(output, "trainer_state.json")["best_model_checkpoint"]
    assert not (output / "adapter_config.json").exists()
    np.testing.assert_allclose(
        load_reranker(str(output)).score(pairs), load_reranker(str(output / best)).score(pairs), atol=1e-5
    )
