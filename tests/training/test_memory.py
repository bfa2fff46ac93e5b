"""--estimate_memory: its bytes beside those of a real step, and its table."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import pytest
from torch import Tensor, nn
from trainers import Flags, Run, parsed

from rqa.models.encoder import Encoder
from rqa.models.loading import train_adapters
from rqa.objectives.fid import FiDLikelihood, FiDSequence
from rqa.objectives.sft import AnswerLikelihood
from rqa.packing import pack
from rqa.prompts import TokenSequence
from rqa.runtime import distributed
from rqa.training.memory import needs
from rqa.training.optim import Optimization

BATCH = ["--per_device_train_batch_size=2", "--max_seq_length=48", "--max_new_tokens=8"]
STATIC = ("weights", "master weights", "gradients", "moments")


def size(tensors: Any) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


@pytest.mark.parametrize("line", [[], ["--bf16=true"], ["--bf16=true", "--use_lora=true"]])
def test_weights_gradients_and_moments_are_counted_to_the_byte(
    line: list[str], lm_path: str, has_bf16: Callable[[bool], None]
) -> None:
    has_bf16(True)
    flags = parsed("train_sft", [*BATCH, f"--model_name_or_path={lm_path}", *line])
    sft = AnswerLikelihood.load(lm_path, flags)
    train_adapters(sft.model, flags, lm_path)
    optimization = Optimization(sft, flags, 1)
    sft(sft.batch([TokenSequence(list(range(4, 52)), 40)] * 2))[0].backward()
    weights, trained = set(sft.parameters()), list(optimization.trained.values())
    real = [size(weights), size(set(trained) - weights), size(w.grad for w in trained)]
    optimization.step(0, 1.0)
    states = optimization.optimizer.state.values()
    real.append(size(state[name] for state in states for name in ("exp_avg", "exp_avg_sq")))
    assert [needs(flags, False)[1][name] for name in STATIC] == real


def test_8_bits_are_6_bytes_a_parameter_and_shards_16_divided_by_the_processes(
    lm_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rqa.training.arguments.find_spec", lambda name: True)
    monkeypatch.setattr(distributed, "world_size", lambda: 8)
    sums = []
    for line in ([], ["--bf16=true", "--optim=adamw_8bit"], ["--bf16=true", "--fsdp=full_shard"]):
        terms = needs(parsed("train_sft", [*BATCH, f"--model_name_or_path={lm_path}", *line]), False)[1]
        sums.append(sum(terms[name] for name in STATIC))
    assert sums[1:] == pytest.approx([sums[0] * 6 / 16, sums[0] / 8], rel=0.01)


def kept(module: nn.Module, forward: Callable[[], Any]) -> int:
    """The bytes that a forward pass keeps for its backward pass, beside the module's own."""
    own = {tensor.data_ptr() for tensor in (*module.parameters(), *module.buffers())}
    found: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        return found.setdefault(tensor.untyped_storage().data_ptr(), tensor)

    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: (keep(tensor), tensor)[1], lambda tensor: tensor):
        output = forward()
    assert output is not None
    return size(tensor for place, tensor in found.items() if place not in own)


def test_activations_are_within_a_sixth_of_what_a_forward_pass_keeps(
    lm_path: str, encoder: Encoder, encoder_path: str, bart_path: str
) -> None:
    text = list(range(4, 52))
    flags = parsed("train_sft", [*BATCH, f"--model_name_or_path={lm_path}"])
    sft = AnswerLikelihood.load(lm_path, flags)
    real = {"sft": kept(sft, lambda: sft(sft.batch([TokenSequence(text, 40)] * 2)))}
    estimates = {"sft": needs(flags, False)[1]["activations"] - 12 * 16 * sft.model.config.vocab_size}  # logits
    flags = parsed("train_ctl", [BATCH[0], f"--model_name_or_path={encoder_path}", "--max_passage_length=48",
                                 "--num_hard_negatives=0"])  # fmt: skip
    encoder.train()
    real["ctl"] = kept(encoder, lambda: encoder(pack([text, text])))
    estimates["ctl"] = needs(flags, True)[1]["activations"]
    lengths = ["--max_encoder_seq_length=48", "--max_decoder_seq_length=8", "--embedding_max_num_to_retrieve=2"]
    flags = parsed("train_fid", [BATCH[0], *lengths, f"--model_name_or_path={bart_path}", "--embedding_model=bm25"])
    fid = FiDLikelihood.load(bart_path, flags).train()
    real["fid"] = kept(fid, lambda: fid(fid.batch([FiDSequence([text] * 3, text[:8])] * 2)))
    estimates["fid"] = needs(flags, False)[1]["activations"] - 12 * 16 * fid.model.config.vocab_size
    assert estimates == pytest.approx(real, rel=1 / 6)


def test_checkpointing_keeps_the_layers_inputs_and_one_layer(lm_path: str) -> None:
    line = [*BATCH, f"--model_name_or_path={lm_path}"]
    every, some = (
        needs(parsed("train_sft", [*line, *more]), False)[1]["activations"]
        for more in ([], ["--gradient_checkpointing=true"])
    )
    assert every / 2 < some < every


@pytest.mark.parametrize("name", ["train_swr", "train_fid", "train_ctl", "train_rpg", "train_dca", "train_rerank"])
def test_every_kind_of_trainer_prints_a_table_and_begins_nothing(
    name: str, trainer_flags: Flags, run_executable: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = trainer_flags(name, estimate_memory="true")
    assert run_executable(name, flags) == 0
    table = capsys.readouterr().out
    assert "GiB on each device: 0.00 billion parameters" in table
    assert ("frozen" in table) == (name not in ("train_ctl", "train_rerank"))
    assert not Path(str(flags["output_dir"])).exists()
