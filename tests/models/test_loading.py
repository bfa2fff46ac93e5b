"""Which models are packed, and what a checkpoint that cannot be loaded says."""

import json
import shutil
import socket
from pathlib import Path
from typing import Any

import torch
import huggingface_hub.constants
import numpy as np
import pytest
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BertConfig,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    ModernBertConfig,
    ModernBertModel,
    MPNetConfig,
    MPNetModel,
    PreTrainedTokenizerBase,
    RobertaConfig,
    RobertaModel,
)

from rqa.data import Document
from rqa.models.causal_lm import load_causal_lm
from rqa.models.encoder import load_encoder
from rqa.models.loading import choose_collate, evaluating, load_model, load_tokenizer
from rqa.packing import pack
from rqa.runtime.errors import UserError

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def make(kind: str, vocab_size: int) -> Any:
    torch.manual_seed(3)
    common = {"vocab_size": vocab_size, "pad_token_id": 0} | SIZES
    match kind:
        case "bert":
            return BertModel(BertConfig(max_position_embeddings=64, **common))
        case "distilbert":
            return DistilBertModel(
                DistilBertConfig(
                    vocab_size=vocab_size, dim=32, hidden_dim=64, n_layers=2, n_heads=4, max_position_embeddings=64
                )
            )
        case "roberta":
            return RobertaModel(RobertaConfig(max_position_embeddings=70, **common | {"pad_token_id": 1}))
        case "mpnet":
            return MPNetModel(MPNetConfig(max_position_embeddings=70, **common | {"pad_token_id": 1}))
        case "modernbert":
            return ModernBertModel(
                ModernBertConfig(
                    max_position_embeddings=64,
                    local_attention=12,
                    global_attn_every_n_layers=2,
                    cls_token_id=2,
                    sep_token_id=3,
                    bos_token_id=2,
                    eos_token_id=3,
                    **common,
                )
            )
    raise AssertionError(kind)


@pytest.mark.parametrize(
    ("kind", "packed"),
    [
        ("bert", True),
        ("distilbert", None),
        ("roberta", False),
        ("mpnet", False),
        ("modernbert", None),
    ],
)
def test_however_a_model_is_batched_its_embeddings_are_those_of_one_text_at_a_time(
    kind: str, packed: bool | None, wordpiece: PreTrainedTokenizerBase, documents: list[Document], tmp_path: Path
) -> None:
    make(kind, len(wordpiece)).save_pretrained(tmp_path)
    wordpiece.save_pretrained(tmp_path)
    encoder = load_encoder(str(tmp_path))
    if packed is not None:
        assert (encoder.collate is pack) == packed
    sequences = encoder.tokenize_passages([document.fmt_content[: 9 * i + 3] for i, document in enumerate(documents)])
    assert max(map(len, sequences)) > 24
    theirs = AutoModel.from_pretrained(tmp_path, attn_implementation="eager").eval()
    expected = []
    for ids in sequences:
        with torch.no_grad():
            vector = theirs(input_ids=torch.tensor([ids])).last_hidden_state[0].mean(0)
        expected.append((vector / vector.norm()).numpy())
    np.testing.assert_allclose(encoder.embed(sequences), np.stack(expected), atol=1e-5)


def test_a_decoder_like_llama_is_packed(lm_path: str) -> None:
    assert choose_collate(load_causal_lm(lm_path), 0) is pack


def test_a_decoder_that_attends_to_a_window_gives_one_by_ones_states(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(
        vocab_size=len(tokenizer), num_key_value_heads=2, max_position_embeddings=128, sliding_window=12, **SIZES
    )
    MistralForCausalLM(config).save_pretrained(tmp_path)
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


@pytest.mark.parametrize("fixture", ["lm_path", "encoder_path", "t5_path"])
def test_an_empty_model_has_the_layout_and_the_ties_of_the_real_one(
    fixture: str, request: pytest.FixtureRequest
) -> None:
    path = request.getfixturevalue(fixture)
    kind = {"lm_path": AutoModelForCausalLM, "encoder_path": AutoModel, "t5_path": AutoModelForSeq2SeqLM}[fixture]
    real, empty = load_model(kind, path), load_model(kind, path, main_only=True)
    for of in (nn.Module.named_parameters, nn.Module.named_buffers):  # without duplicates: ties count
        ours, theirs = ({n: (t.shape, t.dtype, t.device) for n, t in of(model)} for model in (empty, real))
        assert ours == theirs
    assert empty.name_or_path == real.name_or_path
    assert empty.config._attn_implementation == real.config._attn_implementation
    empty.load_state_dict(real.state_dict())
    assert all(torch.equal(*pair) for pair in zip(empty.parameters(), real.parameters(), strict=True))


def test_choosing_leaves_the_mode_and_the_random_state_alone(lm_path: str) -> None:
    for training in (True, False):
        model = load_causal_lm(lm_path).train(training)
        state = torch.get_rng_state()
        choose_collate(model, 0)
        assert all(module.training == training for module in model.modules())
        assert torch.equal(torch.get_rng_state(), state)


def test_evaluating_restores_each_part_s_own_mode() -> None:
    module = torch.nn.Sequential(torch.nn.Sequential(torch.nn.Dropout()), torch.nn.Dropout()).eval()
    module[0][0].train()  # as adapters are that were put into a model to evaluate
    with evaluating(module):
        assert not any(part.training for part in module.modules())
    assert [part.training for part in module.modules()] == [False, False, True, False]


def test_evaluating_restores_the_mode_even_after_an_error() -> None:
    module = torch.nn.Sequential(torch.nn.Dropout())

    def fail() -> None:
        with evaluating(module):
            assert not module[0].training
            raise KeyError

    for training in (True, False):
        module.train(training)
        with pytest.raises(KeyError):
            fail()
        assert module.training == module[0].training == training


# ---------------------------------------------------------------- what cannot be loaded


@pytest.fixture
def damaged(lm_path: str, tmp_path: Path) -> Path:
    """A copy of a checkpoint to break."""
    return Path(shutil.copytree(lm_path, tmp_path / "damaged"))


def load_lm(path: Path | str) -> None:
    load_causal_lm(str(path))


def one_line_naming(error: pytest.ExceptionInfo[UserError], path: Path | str) -> str:
    message = str(error.value)
    assert message.startswith(f"model {path}: cannot be loaded: ")
    assert "\n" not in message
    assert len(message) < 600
    return message


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    for load in (load_lm, lambda path: load_tokenizer(str(path)), lambda path: load_encoder(str(path))):
        with pytest.raises(UserError, match="no such directory") as caught:
            load(tmp_path / "absent")
        one_line_naming(caught, tmp_path / "absent")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("model.safetensors", b"garbage" * 100),
        ("model.safetensors", b""),
        ("model.safetensors", None),
        ("config.json", None),
        ("config.json", b"{"),
        ("config.json", b"{}"),
        ("config.json", b"[]"),
        ("config.json", b'{"model_type": "no-such-architecture"}'),
    ],
)
def test_a_damaged_checkpoint_is_one_line_that_names_it(name: str, content: bytes | None, damaged: Path) -> None:
    (damaged / name).unlink()
    if content is not None:
        (damaged / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        load_lm(damaged)
    assert "no such directory" not in one_line_naming(caught, damaged)


def test_truncated_weights_are_one_line_that_names_them(damaged: Path) -> None:
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError) as caught:
        load_lm(damaged)
    one_line_naming(caught, damaged)


@pytest.mark.parametrize("content", [b"garbage", b"{}", b""])
def test_a_damaged_tokenizer_is_one_line_that_names_it(content: bytes, damaged: Path) -> None:
    (damaged / "tokenizer.json").write_bytes(content)
    with pytest.raises(UserError) as caught:
        load_tokenizer(str(damaged))
    one_line_naming(caught, damaged)


def test_an_empty_directory_is_one_line_that_names_it(tmp_path: Path) -> None:
    for load in (load_lm, lambda path: load_tokenizer(str(path))):
        with pytest.raises(UserError) as caught:
            load(tmp_path)
        one_line_naming(caught, tmp_path)


def test_a_hub_name_without_a_hub_is_one_line_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*args: object, **options: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(socket, "getaddrinfo", unreachable)
    for load in (load_lm, load_tokenizer):
        with pytest.raises(UserError, match="no such directory, and no model hub can be reached") as caught:
            load("nobody/no-such-model")
        one_line_naming(caught, "nobody/no-such-model")


def test_flash_attention_without_its_package_is_a_clear_error(lm_path: str) -> None:
    from transformers.utils import is_flash_attn_2_available

    if is_flash_attn_2_available():
        pytest.skip("flash-attn is installed here")
    with pytest.raises(UserError, match=r"^--use_flash_attention true: flash-attn is not installed") as caught:
        load_model(AutoModelForCausalLM, lm_path, LoadingArguments(use_flash_attention=True))
    assert "\n" not in str(caught.value)


def test_pickled_weights_never_run_code(damaged: Path, tmp_path: Path) -> None:
    import os

    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.system, (f"touch {tmp_path / 'ran'}",)

    (damaged / "model.safetensors").unlink()
    torch.save({"weights": Payload()}, damaged / "pytorch_model.bin")
    with pytest.raises(UserError):
        load_lm(damaged)
    assert not (tmp_path / "ran").exists()


def test_a_checkpoints_own_code_does_not_run_unasked(damaged: Path, tmp_path: Path) -> None:
    config = json.loads((damaged / "config.json").read_text())
    config |= {"model_type": "custom", "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}}
    (damaged / "config.json").write_text(json.dumps(config))
    (damaged / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    with pytest.raises(UserError):
        load_lm(damaged)
    assert not (tmp_path / "ran").exists()
