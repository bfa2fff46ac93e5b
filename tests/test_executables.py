"""The executables as a user runs them."""

import json
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from rqa.data import Document, Example, read_documents
from rqa.models.encoder import load_encoder
from rqa.prompts import Prompter, TokenSequence
from rqa.retrieval.index import IndexArguments
from rqa.retrieval.retriever import Retriever

BIN = Path(__file__).parents[1] / "bin"
SMALL = {
    "max_steps": 4,
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 2,
    "logging_steps": 1,
    "max_new_tokens": 8,
    "max_seq_length": 256,
}


Run = Callable[[str, dict[str, object]], int]


@pytest.fixture
def swr(files: dict[str, Path], lm_path: str, encoder_path: str, tmp_path: Path) -> dict[str, object]:
    """A complete set of flags for train_swr."""
    return {
        "model_name_or_path": lm_path,
        "embedding_model": encoder_path,
        **files,
        "full_dataset_index_path": tmp_path / "index",
        "output_dir": tmp_path / "out",
        **SMALL,
    }


def test_train_swr_writes_all_that_the_architecture_promises(swr: dict[str, object], run_executable: Run) -> None:
    flags = {**swr, "eval_steps": 2, "save_steps": 2, "write_predictions": "true", "embedding_max_num_to_retrieve": 2,
             "gold_position": "random", "drop_gold_prob": 0.3, "gradient_accumulation_steps": 2,
             "gradient_checkpointing": "true"}  # fmt: skip
    assert run_executable("train_swr", flags) == 0
    output = Path(str(swr["output_dir"]))
    for name in ("all_args.json", "train.log", "trainer_state.json", "checkpoint-2", "checkpoint-4", "score.json",
                 "score_details.json", "report.html",
                 "test-predictions.jsonl", "step-2-eval-predictions.jsonl", "model.safetensors"):  # fmt: skip
        assert (output / name).exists(), name
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    evaluations = [entry for entry in history if "eval_loss" in entry]
    assert [entry["step"] for entry in evaluations] == [2, 4]
    scores = json.loads((output / "score.json").read_text())
    assert {"test_loss", "test_retr/recall@4", "test_retr/document_recall/recall4", "test_gen/rougeL", "test_gen/bleu",
            "test_gen/f1", "test_gen/exact_match"} <= set(scores)  # fmt: skip
    rows = [json.loads(line) for line in (output / "test-predictions.jsonl").open()]
    assert len(rows) == 4
    assert all(len(row["retrieved_docs"]) == 2 for row in rows)
    AutoModelForCausalLM.from_pretrained(output)
    AutoTokenizer.from_pretrained(output)


@pytest.mark.parametrize(
    "which",
    [{"embedding_model": "bm25"}, {"retriever": "hybrid", "fusion": "weighted"}],
    ids=["bm25", "hybrid"],
)
def test_swr_trains_with_any_retriever(which: dict[str, str], swr: dict[str, object], run_executable: Run) -> None:
    assert run_executable("train_swr", {**swr, "max_steps": 1, "eval_strategy": "no", **which}) == 0
    output = Path(str(swr["output_dir"]))
    assert json.loads((output / "score.json").read_text())["test_retr/recall@10"] >= 0.5  # random weights alone: less
    chosen = "the best of 4 questions" in (output / "train.log").read_text()  # those of --eval_file
    assert chosen is ("fusion" in which)


def test_a_run_without_a_test_file_leaves_a_report(swr: dict[str, object], run_executable: Run) -> None:
    flags = {**swr, "max_steps": 1, "eval_strategy": "no"}
    del flags["test_file"]
    assert run_executable("train_swr", flags) == 0
    assert "Training" in (Path(str(swr["output_dir"])) / "report.html").read_text()


def test_swr_retrieves_from_the_whole_database_and_evaluates_without_gold(
    swr: dict[str, object], run_executable: Run, monkeypatch: pytest.MonkeyPatch, data: Path
) -> None:
    shown: list[tuple[bool, Example, list[tuple[str, str]]]] = []
    original = Prompter.encode

    def spy(self: Prompter, example: Example, passages: list[Document], answer: str | None = None) -> TokenSequence:
        shown.append((answer is None, example, [document.key for document in passages]))
        return original(self, example, passages, answer)

    monkeypatch.setattr(Prompter, "encode", spy)
    flags = {**swr, "embedding_max_num_to_retrieve": 3, "max_steps": 1, "eval_strategy": "no"}
    assert run_executable("train_swr", flags) == 0
    training = [(example, keys) for generates, example, keys in shown[:16]]
    gold_of_split = {document.key for example, _ in training for document in example.gold_docs}
    assert {key for _, keys in training for key in keys} - gold_of_split
    assert all(keys[0] == example.gold_docs[0].key and len(keys) <= 4 for example, keys in training)
    _, *tested = [(example, keys) for generates, example, keys in shown if generates]  # the first one warms up
    rows = [json.loads(line) for line in (Path(str(swr["output_dir"])) / "test-predictions.jsonl").open()]
    found = [[row["page_content"] for row in line["retrieved_docs"]] for line in rows]
    assert [[content for _, content in keys] for _, keys in tested] == found
    documents = read_documents(str(swr["full_dataset_file_path"]))
    retriever = Retriever(load_encoder(str(swr["embedding_model"])), documents, IndexArguments())
    retriever.open(None)
    hits = retriever.retrieve([example.question for example, _ in tested], 3)
    assert [keys for _, keys in tested] == [[hit.key for hit in row] for row in retriever.documents_of(hits)]


def test_training_lowers_the_loss_and_the_saved_model_is_the_trained_one(
    swr: dict[str, object], run_executable: Run
) -> None:
    flags = {
        **swr,
        "max_steps": 30,
        "learning_rate": 1e-2,
        "eval_on_start": "true",
        "eval_steps": 30,
        "save_strategy": "no",
    }
    assert run_executable("train_swr", flags) == 0
    output = Path(str(swr["output_dir"]))
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    before, after = (entry["eval_loss"] for entry in history if "eval_loss" in entry)
    assert after < 0.7 * before
    evaluated = {"qa_model_name_or_path": output, "embedding_model_name_or_path": swr["embedding_model"],
                 "document_path": swr["full_dataset_file_path"], "eval_data_path": swr["test_file"],
                 "output_dir": output / "again", "max_new_tokens": 8, "max_seq_length": 256}  # fmt: skip
    assert run_executable("evaluate_rqa", evaluated) == 0
    first, second = (json.loads((path / "score.json").read_text()) for path in (output, output / "again"))
    for name in ("test_gen/rougeL", "test_gen/f1", "test_retr/recall@1"):
        assert first[name] == second[name]


def test_a_run_that_replaces_another_leaves_none_of_its_scores(
    swr: dict[str, object], run_executable: Run, tmp_path: Path
) -> None:
    flags = {**swr, "max_steps": 1, "eval_strategy": "no", "output_dir": tmp_path / "twice"}
    assert run_executable("train_swr", flags) == 0
    assert (tmp_path / "twice/score.json").exists()
    del flags["test_file"]
    assert run_executable("train_swr", {**flags, "overwrite_output_dir": "true"}) == 0
    assert not (tmp_path / "twice/score.json").exists()
    assert not (tmp_path / "twice/test-predictions.jsonl").exists()
    assert len((tmp_path / "twice/log.jsonl").read_text().splitlines()) == 1


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_a_compiled_model_trains_alike(swr: dict[str, object], run_executable: Run, tmp_path: Path) -> None:
    losses = []
    for compiled in ("false", "true"):
        flags = {
            **swr,
            "max_steps": 2,
            "eval_strategy": "no",
            "torch_compile": compiled,
            "output_dir": tmp_path / compiled,
        }
        del flags["test_file"]
        assert run_executable("train_swr", flags) == 0
        history = json.loads((tmp_path / compiled / "trainer_state.json").read_text())["log_history"]
        losses.append([entry["loss"] for entry in history])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_train_sft_with_and_without_a_retriever_for_evaluation(
    swr: dict[str, object], run_executable: Run, tmp_path: Path
) -> None:
    flags = {name: value for name, value in swr.items() if name != "embedding_model"}
    assert run_executable("train_sft", {**flags, "chat_format": "template"}) == 0
    scores = json.loads((tmp_path / "out/score.json").read_text())
    assert list(scores) == ["test_loss"]
    flags |= {"output_dir": tmp_path / "with", "eval_embedding_model": swr["embedding_model"]}
    assert run_executable("train_sft", flags) == 0
    assert "test_gen/rougeL" in json.loads((tmp_path / "with/score.json").read_text())


def test_a_single_json_file_replaces_the_flags(
    swr: dict[str, object], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    flags = {name: value if isinstance(value, int) else str(value) for name, value in swr.items()}
    (tmp_path / "flags.json").write_text(json.dumps(flags | {"bf16": False, "recall_at": [1, 2]}))
    monkeypatch.setattr(sys, "argv", ["train_swr", str(tmp_path / "flags.json")])
    runpy.run_path(str(BIN / "train_swr"), run_name="__main__")
    assert "test_retr/recall@2" in json.loads((tmp_path / "out/score.json").read_text())


def test_resuming_an_interrupted_executable_gives_the_very_same_model(
    swr: dict[str, object], run_executable: Run, tmp_path: Path
) -> None:
    flags = {**swr, "save_steps": 2, "eval_strategy": "no"}
    del flags["eval_file"], flags["test_file"]
    assert run_executable("train_swr", flags) == 0
    whole = (tmp_path / "out/model.safetensors").read_bytes()
    half = {**flags, "output_dir": tmp_path / "half"}
    assert run_executable("train_swr", half) == 0
    for path in ("checkpoint-4/COMPLETE", "model.safetensors"):
        (tmp_path / "half" / path).unlink()
    assert run_executable("train_swr", {**half, "resume_from_checkpoint": "true"}) == 0
    assert (tmp_path / "half/model.safetensors").read_bytes() == whole


def _set(name: str, value: object) -> Callable[[dict[str, object], Path], None]:
    return lambda flags, path: flags.update({name: value})


def _file(name: str, text: str) -> Callable[[dict[str, object], Path], None]:
    def change(flags: dict[str, object], path: Path) -> None:
        bad = path / "bad.jsonl"
        bad.write_text(text, encoding="utf-8")
        flags[name] = bad

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set("learning_rat", 1), "--learning_rat: unknown flag; did you mean --learning_rate?"),
        (_set("deepspeed", "ds.json"), "--deepspeed: rqa shards with PyTorch's own FSDP2; use --fsdp full_shard"),
        (_set("learning_rate", "fast"), "--learning_rate"),
        (_set("eval_strategy", "often"), "--eval_strategy"),
        (_set("max_seq_length", 8), "--max_seq_length"),
        (_set("per_device_train_batch_size", 0), "--per_device_train_batch_size 0: must be at least 1"),
        (_set("train_file", "/nowhere/train.jsonl"), "/nowhere/train.jsonl: no such file"),
        (_set("full_dataset_file_path", "/nowhere/documents.pkl"), "/nowhere/documents.pkl: no such file"),
        (_set("model_name_or_path", "/nowhere/model"), "model /nowhere/model: cannot be loaded: no such directory"),
        (_set("embedding_model", "/nowhere/model"), "model /nowhere/model: cannot be loaded: no such directory"),
        (_set("resume_from_checkpoint", "/nowhere/checkpoint-1"), "--resume_from_checkpoint /nowhere/checkpoint-1"),
        (
            lambda flags, path: flags.update({"use_flash_attention": "true", "bf16": "true"}),
            "--use_flash_attention true: flash-attn is not installed",
        ),
        (_set("use_flash_attention", "true"), "add --bf16 true"),
        (_set("index_factory", "Flatt"), "--index_factory Flatt"),
        (_set("prompt_template", "/nowhere/template.txt"), "--prompt_template /nowhere/template.txt"),
        (_set("report_to", "trackio"), "--report_to trackio: the package is not installed"),
        (_set("metric_for_best_model", "blue"), "--metric_for_best_model blue: not measured; choose one of"),
        (_file("train_file", '{"question": "a", "gold_answer": 3}'), "jsonl:1: field 'gold_answer' must be"),
        (_file("train_file", '{"question": "a", "gold_docs": [{}], "gold_answer": "b"}'), "1: field 'gold_docs'"),
        (_file("full_dataset_file_path", '{"page_content": "a"}\n{"page_content": 1}'), "2: field 'page_content'"),
        (_file("full_dataset_file_path", "{"), "bad.jsonl:1: not valid JSON"),
        (_file("eval_file", ""), "bad.jsonl: holds no examples"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_status_2(
    change: Callable[[dict[str, object], Path], None],
    message: str,
    swr: dict[str, object],
    run_executable: Run,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    change(swr, tmp_path)
    assert run_executable("train_swr", swr) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_an_error_shows_no_traceback_and_leaves_no_output_directory(swr: dict[str, object], tmp_path: Path) -> None:
    swr["full_dataset_file_path"] = "/nowhere/documents.jsonl"
    line = [str(part) for flag, value in swr.items() for part in (f"--{flag}", value)]
    done = subprocess.run([sys.executable, str(BIN / "train_swr"), *line], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.strip() == "error: /nowhere/documents.jsonl: no such file"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", sorted(path.name for path in BIN.iterdir()))
def test_every_executable_explains_itself(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [name, "-h"])
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(BIN / name), run_name="__main__")
    assert not end.value.code
    told = capsys.readouterr().out
    assert told.index(f"bin/{name}") < told.index("\n  --")  # examples first
    assert max(map(len, told.splitlines())) <= 80
    flags = re.findall(r"^  (--\w+)(.*)", told, re.MULTILINE)
    assert len(set(flags)) == len(flags)
    assert all(re.fullmatch(r" \S+( \.\.\.)?( {2,}.+)?", rest) for _, rest in flags), "one name, and what it takes"
    assert "None" not in told
