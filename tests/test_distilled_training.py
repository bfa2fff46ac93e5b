"""train_dca, train_emdr and train_fid as a user runs them; a reader of train_fid teaches the retriever."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from trainers import UNTESTED, Train, calls, history, scores, written
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from rqa.data import Document, Example, write_examples
from rqa.models.encoder import load_encoder
from rqa.models.encoder_decoder import NEW_LAYERS
from rqa.objectives.dca import CrossAttentionScorer, DCAArguments, find_contexts

PROJECTION = "2_Dense/model.safetensors"


def test_the_projection_trains_is_saved_and_resumed(train: Train, documents: list[Document], tmp_path: Path) -> None:
    flags = {"projection": "true", "indexing_dimension": 12, "reader_temperature": 0.01, "max_steps": 30,
             "learning_rate": 3e-3, "save_steps": 1, "save_total_limit": 40, "attention_score": "value_norm",
             "reader_batch_size": 3, "boost_gold": "true", "matryoshka_dims": [12, 6],
             "metric_for_best_model": "eval_retr/document_recall/recall4"}  # fmt: skip
    output = train("train_dca", **flags)
    best = written(output, "trainer_state.json")["best_metric"]
    assert best == max(history(output, "eval_retr/recall@4"))  # its name in LocalRQA means the same
    loss = history(output, "loss")
    assert np.mean(loss[-5:]) < np.mean(loss[:5])
    first, last = (load_file(output / f"checkpoint-{step}" / PROJECTION)["linear.weight"] for step in (1, 30))
    assert first.shape == (12, 32)
    assert (first - last).abs().max() > 1e-3
    half = tmp_path / "half"
    shutil.copytree(output / "checkpoint-27", half / "checkpoint-27")
    train("train_dca", **flags, **UNTESTED, output_dir=half, resume_from_checkpoint="true")
    for name in ("model.safetensors", PROJECTION, "3_LayerNorm/model.safetensors"):
        assert (half / "checkpoint-30" / name).read_bytes() == (output / "checkpoint-30" / name).read_bytes(), name

    texts, ours = [document.fmt_content for document in documents], load_encoder(str(output))
    found = ours.embed(ours.tokenize_passages(texts))
    theirs = SentenceTransformer(str(output), device="cpu").encode(texts, show_progress_bar=False)
    np.testing.assert_allclose(found, theirs, atol=1e-5)
    assert "test_retr/recall@4" in scores(output)


def test_a_second_run_asks_the_reader_for_nothing_and_another_reader_for_all(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = calls(monkeypatch, CrossAttentionScorer, "__call__")
    output = train("train_dca", **UNTESTED)
    assert sum(len(pairs) for (pairs,) in reads) == 16 * 4  # each question's list once
    train("train_dca", **UNTESTED, output_dir=tmp_path / "again", max_steps=8, dataloader_num_workers=2)
    assert "--dataloader_num_workers has no effect here: a thread prepares" in capsys.readouterr().err
    assert sum(len(pairs) for (pairs,) in reads) == 16 * 4
    fid = train("train_fid", **UNTESTED, output_dir=tmp_path / "fid", max_steps=1)
    third = train("train_dca", **UNTESTED, output_dir=tmp_path / "third", reader_model_path=fid)
    assert sum(len(pairs) for (pairs,) in reads) == 2 * 16 * 4
    assert history(third, "loss") != history(output, "loss")


@pytest.fixture
def given(examples: list[Example], documents: list[Document]) -> list[Example]:
    """Two contexts each, the first by far the better one."""
    found = [replace(e, ctxs=tuple(documents[n : n + 2])) for n, e in enumerate(examples[:8])]
    return [replace(example, ctx_scores=(3.0, 1.0)) for example in found]


def test_given_scores_need_no_reader_and_rank_the_contexts(train: Train, given: list[Example], tmp_path: Path) -> None:
    write_examples(tmp_path / "scored.jsonl", given)
    output = train("train_dca", reader_model_path=None, with_score="true", train_file=tmp_path / "scored.jsonl",
                   max_steps=40, learning_rate=3e-3)  # fmt: skip
    assert history(output, "agreement")[-1] > 0.9


@pytest.mark.parametrize("retriever", ["dense", "bm25", "hybrid"])
def test_contexts_come_from_the_file_and_where_it_has_none_from_a_retriever(
    retriever: str, encoder_path: str, examples: list[Example], given: list[Example], documents: list[Document]
) -> None:
    flags = DCAArguments(reader_model_path="r", retriever=retriever, n_context=3)
    known, rows = find_contexts(flags, encoder_path, [*given[:2], *examples[2:4]], documents)
    contexts = [[known[number] for number in row] for row in rows]
    assert contexts[:2] == [documents[0:2], documents[1:3]]
    assert [len(set(row)) for row in rows[2:]] == [3, 3]
    if retriever == "bm25":
        assert all(example.gold_docs[0] in row for example, row in zip(examples[2:4], contexts[2:], strict=True))


def test_emdr_asks_for_what_rpg_asked_already(train: Train, tmp_path: Path) -> None:
    train("train_rpg", num_docs=24, **UNTESTED, output_dir=tmp_path / "rpg")
    output = train("train_emdr", num_docs=24, max_steps=20, learning_rate=1e-3, matryoshka_dims=[32, 8])
    assert history(output, "teacher_hit_rate")[0] == 1
    loss = history(output, "loss")
    assert np.mean(loss[-4:]) < np.mean(loss[:4])
    assert "test_retr/recall@4" in scores(output)


LENGTHS = {"max_encoder_seq_length": 64, "max_decoder_seq_length": 16, "num_beams": 2}


def test_training_lowers_the_loss_and_writes_a_plain_checkpoint(
    train: Train, evaluate: Callable[..., dict[str, float]], encoder_path: str, tmp_path: Path
) -> None:
    output = train("train_fid", **LENGTHS, max_steps=24, learning_rate=3e-3, eval_steps=12,
                   gradient_checkpointing="true", gradient_accumulation_steps=2)  # fmt: skip
    losses, found = history(output, "loss"), scores(output)
    assert min(history(output, "eval_loss")) < 0.7 * losses[0]
    assert {"test_loss", "test_retr/recall@4", "test_gen/rougeL"} <= set(found)
    arguments = written(output, "all_args.json")
    assert (arguments["new_layers"], arguments["new_layers_learning_rate"]) == (NEW_LAYERS, pytest.approx(0.021))
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(output), AutoTokenizer.from_pretrained(output)
    assert model.generation_config.decoder_start_token_id == tokenizer.cls_token_id
    assert model.generation_config.eos_token_id == tokenizer.sep_token_id
    assert model.generate(**tokenizer("What?", return_tensors="pt"), max_new_tokens=4).shape[1] > 1
    again = train("train_fid", **LENGTHS, model_name_or_path=output, output_dir=tmp_path / "again", max_steps=1,
                  learning_rate=0, eval_strategy="no")  # fmt: skip
    assert scores(again)["test_loss"] == pytest.approx(found["test_loss"], rel=1e-5)
    evaluated = evaluate(output, embedding_model=encoder_path, **LENGTHS)
    for name in ("test_gen/rougeL", "test_gen/f1", "test_retr/recall@4"):
        assert scores(again)[name] == evaluated[name] == found[name]
