"""Adapters are trained, saved in peft's layout, loaded, merged and resumed."""

import json
import re
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
from rqa.models.loading import LoraArguments, is_encoder_decoder, train_adapters
from rqa.runtime.errors import UserError

Run = Callable[[str, dict[str, object]], int]
TRAINING = {"use_lora": "true", "lora_r": 4, "lora_dropout": 0.1, "learning_rate": 1e-2, "max_steps": 4,
            "eval_steps": 2, "save_steps": 2, "per_device_train_batch_size": 2}  # fmt: skip


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        output = model.eval()(input_ids=torch.arange(10, 30)[None])
    return output.logits if hasattr(output, "logits") else output.last_hidden_state


def test_a_reader_keeps_its_base_and_its_adapters_are_peft_s_resumed_and_merged_on_request(
    files: dict[str, Path], lm_path: str, encoder_path: str, run_executable: Run, tmp_path: Path
) -> None:
    out, half, lengths = tmp_path / "out", tmp_path / "half", {"max_new_tokens": 4, "max_seq_length": 256}
    flags = {**files, **TRAINING, **lengths, "model_name_or_path": lm_path, "embedding_model": encoder_path}
    flags |= {"gradient_checkpointing": "true", "save_total_limit": 4}
    assert run_executable("train_swr", {**flags, "output_dir": out}) == 0
    for path in (out, out / "checkpoint-2"):
        assert not (path / "model.safetensors").exists()
        assert all("lora_" in name for name in load_file(path / "adapter_model.safetensors"))
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(lm_path), out / "checkpoint-4")
    ours, base = load_causal_lm(str(out / "checkpoint-4")), load_causal_lm(lm_path)
    assert not is_encoder_decoder(str(out))
    torch.testing.assert_close(logits(ours), logits(theirs))
    assert (logits(ours) - logits(base)).abs().max() > 1e-2
    again = {"qa_model_name_or_path": out, "embedding_model_name_or_path": encoder_path, **lengths,
             "document_path": files["full_dataset_file_path"], "eval_data_path": files["test_file"],
             "output_dir": tmp_path / "again"}  # fmt: skip
    assert run_executable("evaluate_rqa", again) == 0
    scores = [json.loads((path / "score.json").read_text())["test_gen/f1"] for path in (out, tmp_path / "again")]
    assert scores[0] == scores[1]

    shutil.copytree(out / "checkpoint-2", half / "checkpoint-2")
    rest = {**flags, "output_dir": half, "resume_from_checkpoint": "true", "load_best_model_at_end": "false"}
    assert run_executable("train_swr", {**rest, "merge_lora_on_save": "true"}) == 0
    whole, resumed = (load_file(path / "checkpoint-4/adapter_model.safetensors") for path in (out, half))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert not (half / "adapter_config.json").exists()
    assert not any("lora" in name for name in load_file(half / "model.safetensors"))
    merged = AutoModelForCausalLM.from_pretrained(half)
    torch.testing.assert_close(logits(merged), logits(ours), rtol=1e-4, atol=1e-5)

    train_adapters(ours, LoraArguments(use_lora=True, lora_r=4))
    assert all(parameter.requires_grad == ("lora_" in name) for name, parameter in ours.named_parameters())
    with pytest.raises(UserError, match="--lora_r 8: the adapter to train on has 4"):
        train_adapters(ours, LoraArguments(use_lora=True, lora_r=8))
    with pytest.raises(UserError, match="is a LoRA adapter; train it on with --use_lora true"):
        train_adapters(ours, LoraArguments())


def test_a_retriever_with_adapters_is_loaded_as_an_encoder(
    files: dict[str, Path], run_executable: Run, encoder_path: str, tmp_path: Path
) -> None:
    own = {"model_name_or_path": encoder_path, "query_prefix": "query: ", "output_dir": tmp_path}
    own["load_best_model_at_end"] = "false"  # by chance that is the one before training
    assert run_executable("train_ctl", {**files, **TRAINING, **own}) == 0
    encoder, base = load_encoder(str(tmp_path)), load_encoder(encoder_path)
    assert encoder.settings.query_prefix == "query: "
    theirs = PeftModel.from_pretrained(AutoModel.from_pretrained(encoder_path), tmp_path)
    torch.testing.assert_close(logits(encoder.backbone), logits(theirs), rtol=1e-4, atol=1e-5)
    assert (logits(encoder.backbone) - logits(base.backbone)).abs().max() > 1e-3


def test_what_cannot_be_is_refused(lm_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for flags, message in (
        ({"lora_r": 0}, "--lora_r 0: must be at least 1"),
        ({"lora_dropout": 1.0}, "--lora_dropout 1.0"),
        ({"merge_lora_on_save": True}, "--merge_lora_on_save true: there is nothing to merge"),
    ):
        with pytest.raises(UserError, match=message):
            LoraArguments(**flags)
    train_adapters(load_causal_lm(lm_path), LoraArguments(use_lora=True, lora_target_modules=["q_proj", "nowhere"]))
    with pytest.raises(UserError, match="--lora_target_modules nowhere"):
        train_adapters(load_causal_lm(lm_path), LoraArguments(use_lora=True, lora_target_modules=["nowhere"]))
    monkeypatch.setitem(sys.modules, "peft", None)
    message = '--use_lora true: peft is not installed; pip install "rqa[lora]"'
    with pytest.raises(UserError, match=re.escape(message)):
        train_adapters(load_causal_lm(lm_path), LoraArguments(use_lora=True))
