"""Which models are packed, and what a checkpoint that cannot be loaded says."""

import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import huggingface_hub.constants
import numpy as np
import pytest
import transformers
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedTokenizerBase
from transformers.utils import is_flash_attn_2_available

from rqa.data import Document
from rqa.models.causal_lm import load_causal_lm
from rqa.models.encoder import load_encoder
from rqa.models.loading import (
    LoadingArguments,
    attention_of,
    choose_collate,
    evaluating,
    is_encoder_decoder,
    load_model,
    load_tokenizer,
)
from rqa.packing import pack
from rqa.runtime import distributed
from rqa.runtime.errors import UserError

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
ENCODERS: dict[str, tuple[bool | None, dict[str, Any]]] = {  # whether it is packed, where that is known
    "Bert": (True, SIZES | {"max_position_embeddings": 64}),
    "DistilBert": (None, {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 64}),
    "Roberta": (False, SIZES | {"max_position_embeddings": 70, "pad_token_id": 1}),
    "MPNet": (False, SIZES | {"max_position_embeddings": 70, "pad_token_id": 1}),
    "ModernBert": (None, SIZES | {"max_position_embeddings": 64, "local_attention": 12, "global_attn_every_n_layers": 2,
                                  "cls_token_id": 2, "sep_token_id": 3, "bos_token_id": 2, "eos_token_id": 3}),
}  # fmt: skip


@pytest.mark.parametrize("kind", ENCODERS)
def test_however_a_model_is_batched_its_embeddings_are_those_of_one_text_at_a_time(
    kind: str, wordpiece: PreTrainedTokenizerBase, documents: list[Document], tmp_path: Path
) -> None:
    packed, values = ENCODERS[kind]
    torch.manual_seed(3)
    config = getattr(transformers, f"{kind}Config")(**{"vocab_size": len(wordpiece), "pad_token_id": 0} | values)
    getattr(transformers, f"{kind}Model")(config).save_pretrained(tmp_path)
    wordpiece.save_pretrained(tmp_path)
    encoder = load_encoder(str(tmp_path))
    assert packed in (None, encoder.collate is pack)
    sequences = encoder.tokenize_passages([document.fmt_content[: 9 * i + 3] for i, document in enumerate(documents)])
    assert max(map(len, sequences)) > 24
    theirs = AutoModel.from_pretrained(tmp_path, attn_implementation="eager").eval()
    expected = []
    for ids in sequences:
        with torch.no_grad():
            vector = theirs(input_ids=torch.tensor([ids])).last_hidden_state[0].mean(0)
        expected.append((vector / vector.norm()).numpy())
    np.testing.assert_allclose(encoder.embed(sequences), np.stack(expected), atol=1e-5)


def test_a_decoder_that_attends_to_a_window_gives_one_by_ones_states(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    lengths = {"num_key_value_heads": 2, "max_position_embeddings": 128, "sliding_window": 12}
    config = transformers.MistralConfig(vocab_size=len(tokenizer), **lengths, **SIZES)
    transformers.MistralForCausalLM(config).save_pretrained(tmp_path)
    ours = load_causal_lm(str(tmp_path)).eval()
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    sequences = [list(range(3, 3 + length)) for length in (40, 5, 25)]
    with torch.no_grad():
        batch = choose_collate(ours, 0)(sequences)
        logits = ours(**batch.inputs, use_cache=False).logits.flatten(0, 1)
        for sequence, start in zip(sequences, batch.starts.tolist(), strict=True):
            expected = theirs(input_ids=torch.tensor([sequence])).logits[0]
            torch.testing.assert_close(logits[start : start + len(sequence)], expected, rtol=0, atol=1e-5)


def test_more_packed_tokens_than_positions_are_no_obstacle(encoder_path: str) -> None:
    encoder = load_encoder(encoder_path)
    sequences = [[5 + (7 * i + j) % 90 for j in range(60)] for i in range(5)]
    assert encoder.backbone.config.max_position_embeddings == 64
    together = encoder.embed(sequences)
    np.testing.assert_allclose(together, np.concatenate([encoder.embed([s]) for s in sequences]), atol=1e-6)


def test_a_decoder_like_llama_is_packed_and_choosing_leaves_mode_and_random_state_alone(lm_path: str) -> None:
    for training in (True, False):
        model, state = load_causal_lm(lm_path).train(training), torch.get_rng_state()
        assert choose_collate(model, 0) is pack
        assert all(module.training == training for module in model.modules())
        assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("fixture", "kind"),
    [("lm_path", AutoModelForCausalLM), ("encoder_path", AutoModel), ("t5_path", AutoModelForSeq2SeqLM)],
)
def test_memory_reserved_for_the_main_process_s_weights_has_their_layout_and_ties(
    fixture: str, kind: Any, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = request.getfixturevalue(fixture)
    real = load_model(kind, path, main_only=True)
    monkeypatch.setattr(distributed, "is_main", lambda: False)
    reserved = load_model(kind, path, main_only=True)
    for of in (nn.Module.named_parameters, nn.Module.named_buffers):  # without duplicates: ties count
        ours, theirs = ({n: (t.shape, t.dtype, t.device) for n, t in of(model)} for model in (reserved, real))
        assert ours == theirs
    assert reserved.name_or_path == real.name_or_path
    assert attention_of(reserved) == attention_of(real)
    reserved.load_state_dict(real.state_dict())
    assert all(torch.equal(*pair) for pair in zip(reserved.parameters(), real.parameters(), strict=True))


def test_evaluating_restores_each_part_s_own_mode_even_after_an_error() -> None:
    module = nn.Sequential(nn.Sequential(nn.Dropout()), nn.Dropout()).eval()
    module[0][0].train()  # as adapters are that were put into a model to evaluate
    for error in (None, KeyError):
        with pytest.raises(KeyError) if error else evaluating(module), evaluating(module):
            assert not any(part.training for part in module.modules())
            if error:
                raise error
        assert [part.training for part in module.modules()] == [False, False, True, False]
    with evaluating(module.train()):
        assert not module.training
    assert all(part.training for part in module.modules())


# ---------------------------------------------------------------- what cannot be loaded


@pytest.fixture
def damaged(lm_path: str, tmp_path: Path) -> Path:
    """A copy of a checkpoint to break."""
    return Path(shutil.copytree(lm_path, tmp_path / "damaged"))


def refusal(load: Callable[[str], object], path: Path | str) -> str:
    """The one line that names the checkpoint."""
    with pytest.raises(UserError) as caught:
        load(str(path))
    message = str(caught.value)
    assert message.startswith(f"model {path}: cannot be loaded: ")
    assert "\n" not in message
    assert len(message) < 600
    return message


def test_a_missing_or_empty_directory_is_named(tmp_path: Path) -> None:
    for load in (load_causal_lm, load_tokenizer, load_encoder, is_encoder_decoder):
        assert "no such directory" in refusal(load, tmp_path / "absent")
        assert "no such directory" not in refusal(load, tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("model.safetensors", b"garbage" * 100),
        ("model.safetensors", b""),
        ("model.safetensors", "truncated"),
        ("model.safetensors", None),
        ("config.json", None),
        ("config.json", b"{"),
        ("config.json", b"{}"),
        ("config.json", b"[]"),
        ("config.json", b'{"model_type": "no-such-architecture"}'),
        ("tokenizer.json", b"garbage"),
        ("tokenizer.json", b"{}"),
        ("tokenizer.json", b""),
    ],
)
def test_a_damaged_checkpoint_is_one_line_that_names_it(name: str, content: bytes | str | None, damaged: Path) -> None:
    if content is None:
        (damaged / name).unlink()
    else:
        (damaged / name).write_bytes((damaged / name).read_bytes()[:-100] if content == "truncated" else content)
    load = load_tokenizer if name == "tokenizer.json" else load_causal_lm
    assert "no such directory" not in refusal(load, damaged)


def test_a_hub_name_without_a_hub_is_one_line_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **options: asked.append(args))
    for load in (load_causal_lm, load_tokenizer):
        assert "no such directory, and no model hub can be reached" in refusal(load, "nobody/no-such-model")
    assert not asked


@pytest.mark.skipif(is_flash_attn_2_available(), reason="flash-attn is installed here")
def test_flash_attention_without_its_package_is_a_clear_error(lm_path: str) -> None:
    with pytest.raises(UserError, match=r"^--use_flash_attention true: flash-attn is not installed") as caught:
        load_causal_lm(lm_path, LoadingArguments(use_flash_attention=True))
    assert "\n" not in str(caught.value)


def test_neither_pickled_weights_nor_a_checkpoint_s_own_code_run_unasked(damaged: Path, tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.system, (f"touch {tmp_path / 'ran'}",)

    pickled = Path(shutil.copytree(damaged, tmp_path / "pickled"))
    (pickled / "model.safetensors").unlink()
    torch.save({"weights": Payload()}, pickled / "pytorch_model.bin")
    refusal(load_causal_lm, pickled)
    config = json.loads((damaged / "config.json").read_text())
    config |= {"model_type": "custom", "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}}
    (damaged / "config.json").write_text(json.dumps(config))
    (damaged / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    refusal(load_causal_lm, damaged)
    assert not (tmp_path / "ran").exists()
