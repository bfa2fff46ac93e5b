"""train_ctl and train_rpg as a user runs them."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fakes import texts_in
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from trainers import UNTESTED, Flags, Train, calls, history, scores, written

from rqa.data import Document, Example, write_examples
from rqa.models.encoder import load_encoder
from rqa.models.loading import load_causal_lm, load_tokenizer
from rqa.objectives.rpg import ListObjective
from rqa.objectives.teacher import AnswerScorer, Pair
from rqa.prompts import PromptArguments, Prompter
from rqa.recipe.retriever import TeacherArguments, open_teacher
from rqa.runtime.cli import as_words


def weights(output: Path) -> bytes:
    return (output / "model.safetensors").read_bytes()


def test_train_ctl_raises_recall_and_saves_what_sentence_transformers_loads(
    train: Train, documents: list[Document], examples: list[Example]
) -> None:
    output = train("train_ctl", query_prefix="query: ", passage_prefix="passage: ", learning_rate=3e-3, max_steps=40,
                   per_device_train_batch_size=8, num_hard_negatives=0, eval_steps=20, save_strategy="no",
                   load_best_model_at_end="true")  # fmt: skip
    mrr, recall = history(output, "eval_retr/mrr@10"), history(output, "eval_retr/recall@4")
    assert len(mrr) == 3  # before the first step, in the middle and at the end
    assert mrr[-1] > 2 * mrr[0]
    assert recall[-1] == 1
    assert recall == history(output, "eval_retr/document_recall/recall4")
    losses = history(output, "loss")
    assert np.mean(losses[-5:]) < 0.3 * np.mean(losses[:5])
    assert scores(output)["test_retr/recall@4"] == 1
    assert written(output, "trainer_state.json")["best_metric"] == max(mrr)
    assert written(output, "all_args.json")["metric_for_best_model"] == "retr/mrr@10"
    assert (output / "report.html").exists()

    theirs, ours = SentenceTransformer(str(output), device="cpu"), load_encoder(str(output))
    texts, questions = [d.fmt_content for d in documents], [example.question for example in examples]
    passages, queries = ours.embed(ours.tokenize_passages(texts)), ours.embed(ours.tokenize_queries(questions))
    np.testing.assert_allclose(theirs.encode(texts, prompt_name="document"), passages, atol=1e-5)
    np.testing.assert_allclose(theirs.encode(questions, prompt_name="query"), queries, atol=1e-5)
    # The test score is that of the saved model: recomputed here by plain matrix products.
    ranking = (-(queries[20:] @ passages.T)).argsort(1)
    assert scores(output)["test_retr/recall@1"] == np.mean(ranking[:, 0] == np.arange(20, 24))


def test_train_rpg_raises_agreement_and_asks_its_teacher_once_in_two_runs(train: Train, tmp_path: Path) -> None:
    """With or without an index on disk, which is refreshed on schedule."""
    flags = {"max_steps": 24, "learning_rate": 3e-3, "eval_steps": 24, "num_docs": 24, "lm_temperature": 0.02,
             "weight_decay": 0.01, "save_strategy": "no", "refresh_step": 6}  # fmt: skip
    output = train("train_rpg", **flags)
    losses, rates = history(output, "loss"), history(output, "teacher_hit_rate")
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])
    assert rates[0] == 0
    assert rates == sorted(rates)
    assert rates[-1] == pytest.approx(1 - 16 / (4 * 24))  # 16 questions, each with all documents, were new once
    assert history(output, "index_staleness") == [*range(6)] * 4
    entries = written(output, "trainer_state.json")["log_history"]
    refreshed = [entry["step"] for entry in entries if "index_refreshed" in entry]
    assert refreshed == [6, 12, 18]  # until then the index of the first evaluation serves
    made = []
    for name, steps in (("second", 24), ("third", 1)):
        again = train("train_rpg", **flags | {"max_steps": steps}, output_dir=tmp_path / name,
                      full_dataset_index_path=tmp_path / "index")  # fmt: skip
        assert set(history(again, "teacher_hit_rate")) == {1}
        made.append({path.name: path.stat().st_mtime_ns for path in (tmp_path / "index").iterdir()})
    assert made[0] == made[1] != {}  # the first index is built once
    assert weights(tmp_path / "second") == weights(output)
    assert history(tmp_path / "second", "loss") == losses


def test_what_decides_a_score_makes_another_teacher_and_what_does_not_asks_the_same_one(
    lm_path: str, examples: list[Example]
) -> None:
    rates = []
    for own in ({}, {"lm_tokens_per_batch": 64}, {"text_maxlength": 255}, {"lm_chat_format": "prefix"}):
        teacher = open_teacher(TeacherArguments(lm_model_path=lm_path, **own))
        teacher([Pair(examples[0], examples[1].gold_docs[0])])
        rates.append(teacher.hit_rate)
    assert rates == [0, 1, 0, 0]


def test_each_column_of_an_rpg_batch_is_one_document_with_its_own_score(
    train: Train, documents: list[Document], examples: list[Example], lm_path: str, encoder_path: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Against the same question and document scored alone, and the first encoder's own ranking."""
    batches = calls(monkeypatch, ListObjective, "forward")
    train("train_rpg", max_steps=1, num_docs=5, lm_temperature=0.5, **UNTESTED)
    encoder = load_encoder(encoder_path)
    chat = PromptArguments(max_seq_length=256, max_new_tokens=1, chat_format="template")  # the tokenizer has one
    scorer = AnswerScorer(load_causal_lm(lm_path), Prompter(load_tokenizer(lm_path), chat), 256)
    texts = encoder.tokenize_passages([document.fmt_content for document in documents])
    ((batch,),) = batches
    passages, queries = texts_in(batch.passages), texts_in(batch.queries)
    assert len(passages) == len(set(map(tuple, passages)))
    for row, index in enumerate(batch.indices):
        example = examples[index]
        (query,) = encoder.tokenize_queries([example.question])
        assert queries[row] == query
        shown = [documents[texts.index(passages[column])] for column in batch.columns[row]]
        expected = [score for document in shown for _, score in scorer([Pair(example, document)])]
        assert (batch.teacher[row] * 0.5).tolist() == pytest.approx(expected, abs=1e-5)
        ranking = [documents[i] for i in (-(encoder.embed([query]) @ encoder.embed(texts).T)[0]).argsort()[:5]]
        gold = example.gold_docs[0]
        assert shown == (ranking if gold in ranking else [*ranking[:4], gold])


@pytest.fixture
def hard(examples: list[Example], documents: list[Document], tmp_path: Path) -> dict[str, object]:
    """A training file that has two hard negatives a question, one of them not in the database."""
    stranger = Document("A market of nowhere.", {"source": "elsewhere"})
    rows = [replace(e, hard_neg_docs=(documents[(i + 3) % 24], stranger)) for i, e in enumerate(examples[:16])]
    write_examples(tmp_path / "hard.jsonl", rows)
    return {"train_file": tmp_path / "hard.jsonl", "max_steps": 2}


MINING = {"mine_negatives": "true", "num_hard_negatives": 2, "refresh_step": 1}


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("train_rpg", {"chunk_size": 3, "kl_direction": "retriever_to_lm", "num_docs": 40, "bf16": "true",
                       "refresh_step": "0-2:1,2-9:2"}),  # more documents than there are
        ("train_rpg", {"include_gold": "false", "num_docs": 2, "retrieve_temperature": 0.5, "lm_temperature": 1.0,
                       "gradient_accumulation_steps": 2, "refresh_async": "true", "refresh_step": 1}),
        ("train_rpg", {"train_query_encoder_only": "true", "lm_chat_format": "prefix", "matryoshka_dims": [32, 9]}),
        ("train_ctl", {"hard_neg_ratio": 100, "mine_negatives": "false", "grad_cache_chunk_size": 2,
                       "gradient_accumulation_steps": 2, "gradient_checkpointing": "true", "bf16": "true",
                       "max_batch_tokens": 200, "matryoshka_dims": [8, 32, 16]}),
        ("train_ctl", {"num_hard_negatives": 9, "train_query_encoder_only": "true"}),
        ("train_ctl", {**MINING, "negatives_from_rank": 2, "negatives_max_share": 0.95, "refresh_async": "true"}),
    ],
    ids=lambda own: own if isinstance(own, str) else "-".join(own),
)  # fmt: skip
def test_options_train_together(
    name: str, own: dict[str, object], train: Train, hard: dict[str, object], encoder_path: str
) -> None:
    output = train(name, **hard | own, test_file=None, load_best_model_at_end="false")
    before, after = (load_file(Path(path) / "model.safetensors") for path in (encoder_path, output))
    assert np.isfinite(history(output, "loss")).all()
    assert any((after[name] != weight).any() for name, weight in before.items())


@pytest.mark.parametrize(
    ("name", "own"),
    [("train_rpg", {}), ("train_ctl", {**MINING, "train_query_encoder_only": "true"})],
    ids=["rpg", "ctl, mined negatives, frozen passages"],
)
def test_a_run_resumed_between_two_refreshes_and_not_evaluated_ends_with_the_very_same_weights(
    name: str, own: dict[str, object], train: Train, tmp_path: Path
) -> None:
    """With dropout, and with an index of other weights than the checkpoint's, which the checkpoint refers to."""
    flags = own | {"max_steps": 7, "save_steps": 3, "save_total_limit": 9, "refresh_step": 4, "learning_rate": 1e-2}
    output = train(name, **flags, eval_steps=1)
    for step in (3, 6):  # before and after the refresh
        half = tmp_path / f"half-{step}"
        index = written(output / f"checkpoint-{step}", "trainer_state.json")["live_state"]
        assert index == f"index-{step // 4 * 4}"
        for part in (f"checkpoint-{step}", index):
            shutil.copytree(output / part, half / part)
        train(name, **flags, **UNTESTED, output_dir=half, resume_from_checkpoint="true")
        assert weights(half / "checkpoint-7") == weights(output / "checkpoint-7")
        assert history(half, "loss") == history(output, "loss")


def test_a_trained_query_encoder_is_scored_with_the_passages_of_the_first_one(
    train: Train, documents: list[Document], examples: list[Example], encoder_path: str, tmp_path: Path,
    trainer_flags: Flags, refused: Callable[..., None],
) -> None:  # fmt: skip
    """By plain matrix products; it learns, and can be trained again from where it is."""
    flags = {**MINING, "refresh_step": 5, "train_query_encoder_only": "true", "max_steps": 40, "learning_rate": 3e-3,
             "per_device_train_batch_size": 8, "eval_steps": 40, "load_best_model_at_end": "false"}  # fmt: skip
    output = train("train_ctl", **flags)
    losses = history(output, "loss")
    assert np.mean(losses[-5:]) < np.mean(losses[:5])
    first, trained = load_encoder(encoder_path), load_encoder(str(output))
    texts = first.tokenize_passages([document.fmt_content for document in documents])
    queries = trained.embed(trained.tokenize_queries([example.question for example in examples[20:]]))
    passages = first.embed(texts)
    np.testing.assert_allclose(trained.passage_side.embed(texts), passages, atol=1e-6)
    ranking = (-(queries @ passages.T)).argsort(1)
    rank = [row.tolist().index(number) for number, row in zip(range(20, 24), ranking, strict=True)]
    assert scores(output)["test_retr/recall@1"] == np.mean(np.array(rank) == 0)
    assert scores(output)["test_retr/mrr@10"] == pytest.approx(np.mean([1 / (r + 1) if r < 10 else 0 for r in rank]))
    again = flags | {"model_name_or_path": output, "max_steps": 1}
    twice = load_encoder(str(train("train_ctl", **again, output_dir=tmp_path / "again")))
    np.testing.assert_array_equal(twice.passage_side.embed(texts), passages)
    whole = trainer_flags("train_ctl", **again | {"train_query_encoder_only": "false"}, output_dir=tmp_path / "whole")
    refused("--train_query_encoder_only true", "train_ctl", *as_words(whole))
