"""train_fid as a user runs it."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from rqa.data import Document, Example
from rqa.prompts import FusionPrompter, FusionSequence

Run = Callable[[str, dict[str, object]], int]


@pytest.fixture
def fid(files: dict[str, Path], encoder_path: str, tmp_path: Path) -> dict[str, object]:
    """A complete set of flags for train_fid."""
    return {
        "model_name_or_path": f"bert::{encoder_path}",
        "embedding_model": encoder_path,
        **files,
        "output_dir": tmp_path / "out",
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "logging_steps": 1,
        "max_encoder_seq_length": 64,
        "max_decoder_seq_length": 16,
    }


def test_training_lowers_the_loss_and_writes_a_plain_checkpoint(
    fid: dict[str, object], run_executable: Run, tmp_path: Path
) -> None:
    flags = {**fid, "max_steps": 40, "learning_rate": 1e-2, "eval_on_start": "true", "eval_steps": 20,
             "gradient_checkpointing": "true", "gradient_accumulation_steps": 2, "num_beams": 2}  # fmt: skip
    assert run_executable("train_fid", flags) == 0
    history = json.loads((tmp_path / "out/trainer_state.json").read_text())["log_history"]
    losses = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    assert min(losses) < 0.7 * losses[0]
    scores = json.loads((tmp_path / "out/score.json").read_text())
    assert {"test_loss", "test_retr/recall@4", "test_gen/rougeL"} <= set(scores)
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert model.generation_config.decoder_start_token_id == tokenizer.cls_token_id
    assert model.generation_config.eos_token_id == tokenizer.sep_token_id
    assert model.generate(**tokenizer("What?", return_tensors="pt"), max_new_tokens=4).shape[1] > 1
    again = {**fid, "model_name_or_path": tmp_path / "out", "output_dir": tmp_path / "again", "eval_on_start": "true",
             "max_steps": 1, "learning_rate": 0, "num_beams": 2}  # fmt: skip
    assert run_executable("train_fid", again) == 0
    second = json.loads((tmp_path / "again/score.json").read_text())
    assert second["test_loss"] == pytest.approx(scores["test_loss"], rel=1e-5)
    assert second["test_gen/rougeL"] == scores["test_gen/rougeL"]
    evaluated = {
        "qa_model_name_or_path": tmp_path / "out",
        "embedding_model_name_or_path": fid["embedding_model"],
        "document_path": fid["full_dataset_file_path"],
        "eval_data_path": fid["test_file"],
        "output_dir": tmp_path / "evaluated",
        **{name: flags[name] for name in ("max_encoder_seq_length", "max_decoder_seq_length", "num_beams")},
    }
    assert run_executable("evaluate_rqa", evaluated) == 0
    third = json.loads((tmp_path / "evaluated/score.json").read_text())
    for name in ("test_gen/rougeL", "test_gen/f1", "test_retr/recall@4"):
        assert third[name] == scores[name]


def test_training_reads_gold_and_retrieved_passages_and_evaluation_only_retrieved_ones(
    fid: dict[str, object], run_executable: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[tuple[bool, Example, list[tuple[str, str]]]] = []
    original = FusionPrompter.encode

    def spy(
        self: FusionPrompter, example: Example, passages: list[Document], answer: str | None = None
    ) -> FusionSequence:
        shown.append((answer is None, example, [document.key for document in passages]))
        return original(self, example, passages, answer)

    monkeypatch.setattr(FusionPrompter, "encode", spy)
    flags = {**fid, "max_steps": 1, "eval_strategy": "no", "embedding_max_num_to_retrieve": 2}
    assert run_executable("train_fid", flags) == 0
    for _, example, keys in shown[:16]:
        assert keys[0] == example.gold_docs[0].key
        assert len(keys) in (2, 3)
        assert len(set(keys)) == len(keys)
    rows = [json.loads(line) for line in (Path(str(fid["output_dir"])) / "test-predictions.jsonl").open()]
    found = [[row["page_content"] for row in line["retrieved_docs"]] for line in rows]
    _, *tested = [[content for _, content in keys] for generates, _, keys in shown if generates]  # the first warms up
    assert tested == found


def test_resuming_an_interrupted_run_gives_the_very_same_model(
    fid: dict[str, object], run_executable: Run, tmp_path: Path
) -> None:
    flags = {**fid, "save_steps": 2, "eval_strategy": "no"}
    del flags["eval_file"], flags["test_file"]
    assert run_executable("train_fid", flags) == 0
    whole = (tmp_path / "out/model.safetensors").read_bytes()
    half = {**flags, "output_dir": tmp_path / "half"}
    assert run_executable("train_fid", half) == 0
    for path in ("checkpoint-4/COMPLETE", "model.safetensors"):
        (tmp_path / "half" / path).unlink()
    assert run_executable("train_fid", {**half, "resume_from_checkpoint": "true"}) == 0
    assert (tmp_path / "half/model.safetensors").read_bytes() == whole


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_encoder_seq_length": 65}, "--max_encoder_seq_length 65: "),
        ({"max_encoder_seq_length": 5}, "--max_encoder_seq_length or --max_decoder_seq_length: no example fits"),
        ({"max_seq_length": 64}, "--max_seq_length: unknown flag; did you mean --max_"),
        ({"model_name_or_path": "bert::/nowhere"}, "model /nowhere: cannot be loaded: no such directory"),
        ({"fp16": "true"}, "--fp16 true needs a CUDA device"),
        ({"top_p": 0.5}, "--temperature and --top_p need --do_sample true"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    change: dict[str, object],
    message: str,
    fid: dict[str, object],
    run_executable: Run,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run_executable("train_fid", fid | change) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]
