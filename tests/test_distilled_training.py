"""train_dca and train_emdr as a user runs them; a reader of train_fid teaches the retriever."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import faiss
import numpy as np
import pytest
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from trainers import history, without

from rqa.data import Document, Example, write_examples
from rqa.models.encoder import load_encoder
from rqa.objectives.dca import CrossAttentionScorer

Run = Callable[[str, dict[str, object]], int]


@pytest.fixture
def dca(
    files: dict[str, Path], encoder_path: str, t5_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, object]:
    """A complete set of flags for train_dca, with a cache of its own."""
    monkeypatch.setenv("RQA_CACHE", str(tmp_path / "cache"))
    return {
        "model_name_or_path": encoder_path,
        "reader_model_path": t5_path,
        **files,
        "output_dir": tmp_path / "out",
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "eval_on_start": "false",
        "n_context": 4,
        "max_encoder_seq_length": 64,
    }


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many pairs the reader was asked for, by call."""
    asked: list[int] = []
    original = CrossAttentionScorer.__call__
    monkeypatch.setattr(
        CrossAttentionScorer, "__call__", lambda self, pairs: asked.append(len(pairs)) or original(self, pairs)
    )
    return asked


def test_the_projection_trains_is_saved_and_is_used_by_the_index(
    dca: dict[str, object], run_executable: Run, documents: list[Document], tmp_path: Path, reads: list[int]
) -> None:
    flags = {**dca, "projection": "true", "indexing_dimension": 12, "reader_temperature": 0.01, "max_steps": 30,
             "learning_rate": 3e-3, "retrieve_temperature": 0.1, "save_steps": 1, "attention_score": "value_norm",
             "reader_batch_size": 3, "boost_gold": "true"}  # fmt: skip
    assert run_executable("train_dca", flags) == 0
    loss = history(tmp_path / "out", "loss")
    assert np.mean(loss[-5:]) < np.mean(loss[:5])
    assert sum(reads) == 16 * 4  # each question's list once, in eight epochs
    first, last = (
        load_file(tmp_path / f"out/checkpoint-{step}/2_Dense/model.safetensors")["linear.weight"] for step in (1, 30)
    )
    assert first.shape == (12, 32)
    assert (first - last).abs().max() > 1e-3
    texts = [document.fmt_content for document in documents]
    ours = load_encoder(str(tmp_path / "out"))
    found = ours.embed(ours.tokenize_passages(texts))
    theirs = SentenceTransformer(str(tmp_path / "out"), device="cpu").encode(texts, show_progress_bar=False)
    np.testing.assert_allclose(found, theirs, atol=1e-5)
    build = {"embedding_model_name_or_path": tmp_path / "out", "document_path": dca["full_dataset_file_path"],
             "index_path": tmp_path / "index"}  # fmt: skip
    assert run_executable("build_index", build) == 0
    assert json.loads((tmp_path / "index/index.json").read_text())["documents"] == len(documents)
    index = faiss.read_index(str(tmp_path / "index/index.faiss"))
    np.testing.assert_allclose(index.reconstruct_n(0, len(documents)), found, atol=1e-5)
    assert "test_retr/recall@4" in json.loads((tmp_path / "out/score.json").read_text())


def test_a_second_run_asks_the_reader_for_nothing_and_another_reader_for_all(
    dca: dict[str, object], run_executable: Run, tmp_path: Path, reads: list[int], encoder_path: str
) -> None:
    assert run_executable("train_dca", dca) == 0
    asked = sum(reads)
    assert asked > 0
    assert run_executable("train_dca", {**dca, "output_dir": tmp_path / "again"}) == 0
    assert sum(reads) == asked
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "again"))
    assert all((first[name] == second[name]).all() for name in first)
    fid = {**without(dca, "reader_model_path", "n_context"), "model_name_or_path": f"bert::{encoder_path}",
           "embedding_model": encoder_path, "output_dir": tmp_path / "fid", "max_decoder_seq_length": 16}  # fmt: skip
    assert run_executable("train_fid", without(fid, "eval_file", "test_file")) == 0
    trained = {**dca, "reader_model_path": tmp_path / "fid", "output_dir": tmp_path / "third"}
    assert run_executable("train_dca", trained) == 0
    assert sum(reads) == 2 * asked
    assert history(tmp_path / "third", "loss") != history(tmp_path / "out", "loss")


def test_resuming_gives_the_very_same_model(dca: dict[str, object], run_executable: Run, tmp_path: Path) -> None:
    flags = {**without(dca, "eval_file", "test_file"), "save_steps": 2, "projection": "true", "indexing_dimension": 8}
    assert run_executable("train_dca", flags) == 0
    half = {**flags, "output_dir": tmp_path / "half"}
    assert run_executable("train_dca", half) == 0
    for path in ("checkpoint-4/COMPLETE", "model.safetensors"):
        (tmp_path / "half" / path).unlink()
    assert run_executable("train_dca", {**half, "resume_from_checkpoint": "true"}) == 0
    for name in ("model.safetensors", "2_Dense/model.safetensors", "3_LayerNorm/model.safetensors"):
        assert (tmp_path / "half" / name).read_bytes() == (tmp_path / "out" / name).read_bytes(), name


def write_contexts(path: Path, examples: Sequence[Example], documents: Sequence[Document], scored: bool) -> Path:
    """Two contexts each, the first by far the better one."""
    rows = [
        replace(e, ctxs=tuple(documents[n : n + 2]), ctx_scores=(3.0, 1.0) if scored else None)
        for n, e in enumerate(examples)
    ]
    write_examples(path, rows)
    return path


def test_given_scores_need_no_reader_and_rank_the_contexts(
    dca: dict[str, object],
    run_executable: Run,
    examples: list[Example],
    documents: list[Document],
    tmp_path: Path,
    reads: list[int],
) -> None:
    path = write_contexts(tmp_path / "scored.jsonl", examples[:8], documents, scored=True)
    flags = {**without(dca, "reader_model_path"), "with_score": "true", "train_file": path, "max_steps": 40,
             "learning_rate": 3e-3, "retrieve_temperature": 0.1}  # fmt: skip
    assert run_executable("train_dca", flags) == 0
    assert reads == []
    assert history(tmp_path / "out", "agreement")[-1] > 0.9


@pytest.mark.parametrize("retriever", ["dense", "bm25", "hybrid"])
def test_contexts_come_from_the_file_and_where_it_has_none_from_a_retriever(
    retriever: str,
    dca: dict[str, object],
    run_executable: Run,
    examples: list[Example],
    documents: list[Document],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shown: dict[str, list[str]] = {}
    original = CrossAttentionScorer.__call__

    def spy(self: CrossAttentionScorer, pairs: list) -> object:
        shown.update({pair.example.question: [d.page_content for d in pair.beside] for pair in pairs})
        return original(self, pairs)

    monkeypatch.setattr(CrossAttentionScorer, "__call__", spy)
    given = write_contexts(tmp_path / "given.jsonl", examples[:2], documents, scored=False)
    bare = tmp_path / "bare.jsonl"
    write_examples(bare, examples[2:4])
    given.write_text(given.read_text() + bare.read_text())
    flags = {**dca, "train_file": given, "context_retriever": retriever, "n_context": 3, "max_steps": 1}
    assert run_executable("train_dca", without(flags, "eval_file", "test_file")) == 0
    for number in (0, 1):
        assert shown[examples[number].question] == [d.page_content for d in documents[number : number + 2]]
    for number in (2, 3):
        assert len(shown[examples[number].question]) == 3
        if retriever == "bm25":
            assert examples[number].gold_docs[0].page_content in shown[examples[number].question]


def test_train_emdr_asks_for_what_rpg_asked_already(
    dca: dict[str, object], run_executable: Run, lm_path: str, tmp_path: Path
) -> None:
    shared = {**without(dca, "reader_model_path", "n_context", "max_encoder_seq_length"), "lm_model_path": lm_path,
              "num_docs": 24, "text_maxlength": 256, "refresh_step": 2}  # fmt: skip
    assert run_executable("train_rpg", {**shared, "output_dir": tmp_path / "rpg"}) == 0
    assert run_executable("train_emdr", {**shared, "max_steps": 20, "learning_rate": 1e-3}) == 0
    assert history(tmp_path / "out", "teacher_hit_rate")[0] == 1
    loss = history(tmp_path / "out", "loss")
    assert np.isfinite(loss).all()
    assert np.mean(loss[-4:]) < np.mean(loss[:4])
    assert "test_retr/recall@4" in json.loads((tmp_path / "out/score.json").read_text())


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("train_dca", {"with_score": "true"}, "--reader_model_path: give it, or --with_score true"),
        ("train_dca", {"reader_temperature": 0}, "--reader_temperature 0.0: must be above 0"),
        ("train_dca", {"n_context": 1}, "--n_context 1: must be at least 2"),
        ("train_dca", {"reader_batch_size": 0}, "--reader_batch_size 0: must be at least 1"),
        ("train_dca", {"max_encoder_seq_length": 1}, "--max_encoder_seq_length 1: must be at least 2"),
        ("train_dca", {"reader_model_path": "/nowhere"}, "model /nowhere: cannot be loaded: no such directory"),
        ("train_dca", {"dataloader_num_workers": 2}, "--dataloader_num_workers: the reader is asked"),
        ("train_emdr", {"retrieve_temperature": -1}, "--retrieve_temperature -1.0: must be above 0"),
        ("train_emdr", {"dataloader_num_workers": 2}, "--dataloader_num_workers: EMDR2 retrieves"),
    ],
)
def test_bad_flags_are_one_line_and_status_2(
    name: str,
    change: dict[str, object],
    message: str,
    dca: dict[str, object],
    run_executable: Run,
    lm_path: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = dca if name == "train_dca" else without(dca, "reader_model_path", "n_context", "max_encoder_seq_length")
    flags = flags if name == "train_dca" else {**flags, "lm_model_path": lm_path}
    assert run_executable(name, {**flags, **change}) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]


def test_scores_missing_beside_the_contexts_are_named_by_line(
    dca: dict[str, object],
    run_executable: Run,
    examples: list[Example],
    documents: list[Document],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = write_contexts(tmp_path / "given.jsonl", examples[:2], documents, scored=False)
    flags = {**without(dca, "reader_model_path"), "with_score": "true", "train_file": path}
    assert run_executable("train_dca", flags) == 2
    assert "given.jsonl:1: field 'ctxs' must hold documents with a 'score'" in capsys.readouterr().err
