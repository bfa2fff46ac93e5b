"""train_ctl and train_rpg as a user runs them."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from trainers import history, without

from rqa.data import Document, Example, read_examples, write_examples
from rqa.models.causal_lm import load_causal_lm
from rqa.models.encoder import load_encoder
from rqa.models.loading import load_tokenizer
from rqa.objectives.ctl import Contrastive
from rqa.objectives.rpg import Distillation
from rqa.objectives.teacher import AnswerScorer, Pair
from rqa.prompts import PromptArguments, Prompter

BIN = Path(__file__).parents[1] / "bin"
Run = Callable[[str, dict[str, object]], int]


@pytest.fixture
def ctl(files: dict[str, Path], encoder_path: str, tmp_path: Path) -> dict[str, object]:
    """A complete set of flags for train_ctl."""
    return {
        "model_name_or_path": encoder_path,
        **files,
        "output_dir": tmp_path / "out",
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "eval_on_start": "false",
    }


@pytest.fixture
def rpg(ctl: dict[str, object], lm_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """A complete set of flags for train_rpg, with a cache of its own."""
    monkeypatch.setenv("RQA_CACHE", str(tmp_path / "cache"))
    return {**ctl, "lm_model_path": lm_path, "num_docs": 4, "text_maxlength": 256, "refresh_step": 2}


def changed(flags: dict[str, object]) -> bool:
    """Whether training gave finite losses and other weights than the model it began with."""
    before = load_file(Path(str(flags["model_name_or_path"])) / "model.safetensors")
    after = load_file(Path(str(flags["output_dir"])) / "model.safetensors")
    losses = history(flags["output_dir"], "loss")
    return bool(np.isfinite(losses).all()) and any((after[name] != weight).any() for name, weight in before.items())


def test_train_ctl_raises_recall_and_saves_what_sentence_transformers_loads(
    ctl: dict[str, object], run_executable: Run, documents: list[Document], examples: list[Example], tmp_path: Path
) -> None:
    prefixes = {"query_prefix": "query: ", "passage_prefix": "passage: "}
    rate = {"max_steps": 40, "learning_rate": 3e-3, "per_device_train_batch_size": 8}
    flags = {**ctl, **prefixes, **rate, "eval_on_start": "true", "eval_steps": 20, "save_strategy": "no"}
    assert run_executable("train_ctl", flags) == 0
    output = tmp_path / "out"
    mrr = history(output, "eval_retr/mrr@10")
    assert len(mrr) == 3  # before the first step, in the middle and at the end
    assert mrr[-1] > 2 * mrr[0]
    assert history(output, "eval_retr/recall@4")[-1] == 1
    assert history(output, "eval_retr/recall@4") == history(output, "eval_retr/document_recall/recall4")
    losses = history(output, "loss")
    assert np.mean(losses[-5:]) < 0.3 * np.mean(losses[:5])
    scores = json.loads((output / "score.json").read_text())
    assert scores["test_retr/recall@4"] == 1
    assert json.loads((output / "trainer_state.json").read_text())["best_metric"] == max(mrr)

    theirs, ours = SentenceTransformer(str(output), device="cpu"), load_encoder(str(output))
    texts, questions = [d.fmt_content for d in documents], [example.question for example in examples]
    passages, queries = ours.embed(ours.tokenize_passages(texts)), ours.embed(ours.tokenize_queries(questions))
    np.testing.assert_allclose(theirs.encode(texts, prompt_name="document"), passages, atol=1e-5)
    np.testing.assert_allclose(theirs.encode(questions, prompt_name="query"), queries, atol=1e-5)
    # The test score is that of the saved model: recomputed here by plain matrix products.
    ranking = (-(queries[20:] @ passages.T)).argsort(1)
    assert scores["test_retr/recall@1"] == np.mean(ranking[:, 0] == np.arange(20, 24))


def test_train_rpg_raises_agreement_and_asks_its_teacher_once_in_two_runs(
    rpg: dict[str, object], run_executable: Run, tmp_path: Path
) -> None:
    flags = {**rpg, "max_steps": 30, "learning_rate": 3e-3, "eval_steps": 30, "num_docs": 24, "lm_temperature": 0.02,
             "weight_decay": 0.01, "save_strategy": "no"}  # fmt: skip
    assert run_executable("train_rpg", flags) == 0
    losses, rates = history(tmp_path / "out", "loss"), history(tmp_path / "out", "teacher_hit_rate")
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])
    assert rates[0] == 0
    assert rates == sorted(rates)
    assert rates[-1] == pytest.approx(1 - 16 / (4 * 30))  # 16 questions, each with all documents, were new once
    assert (tmp_path / "cache/teacher.sqlite").is_file()
    first = (tmp_path / "out/model.safetensors").read_bytes()
    assert run_executable("train_rpg", {**flags, "output_dir": tmp_path / "again"}) == 0
    assert set(history(tmp_path / "again", "teacher_hit_rate")) == {1}
    assert (tmp_path / "again/model.safetensors").read_bytes() == first
    assert history(tmp_path / "again", "loss") == losses


def test_another_prompt_or_language_model_asks_the_teacher_anew(
    rpg: dict[str, object], run_executable: Run, tmp_path: Path
) -> None:
    flags = {**without(rpg, "eval_file", "test_file"), "max_steps": 1}
    assert run_executable("train_rpg", flags) == 0
    again = {**flags, "output_dir": tmp_path / "again", "text_maxlength": 255}
    assert run_executable("train_rpg", again) == 0
    assert history(tmp_path / "again", "teacher_hit_rate") == [0]
    third = {**again, "output_dir": tmp_path / "third", "lm_temperature": 1.0, "lm_tokens_per_batch": 64}
    assert run_executable("train_rpg", third) == 0  # neither decides a score
    assert history(tmp_path / "third", "teacher_hit_rate") == [1]


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The micro-batches that the objectives were given."""
    seen: list[Any] = []
    for kind in (Contrastive, Distillation):
        forward = kind.forward
        monkeypatch.setattr(
            kind, "forward", lambda self, batch, forward=forward: seen.append(batch) or forward(self, batch)
        )
    return seen


def test_each_column_of_an_rpg_batch_is_one_document_with_its_own_score(
    rpg: dict[str, object],
    run_executable: Run,
    batches: list[Any],
    documents: list[Document],
    examples: list[Example],
) -> None:
    """Against the same question and document scored alone, and the first encoder's own ranking."""
    flags = {**without(rpg, "eval_file", "test_file"), "max_steps": 1, "num_docs": 5, "lm_temperature": 0.5}
    assert run_executable("train_rpg", flags) == 0
    lm, encoder = str(rpg["lm_model_path"]), load_encoder(str(rpg["model_name_or_path"]))
    prompter = Prompter(load_tokenizer(lm), PromptArguments(max_seq_length=256, max_new_tokens=1))
    scorer = AnswerScorer(load_causal_lm(lm), prompter, 256)
    texts = encoder.tokenize_passages([document.fmt_content for document in documents])
    (batch,) = batches
    assert len(batch.passages) == len({tuple(ids) for ids in batch.passages})
    for row, index in enumerate(batch.indices):
        example = examples[index]
        (query,) = encoder.tokenize_queries([example.question])
        assert batch.queries[row] == query
        shown = [documents[texts.index(batch.passages[column])] for column in batch.columns[row]]
        scores = [score for document in shown for _, score in scorer([Pair(example, document)])]
        assert (batch.teacher[row] * 0.5).tolist() == pytest.approx(scores, abs=1e-5)
        ranking = [documents[i] for i in (-(encoder.embed([query]) @ encoder.embed(texts).T)[0]).argsort()[:5]]
        gold = example.gold_docs[0]
        assert shown == (ranking if gold in ranking else [*ranking[:4], gold])


@pytest.mark.parametrize("own", [{"num_hard_negatives": 1}, {"hard_neg_ratio": 0.5}, {}])
def test_a_ctl_batch_holds_each_question_s_gold_and_the_negatives_asked_for(
    own: dict[str, object], hard: dict[str, object], run_executable: Run, batches: list[Any], documents: list[Document]
) -> None:
    assert run_executable("train_ctl", {**without(hard, "eval_file"), **own}) == 0
    encoder = load_encoder(str(hard["model_name_or_path"]))
    asked = read_examples(str(hard["train_file"]))
    known = [*documents, asked[0].hard_neg_docs[1]]
    texts = encoder.tokenize_passages([document.fmt_content for document in known])
    assert len(batches) == 2
    for batch in batches:
        shown = {int(n): known[texts.index(ids)] for n, ids in zip(batch.documents, batch.passages, strict=True)}
        assert len(shown) == len(batch.passages)
        golds, allowed = [], []
        for row, index in enumerate(batch.indices):
            assert batch.queries[row] == encoder.tokenize_queries([asked[index].question])[0]
            assert shown[int(batch.targets[row])] in asked[index].gold_docs
            assert [shown[int(n)] for n in batch.gold[row] if n >= 0] == list(asked[index].gold_docs)
            golds += asked[index].gold_docs
            allowed += asked[index].hard_neg_docs
        negatives = [document for document in shown.values() if document not in golds]
        assert all(document in allowed for document in negatives)
        assert len(negatives) <= (4 if "num_hard_negatives" in own else 2 if own else 0)
        assert bool(negatives) == bool(own)


@pytest.mark.parametrize(
    "own",
    [
        {"chunk_size": 3},
        {"kl_direction": "retriever_to_lm"},
        {"include_gold": "false", "num_docs": 2},
        {"num_docs": 40, "refresh_step": "0-2:1,2-9:2"},  # more than there are documents
        {"retrieve_temperature": 0.5, "lm_temperature": 1.0, "gradient_accumulation_steps": 2},
        {"bf16": "true"},
        {"refresh_fraction": 0.3, "refresh_step": 1},
        {"refresh_async": "true", "refresh_step": 1, "bf16": "true"},
        {"train_query_encoder_only": "true"},
    ],
    ids=lambda own: "-".join(own),
)
def test_train_rpg_trains_with_each_of_its_options(
    own: dict[str, object], rpg: dict[str, object], run_executable: Run
) -> None:
    flags = {**without(rpg, "test_file"), "max_steps": 2, **own}
    assert run_executable("train_rpg", flags) == 0
    assert changed(flags)


def test_the_model_is_measured_before_it_is_trained_and_kept_if_it_was_better(
    ctl: dict[str, object], run_executable: Run, tmp_path: Path
) -> None:
    flags = {**without(ctl, "test_file", "eval_on_start"), "max_steps": 1, "learning_rate": 0}
    assert run_executable("train_ctl", flags) == 0
    state = json.loads((tmp_path / "out/trainer_state.json").read_text())
    assert [entry["step"] for entry in state["log_history"] if "eval_retr/mrr@10" in entry] == [0, 1]
    assert state["best_model_checkpoint"] == "checkpoint-0"


@pytest.fixture
def hard(
    ctl: dict[str, object], examples: list[Example], documents: list[Document], tmp_path: Path
) -> dict[str, object]:
    """Flags with a training file that has two hard negatives a question, one of them not in the database."""
    stranger = Document("A market of nowhere.", {"source": "elsewhere"})
    rows = [replace(e, hard_neg_docs=(documents[(i + 3) % 24], stranger)) for i, e in enumerate(examples[:16])]
    write_examples(tmp_path / "hard.jsonl", rows)
    return {**without(ctl, "test_file"), "train_file": tmp_path / "hard.jsonl", "max_steps": 2}


@pytest.mark.parametrize(
    "own",
    [
        {},
        {"hard_neg_ratio": 0.5},
        {"hard_neg_ratio": 100},
        {"num_hard_negatives": 1},
        {"num_hard_negatives": 9},
        {"mine_negatives": "true", "num_hard_negatives": 2, "refresh_step": 1},
        {"mine_negatives": "true", "hard_neg_ratio": 1, "negatives_from_rank": 2, "negatives_margin": 0.01},
        {"grad_cache_chunk_size": 2, "num_hard_negatives": 1, "gradient_accumulation_steps": 2},
        {"bf16": "true", "gradient_checkpointing": "true"},
        {"dataloader_num_workers": 1},
        {"mine_negatives": "true", "num_hard_negatives": 2, "refresh_step": 1, "refresh_fraction": 0.3},
        {"mine_negatives": "true", "num_hard_negatives": 2, "refresh_step": 1, "refresh_async": "true"},
        {"num_hard_negatives": 1, "train_query_encoder_only": "true", "dataloader_num_workers": 1},
    ],
    ids=lambda own: "-".join(map(str, (part for pair in own.items() for part in pair))) or "no hard negatives",
)
def test_train_ctl_trains_with_each_of_its_options(
    own: dict[str, object], hard: dict[str, object], run_executable: Run
) -> None:
    flags = {**hard, **own}
    assert run_executable("train_ctl", flags) == 0
    assert changed(flags)


def test_hard_negatives_make_the_contrast_harder(hard: dict[str, object], run_executable: Run, tmp_path: Path) -> None:
    """Before the first update the model is the same: more documents to tell the positive from, a greater loss."""
    found = []
    options = (
        {},
        {"hard_neg_ratio": 0.5},
        {"num_hard_negatives": 2},
        {"num_hard_negatives": 2, "mine_negatives": "true"},
    )
    for number, own in enumerate(options):
        flags = {**without(hard, "eval_file"), **own, "max_steps": 1, "output_dir": tmp_path / str(number), "seed": 3}
        assert run_executable("train_ctl", flags) == 0
        found.append(history(tmp_path / str(number), "loss")[0])
    none, half, two, mined = found
    assert none < half < two
    assert none < mined


@pytest.mark.parametrize("metric", ["retr/recall@4", "eval_retr/recall@4", "retr/document_recall/recall4",
                                    "eval_retr/document_recall/recall4", "retr/ndcg@10"])  # fmt: skip
def test_the_best_model_is_chosen_by_either_name_of_a_metric(
    metric: str, ctl: dict[str, object], run_executable: Run, tmp_path: Path
) -> None:
    flags = {
        **without(ctl, "test_file"),
        "metric_for_best_model": metric,
        "max_steps": 2,
        "eval_steps": 1,
        "save_steps": 1,
    }
    assert run_executable("train_ctl", flags) == 0
    state = json.loads((tmp_path / "out/trainer_state.json").read_text())
    values = history(tmp_path / "out", f"eval_{metric.removeprefix('eval_')}")
    assert state["best_metric"] == max(values)
    assert state["best_model_checkpoint"] == f"checkpoint-{values.index(max(values)) + 1}"
    best = tmp_path / "out" / state["best_model_checkpoint"] / "model.safetensors"
    assert (tmp_path / "out/model.safetensors").read_bytes() == best.read_bytes()


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("train_ctl", {"grad_cache_chunk_size": 3}),
        ("train_ctl", {"mine_negatives": "true", "num_hard_negatives": 1, "refresh_step": 2}),
        ("train_rpg", {}),
        ("train_rpg", {"train_query_encoder_only": "true"}),
        ("train_rpg", {"refresh_step": 3}),
        ("train_rpg", {"refresh_step": 1, "refresh_fraction": 0.3}),
        ("train_ctl", {"mine_negatives": "true", "num_hard_negatives": 1, "refresh_step": 3}),
    ],
)
def test_a_run_that_is_resumed_gives_the_very_same_model_as_one_that_is_not(
    name: str, own: dict[str, object], rpg: dict[str, object], run_executable: Run, tmp_path: Path
) -> None:
    """With dropout, and with an index of other weights than the checkpoint's."""
    flags = without(rpg, "eval_file", "test_file") | {"save_steps": 2, "learning_rate": 1e-3} | own
    if name == "train_ctl":
        flags = without(flags, "lm_model_path", "num_docs", "text_maxlength")
    assert run_executable(name, flags) == 0
    whole, losses = (tmp_path / "out/model.safetensors").read_bytes(), history(tmp_path / "out", "loss")
    half = {**flags, "output_dir": tmp_path / "half"}
    assert run_executable(name, half) == 0
    for path in ("checkpoint-4/COMPLETE", "model.safetensors"):
        (tmp_path / "half" / path).unlink()
    assert run_executable(name, {**half, "resume_from_checkpoint": "true"}) == 0
    assert (tmp_path / "half/model.safetensors").read_bytes() == whole
    assert history(tmp_path / "half", "loss") == losses


def test_evaluation_in_between_changes_nothing_in_training(
    rpg: dict[str, object], run_executable: Run, tmp_path: Path
) -> None:
    flags = {**without(rpg, "test_file"), "refresh_step": 3, "load_best_model_at_end": "false"}
    for number, own in enumerate(({"eval_strategy": "no"}, {"eval_steps": 1, "eval_on_start": "true"})):
        assert run_executable("train_rpg", {**flags, **own, "output_dir": tmp_path / str(number)}) == 0
    assert len({(tmp_path / str(number) / "model.safetensors").read_bytes() for number in (0, 1)}) == 1


@pytest.mark.parametrize(
    ("name", "flag", "value", "message"),
    [
        ("train_ctl", "temperature", 0, "--temperature 0.0: must be above 0"),
        ("train_ctl", "refresh_step", "x", "--refresh_step x: write a number of steps"),
        ("train_ctl", "num_hard_negatives", -1, "--num_hard_negatives -1: must be at least 0"),
        ("train_ctl", "hard_neg_ratio", -0.5, "--hard_neg_ratio -0.5: must be at least 0"),
        ("train_ctl", "negatives_from_rank", 0, "--negatives_from_rank 0: must be at least 1"),
        ("train_ctl", "mine_negatives", "true", "--mine_negatives true: say how many"),
        ("train_ctl", "refresh_async", "true", "--refresh_async: nothing is refreshed without --mine_negatives true"),
        ("train_ctl", "negatives_margin", 0.1, "--negatives_margin: nothing is mined without --mine_negatives true"),
        ("train_ctl", "refresh_fraction", 0.5, "--refresh_fraction: nothing is refreshed without"),
        ("train_ctl", "metric_for_best_model", "blue", "--metric_for_best_model blue: not measured"),
        ("train_ctl", "model_name_or_path", "/nowhere/model", "model /nowhere/model: cannot be loaded"),
        ("train_ctl", "temprature", 1, "--temprature: unknown flag; did you mean --temperature?"),
        ("train_rpg", "num_docs", 1, "--num_docs 1: must be at least 2"),
        ("train_rpg", "lm_temperature", 0, "--lm_temperature 0.0: must be above 0"),
        ("train_rpg", "retrieve_temperature", -1, "--retrieve_temperature -1.0: must be above 0"),
        ("train_rpg", "refresh_step", "x", "--refresh_step x: write a number of steps"),
        ("train_rpg", "refresh_fraction", 0, "--refresh_fraction 0.0: must be above 0"),
        ("train_rpg", "kl_direction", "both", "--kl_direction"),
        ("train_rpg", "dataloader_num_workers", 2, "--dataloader_num_workers"),
        ("train_rpg", "lm_model_path", "/nowhere/lm", "model /nowhere/lm: cannot be loaded"),
    ],
)
def test_bad_flags_are_one_line_and_status_2(
    name: str,
    flag: str,
    value: object,
    message: str,
    rpg: dict[str, object],
    run_executable: Run,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    flags = rpg if name == "train_rpg" else without(rpg, "lm_model_path", "num_docs", "text_maxlength")
    assert run_executable(name, {**flags, flag: value}) == 2
    assert_one_error(capsys, message, tmp_path)


def test_more_negatives_than_the_window_of_ranks_holds_are_refused(
    ctl: dict[str, object], run_executable: Run, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    own = {"mine_negatives": "true", "num_hard_negatives": 16, "negatives_from_rank": 6}
    assert run_executable("train_ctl", {**ctl, **own}) == 2
    assert_one_error(capsys, "--negatives_to_rank 20: leaves 15 hard negatives a question", tmp_path)


@pytest.mark.parametrize("flag", ["refresh_async", "train_query_encoder_only"])
def test_a_sharded_encoder_cannot_be_copied(
    flag: str, rpg: dict[str, object], run_executable: Run, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert run_executable("train_rpg", {**rpg, flag: "true", "fsdp": "full_shard"}) == 2
    assert_one_error(capsys, f"--{flag} true: needs the whole encoder on every process", tmp_path)


def test_mining_refuses_workers_that_would_not_see_what_is_mined(
    ctl: dict[str, object], run_executable: Run, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    own = {"mine_negatives": "true", "num_hard_negatives": 1, "dataloader_num_workers": 1}
    assert run_executable("train_ctl", {**ctl, **own}) == 2
    assert_one_error(capsys, "--dataloader_num_workers", tmp_path)


@pytest.mark.parametrize(
    ("name", "part", "message"),
    [
        ("train_ctl", {"gold_docs": ()}, "train.jsonl:2: field 'gold_docs' is empty; CTL needs a gold passage"),
        ("train_rpg", {"gold_answer": None}, "train.jsonl:2: field 'gold_answer' must be a string"),
    ],
)
def test_an_example_that_an_algorithm_cannot_use_is_named(
    name: str,
    part: dict[str, Any],
    message: str,
    rpg: dict[str, object],
    examples: list[Example],
    run_executable: Run,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    write_examples(tmp_path / "train.jsonl", [examples[0], replace(examples[1], **part), examples[2]])
    flags = rpg if name == "train_rpg" else without(rpg, "lm_model_path", "num_docs", "text_maxlength")
    assert run_executable(name, {**flags, "train_file": tmp_path / "train.jsonl"}) == 2
    assert_one_error(capsys, message, tmp_path)


def assert_one_error(capsys: pytest.CaptureFixture[str], message: str, path: Path) -> None:
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]
    assert not (path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize(("own", "expected"), [({}, [0, 1, 0, 1]), ({"refresh_fraction": 0.5}, [0, 1, 1, 2])], ids=str)
def test_the_staleness_of_the_index_is_logged(
    own: dict[str, object], expected: list[float], rpg: dict[str, object], run_executable: Run, tmp_path: Path
) -> None:
    flags = {**without(rpg, "eval_file", "test_file"), **own, "gradient_accumulation_steps": 2}
    assert run_executable("train_rpg", flags) == 0
    assert history(tmp_path / "out", "index_staleness") == expected
    state = json.loads((tmp_path / "out/trainer_state.json").read_text())
    assert [entry["step"] for entry in state["log_history"] if "index_refreshed" in entry] == [0, 2]


@pytest.mark.parametrize("trainer", ["train_ctl", "train_rpg"])
def test_the_first_index_is_built_once_where_a_path_is_given(
    trainer: str, ctl: dict[str, object], rpg: dict[str, object], run_executable: Run, tmp_path: Path
) -> None:
    mining = {"mine_negatives": "true", "num_hard_negatives": 1, "refresh_step": 2}
    flags = {"train_ctl": ctl | mining, "train_rpg": rpg}[trainer] | {"eval_on_start": "true"}
    assert run_executable(trainer, flags) == 0
    expected = (tmp_path / "out/model.safetensors").read_bytes()
    made = []
    for name in ("first", "second"):
        indexed = {**flags, "full_dataset_index_path": tmp_path / "index", "output_dir": tmp_path / name}
        assert run_executable(trainer, indexed) == 0
        assert (tmp_path / name / "model.safetensors").read_bytes() == expected
        made.append({path.name: path.stat().st_mtime_ns for path in (tmp_path / "index").iterdir()})
    assert made[0] == made[1] != {}


@pytest.mark.parametrize("eval_on_start", ["true", "false"])
def test_a_trained_query_encoder_is_scored_with_the_passages_of_the_first_one(
    eval_on_start: str, ctl: dict[str, object], run_executable: Run, documents: list[Document],
    examples: list[Example], tmp_path: Path
) -> None:  # fmt: skip
    """By plain matrix products; it learns, and can be trained again from where it is."""
    mining = {"mine_negatives": "true", "num_hard_negatives": 1, "refresh_step": 5, "eval_on_start": eval_on_start}
    flags = {**ctl, **mining, "train_query_encoder_only": "true", "max_steps": 40, "learning_rate": 3e-3,
             "per_device_train_batch_size": 8, "eval_steps": 40, "load_best_model_at_end": "false"}  # fmt: skip
    assert run_executable("train_ctl", flags) == 0
    output = str(tmp_path / "out")
    assert np.mean(history(output, "loss")[-5:]) < np.mean(history(output, "loss")[:5])
    first, trained = load_encoder(str(ctl["model_name_or_path"])), load_encoder(output)
    texts = first.tokenize_passages([document.fmt_content for document in documents])
    queries = trained.embed(trained.tokenize_queries([example.question for example in examples[20:]]))
    passages = first.embed(texts)
    np.testing.assert_allclose(trained.passage_side.embed(texts), passages, atol=1e-6)
    ranking = (-(queries @ passages.T)).argsort(1)
    rank = [row.tolist().index(number) for number, row in zip(range(20, 24), ranking, strict=True)]
    scores = json.loads((tmp_path / "out/score.json").read_text())
    assert scores["test_retr/recall@1"] == np.mean(np.array(rank) == 0)
    assert scores["test_retr/mrr@10"] == pytest.approx(np.mean([1 / (r + 1) if r < 10 else 0 for r in rank]))
    again = {**flags, "model_name_or_path": output, "output_dir": tmp_path / "again", "max_steps": 1}
    assert run_executable("train_ctl", again) == 0
    np.testing.assert_array_equal(load_encoder(str(tmp_path / "again")).passage_side.embed(texts), passages)
    assert (
        run_executable("train_ctl", {**without(again, "train_query_encoder_only"), "output_dir": tmp_path / "x"}) == 2
    )


@pytest.mark.parametrize(
    "own",
    [
        {},
        {"refresh_fraction": 0.4},
        {"mine_negatives": "true", "num_hard_negatives": 1},
    ],
    ids=["rpg", "rpg, partial refresh", "ctl, mined negatives"],
)
def test_a_run_resumed_between_two_refreshes_ends_with_the_very_same_weights(
    own: dict[str, object],
    ctl: dict[str, object],
    rpg: dict[str, object],
    run_executable: Run,
    tmp_path: Path,
) -> None:
    name, flags = ("train_ctl", ctl) if "mine_negatives" in own else ("train_rpg", rpg)
    flags = {**without(flags, "eval_file", "test_file"), **own, "max_steps": 7, "save_steps": 3, "refresh_step": 4,
             "learning_rate": 1e-2}  # fmt: skip
    assert run_executable(name, flags) == 0
    half = {**flags, "output_dir": tmp_path / "half", "resume_from_checkpoint": "true"}
    for step in (3, 6):  # before and after the refresh
        shutil.rmtree(tmp_path / "half", ignore_errors=True)
        shutil.copytree(tmp_path / f"out/checkpoint-{step}", tmp_path / f"half/checkpoint-{step}")
        assert run_executable(name, half) == 0
        whole, resumed = ((tmp_path / path / "model.safetensors").read_bytes() for path in ("out", "half"))
        assert whole == resumed
    assert not (tmp_path / "out" / "live_state").exists()


def test_a_run_resumed_with_other_documents_encodes_them_anew(
    rpg: dict[str, object], run_executable: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = {**without(rpg, "eval_file", "test_file"), "max_steps": 2, "refresh_step": 10}
    assert run_executable("train_rpg", flags) == 0
    lines = Path(str(flags["full_dataset_file_path"])).read_text().splitlines()
    (tmp_path / "other.jsonl").write_text("\n".join(lines[::-1]) + "\n")
    other = {
        **flags,
        "full_dataset_file_path": tmp_path / "other.jsonl",
        "max_steps": 3,
        "resume_from_checkpoint": "true",
    }
    assert run_executable("train_rpg", other) == 0
    assert "its index is of other documents" in capsys.readouterr().err
