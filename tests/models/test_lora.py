"""Adapters are trained, saved in peft's layout, loaded, merged and resumed."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import pytest
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM

from rqa.models.causal_lm import load_causal_lm
from rqa.models.encoder import load_encoder

Run = Callable[[str, dict[str, object]], int]


@pytest.fixture
def flags(files: dict[str, Path], tmp_path: Path) -> dict[str, object]:
    """What a reader and a retriever need beside their models."""
    return {
        **files,
        "output_dir": tmp_path / "out",
        "use_lora": "true",
        "lora_r": 4,
        "lora_dropout": 0.1,
        "learning_rate": 1e-2,
        "max_steps": 4,
        "eval_steps": 2,
        "save_steps": 2,
        "per_device_train_batch_size": 2,
    }


@pytest.fixture
def reader(flags: dict[str, object], lm_path: str, encoder_path: str) -> dict[str, object]:
    lengths = {"max_new_tokens": 4, "max_seq_length": 256}
    return {**flags, "model_name_or_path": lm_path, "embedding_model": encoder_path, **lengths}


def test_a_reader_keeps_its_base_and_saves_adapters_that_peft_loads(
    reader: dict[str, object], run_executable: Run, lm_path: str, tmp_path: Path
) -> None:
    assert run_executable("train_swr", {**reader, "gradient_checkpointing": "true"}) == 0
    for path in (tmp_path / "out", tmp_path / "out/checkpoint-2"):
        assert (path / "adapter_config.json").is_file()
        assert not (path / "model.safetensors").exists()
        saved = load_file(path / "adapter_model.safetensors")
        assert all("lora_" in name for name in saved)
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(lm_path), tmp_path / "out").eval()
    ours, base = load_causal_lm(str(tmp_path / "out")).eval(), load_causal_lm(lm_path).eval()
    ids = torch.arange(10, 30)[None]
    with torch.no_grad():
        logits = [model(input_ids=ids).logits for model in (theirs, ours, base)]
    torch.testing.assert_close(logits[0], logits[1])
    assert (logits[0] - logits[2]).abs().max() > 1e-2
    scores = json.loads((tmp_path / "out/score.json").read_text())
    evaluated = {"qa_model_name_or_path": tmp_path / "out", "embedding_model_name_or_path": reader["embedding_model"],
                 "document_path": reader["full_dataset_file_path"], "eval_data_path": reader["test_file"],
                 "output_dir": tmp_path / "again", "max_new_tokens": 4, "max_seq_length": 256}  # fmt: skip
    assert run_executable("evaluate_rqa", evaluated) == 0
    again = json.loads((tmp_path / "again/score.json").read_text())
    assert again["test_gen/f1"] == scores["test_gen/f1"]


def test_merged_on_request_it_is_a_plain_checkpoint_of_the_same_function(
    reader: dict[str, object], run_executable: Run, tmp_path: Path
) -> None:
    assert run_executable("train_swr", {**reader, "merge_lora_on_save": "true", "eval_strategy": "no"}) == 0
    output = tmp_path / "out"
    assert not (output / "adapter_config.json").exists()
    assert not any("lora" in name for name in load_file(output / "model.safetensors"))
    assert (output / "checkpoint-4" / "adapter_model.safetensors").is_file()
    merged, adapted = AutoModelForCausalLM.from_pretrained(output), load_causal_lm(str(output / "checkpoint-4"))
    ids = torch.arange(10, 30)[None]
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, adapted.eval()(input_ids=ids).logits, rtol=1e-4, atol=1e-5)


def test_a_resumed_adapter_run_ends_with_the_very_same_adapters(
    reader: dict[str, object], run_executable: Run, tmp_path: Path
) -> None:
    quiet = {name: value for name, value in reader.items() if name not in ("eval_file", "test_file")}
    assert run_executable("train_swr", quiet) == 0
    shutil.copytree(tmp_path / "out/checkpoint-2", tmp_path / "half/checkpoint-2")
    half = {**quiet, "output_dir": tmp_path / "half", "resume_from_checkpoint": "true"}
    assert run_executable("train_swr", half) == 0
    whole, resumed = (load_file(tmp_path / path / "adapter_model.safetensors") for path in ("out", "half"))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert run_executable("train_swr", {**half, "lora_r": 8}) == 2


def test_a_retriever_with_adapters_is_loaded_as_an_encoder(
    flags: dict[str, object], run_executable: Run, encoder_path: str, tmp_path: Path
) -> None:
    own = {"model_name_or_path": encoder_path, "per_device_train_batch_size": 4, "query_prefix": "query: "}
    own["load_best_model_at_end"] = "false"  # by chance that is the one before training
    assert run_executable("train_ctl", {**flags, **own}) == 0
    encoder, base = load_encoder(str(tmp_path / "out")), load_encoder(encoder_path)
    assert encoder.settings.query_prefix == "query: "
    theirs = PeftModel.from_pretrained(AutoModel.from_pretrained(encoder_path), tmp_path / "out").eval()
    ids = torch.arange(10, 20)[None]
    with torch.no_grad():
        hidden = [model.eval()(input_ids=ids).last_hidden_state for model in (encoder.backbone, theirs, base.backbone)]
    torch.testing.assert_close(hidden[0], hidden[1], rtol=1e-4, atol=1e-5)
    assert (hidden[0] - hidden[2]).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora_r": 0}, "--lora_r 0: must be at least 1"),
        ({"lora_dropout": 1.0}, "--lora_dropout 1.0"),
        ({"use_lora": "false", "merge_lora_on_save": "true"}, "--merge_lora_on_save true: there is nothing to merge"),
        ({"lora_target_modules": ["q_proj", "nowhere"]}, ""),
        ({"lora_target_modules": "nowhere"}, "--lora_target_modules nowhere"),
    ],
)
def test_what_cannot_be_is_one_line(
    change: dict[str, object],
    message: str,
    reader: dict[str, object],
    run_executable: Run,
    capsys: pytest.CaptureFixture[str],
) -> None:
    status = run_executable("train_swr", {**reader, "max_steps": 1, "eval_strategy": "no", **change})
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert status == (2 if message else 0)
    assert len(errors) == bool(message)
    assert message in "".join(errors)


def test_without_peft_it_is_one_line(
    reader: dict[str, object], run_executable: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    assert run_executable("train_swr", reader) == 2
    assert 'error: --use_lora true: peft is not installed; pip install "rqa[lora]"' in capsys.readouterr().err


def test_an_adapter_is_not_trained_as_if_it_were_a_whole_model(
    reader: dict[str, object], run_executable: Run, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert run_executable("train_swr", {**reader, "max_steps": 1, "eval_strategy": "no"}) == 0
    whole = {**reader, "model_name_or_path": tmp_path / "out", "output_dir": tmp_path / "next", "use_lora": "false"}
    assert run_executable("train_swr", whole) == 2
    assert "is a LoRA adapter; train it on with --use_lora true" in capsys.readouterr().err
