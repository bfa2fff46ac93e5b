"""What a checkpoint that cannot be loaded says; adapters: trained, saved in peft's layout, loaded, merged, resumed."""

import math
import os
import re
import shutil
import socket
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import huggingface_hub.constants
import pytest
import transformers
from torch import nn
from conftest import SMALL
from fakes import edit
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from trainers import Train, scores
from transformers import AddedToken, AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from rqa.models import attention
from rqa.models.encoder import load_encoder
from rqa.models.loading import (
    LoraArguments,
    attention_of,
    choose_collate,
    evaluating,
    learned_positions,
    load_causal_lm,
    load_config,
    load_model,
    load_tokenizer,
    model_fingerprint,
    train_adapters,
)
from rqa.models.reader import CausalLMReader
from rqa.objectives.teacher import AnswerScorer, Pair
from rqa.packing import pack
from rqa.prompts import PromptArguments, Prompter
from rqa.runtime import distributed
from rqa.runtime.errors import UserError
from rqa.runtime.files import atomic_directory


def test_a_decoder_like_llama_is_packed_and_choosing_leaves_mode_and_random_state_alone(lm_path: str) -> None:
    for training in (True, False):
        model, state = load_causal_lm(lm_path).train(training), torch.get_rng_state()
        assert choose_collate(model) is pack
        assert all(module.training == training for module in model.modules())
        assert torch.equal(torch.get_rng_state(), state)


def test_a_decoder_that_takes_no_borders_is_padded_and_a_fault_in_attention_is_not_hidden(
    lm_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, usual = load_causal_lm(lm_path), load_causal_lm(lm_path).model.forward
    with monkeypatch.context() as narrow:

        def forward(input_ids: Any, position_ids: Any = None, attention_mask: Any = None, use_cache: Any = None) -> Any:
            return usual(input_ids, attention_mask, position_ids, use_cache=use_cache)

        narrow.setattr(model.model, "forward", forward)
        assert choose_collate(model) is not pack
    monkeypatch.setattr(attention, "_one_by_one", lambda query: query)
    with pytest.raises(TypeError, match="positional argument"):
        choose_collate(model)


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
    for error in (None, KeyError()):
        with pytest.raises(KeyError) if error else nullcontext(), evaluating(module):
            assert not any(part.training for part in module.modules())
            if error:
                raise error
        assert [part.training for part in module.modules()] == [False, False, True, False]


@pytest.fixture
def damaged(lm_path: str, tmp_path: Path) -> Path:
    """A copy of a checkpoint to break."""
    return Path(shutil.copytree(lm_path, tmp_path / "damaged"))


def refusal(load: Callable[[str], object], path: Path | str) -> str:
    """The one line that names the checkpoint."""
    with pytest.raises(UserError) as caught:
        load(str(path))
    message = str(caught.value)
    assert re.fullmatch(rf"model {re.escape(str(path))}: cannot be loaded: .{{1,500}}", message)  # one line
    return message


def test_a_missing_or_empty_directory_is_named(tmp_path: Path) -> None:
    for load in (load_causal_lm, load_tokenizer, load_encoder, load_config):
        assert "no such directory" in refusal(load, tmp_path / "absent")
        assert "no such directory" not in refusal(load, tmp_path)


DAMAGED = {"model.safetensors": (b"garbage" * 100, b"", "truncated", None), "tokenizer.json": (b"garbage", b"{}", b""),
           "config.json": (None, b"{", b"{}", b"[]", b'{"model_type": "no-such-architecture"}')}  # fmt: skip


@pytest.mark.parametrize(("name", "content"), [(name, each) for name, contents in DAMAGED.items() for each in contents])
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
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **options: asked.append(args))
    for load in (load_causal_lm, load_tokenizer):
        assert "no such directory, and no model hub can be reached" in refusal(load, "nobody/no-such-model")
    assert not asked


def test_neither_pickled_weights_nor_a_checkpoint_s_own_code_run_unasked(damaged: Path, tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.system, (f"touch {tmp_path / 'ran'}",)

    pickled = Path(shutil.copytree(damaged, tmp_path / "pickled"))
    (pickled / "model.safetensors").unlink()
    torch.save({"weights": Payload()}, pickled / "pytorch_model.bin")
    refusal(load_causal_lm, pickled)
    code = {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}
    edit(damaged / "config.json", model_type="custom", auto_map=code)
    (damaged / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    refusal(load_causal_lm, damaged)
    assert not (tmp_path / "ran").exists()


def drop(path: Path, *names: str, **more: torch.Tensor) -> None:
    """Take tensors out of a checkpoint, and put others into it."""
    kept = {name: tensor for name, tensor in load_file(path).items() if name not in names}
    save_file(kept | more, path, {"format": "pt"})


UP = "model.layers.1.mlp.up_proj."
FAULTS = {
    "a tensor is missing": ({}, UP + "weight", {}, f"1 of its tensors are missing, such as {UP}weight"),
    "a layer is missing": ({"num_hidden_layers": 3}, "", {}, "tensors are missing, such as model.layers.2"),
    "a layer too many": ({"num_hidden_layers": 1}, "", {}, "unexpected, such as model.layers.1"),
    "a bias too many": ({}, "", {UP + "bias": torch.ones(64)}, "1 of its tensors are unexpected"),
    "another width": ({"intermediate_size": 65}, "", {}, "of another shape, such as model.layers.0.mlp"),
    "no head": ({"tie_word_embeddings": False}, "lm_head.weight", {}, "missing, such as lm_head.weight"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_checkpoint_holds_just_the_tensors_of_its_model(fault: str, damaged: Path) -> None:
    config, name, more, message = FAULTS[fault]
    edit(damaged / "config.json", **config)
    drop(damaged / "model.safetensors", name, **more)
    assert message in refusal(load_causal_lm, damaged)


def test_an_adapter_and_the_model_below_it_are_whole(damaged: Path, tmp_path: Path) -> None:
    adapter, lora_B = tmp_path / "adapter", "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(damaged), LoraConfig(target_modules=["q_proj"]))
    model.save_pretrained(adapter)
    assert load_causal_lm(str(adapter), dtype=torch.bfloat16).dtype == torch.bfloat16
    weights = (adapter / "adapter_model.safetensors").read_bytes()
    drop(adapter / "adapter_model.safetensors", lora_B)
    missing = "1 of its tensors are missing, such as model.layers.1."
    assert missing + "self_attn.q_proj.lora_B" in refusal(load_causal_lm, adapter)
    (adapter / "adapter_model.safetensors").write_bytes(weights)
    edit(adapter / "adapter_config.json", r=4)
    assert "of another shape, such as model.layers.0" in refusal(load_causal_lm, adapter)
    drop(damaged / "model.safetensors", UP + "weight")
    assert missing + "mlp.up_proj" in refusal(load_causal_lm, adapter)


HEADS = ("BertForMaskedLM", "BertForPreTraining", "BertForSequenceClassification", "RobertaForMaskedLM",
         "AlbertForMaskedLM", "ElectraForPreTraining", "ModernBertForMaskedLM", "LlamaForCausalLM")  # fmt: skip


@pytest.mark.parametrize("kind", HEADS)
def test_an_encoder_is_loaded_from_a_checkpoint_with_another_head(kind: str, wordpiece: Any, saved: Any) -> None:
    whole = getattr(transformers, kind)
    config = whole.config_class(vocab_size=len(wordpiece), **SMALL, pad_token_id=0, bos_token_id=2, eos_token_id=3)
    path = Path(saved("headed", 0, whole, config, wordpiece))
    expected = whole.from_pretrained(path).base_model.state_dict()
    for name, tensor in load_model(AutoModel, str(path)).state_dict().items():
        assert "pooler" in name or torch.equal(tensor, expected[name])


def test_a_checkpoint_with_checksums_is_compared_with_them(damaged: Path, tmp_path: Path) -> None:
    with atomic_directory(tmp_path / "checkpoint-1") as directory:
        shutil.copytree(damaged, directory, dirs_exist_ok=True)
    load_causal_lm(str(tmp_path / "checkpoint-1"))
    weights = bytearray((tmp_path / "checkpoint-1/model.safetensors").read_bytes())
    weights[-3] ^= 1
    (tmp_path / "checkpoint-1/model.safetensors").write_bytes(weights)
    with pytest.raises(UserError, match=r"checkpoint-1: model.safetensors is damaged; copy it again"):
        load_causal_lm(str(tmp_path / "checkpoint-1"))


def test_each_token_that_a_text_may_hold_has_an_embedding(damaged: Path) -> None:
    tokenizer, message = load_tokenizer(str(damaged)), "its tokenizer has {} tokens, its embedding {}; use"
    rows = len(tokenizer)
    tokenizer.add_tokens([AddedToken("<image>", special=True)])  # Gemma 3 has one that its text models lack
    tokenizer.save_pretrained(damaged)
    load_tokenizer(str(damaged))
    tokenizer.add_tokens(["zebra"])
    tokenizer.save_pretrained(damaged)
    assert message.format(rows + 2, rows) in refusal(load_tokenizer, damaged)
    (damaged / "config.json").unlink()
    load_tokenizer(str(damaged))  # there is no model


BARELY = {"num_hidden_layers": 1, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
POSITIONS = {"GPT2": 64, "OPT": 64, "Bert": 64, "Roberta": 63, "MPNet": 62, "DistilBert": 64, "Llama": math.inf,
             "ModernBert": math.inf, "DebertaV2": 64, "CodeGen": 64, "GPTJ": 64, "CTRL": 64}  # fmt: skip


@pytest.mark.parametrize("kind", POSITIONS)
def test_so_many_tokens_are_read_as_a_model_has_learned_positions_for(kind: str) -> None:
    sizes = BARELY | {"max_position_embeddings": 64, "rotary_dim": 4}
    config = getattr(transformers, f"{kind}Config")(vocab_size=40, hidden_size=16, num_attention_heads=4, **sizes)
    model = getattr(transformers, f"{kind}Model")(config).eval()
    most = learned_positions(model)
    assert most == POSITIONS[kind]
    tokens = torch.full((1, 64 if most == math.inf else int(most)), 5)
    model(tokens)
    if most < math.inf:
        with pytest.raises((IndexError, RuntimeError)):
            model(torch.full((1, int(most) + 1), 5))


def test_prompts_and_answers_keep_to_learned_positions(
    tokenizer: Any, saved: Any, examples: Any, documents: Any, caplog: pytest.LogCaptureFixture
) -> None:
    config = transformers.GPT2Config(vocab_size=len(tokenizer), n_positions=96, n_embd=16, n_layer=1, n_head=2)
    model = load_causal_lm(saved("gpt2", 5, transformers.GPT2LMHeadModel, config, tokenizer))
    prompter = Prompter(tokenizer, PromptArguments(max_new_tokens=40))
    prompter.stop_ids = [0]
    reader = CausalLMReader(model, prompter)
    assert "--max_seq_length 2048: is lowered to 96 tokens, for which GPT2LMHeadModel has positions" in caplog.text
    pairs = [Pair(example, documents[0]) for example in examples[:3]]
    assert all(score < 0 for _, score in AnswerScorer(model, prompter, 512)(pairs))
    for answer in (reader.generate([[7] * length])[0] for length in (50, 90, 96)):
        assert answer


CHANGES = [("hidden_act", "gelu"), ("rms_norm_eps", 1e-3), ("rope_parameters", {
    "rope_theta": 5e5, "rope_type": "default"}), ("sliding_window", 4)]  # fmt: skip


def test_a_fingerprint_changes_with_all_that_decides_an_output_and_not_with_paths_and_types(
    damaged: Path, lm_path: str, tmp_path: Path
) -> None:
    def of(path: Path | str = damaged, **options: Any) -> str:
        return model_fingerprint(load_causal_lm(str(path), **options), load_tokenizer(str(path)))

    before, config = of(), (damaged / "config.json").read_text()
    assert before == of(lm_path) == of(dtype=torch.bfloat16)
    edit(damaged / "config.json", transformers_version="4.1", architectures=None, dtype="bfloat16")
    assert of() == before
    found = []
    for name, value in CHANGES:
        (damaged / "config.json").write_text(config)
        edit(damaged / "config.json", **{name: value})
        found.append(of())
    (damaged / "config.json").write_text(config)
    live = load_causal_lm(str(damaged))
    train_adapters(live, LoraArguments(use_lora=True), str(damaged))
    for alpha in (32, 16):
        live.save_pretrained(tmp_path / "adapter")
        load_tokenizer(str(damaged)).save_pretrained(tmp_path / "adapter")
        edit(tmp_path / "adapter" / "adapter_config.json", lora_alpha=alpha)
        found.append(of(tmp_path / "adapter"))
    assert found[-2] == model_fingerprint(live, load_tokenizer(str(damaged)))
    (damaged / "chat_template.jinja").write_text("{{ messages }}")
    found.append(of())
    assert len({before, *found}) == 1 + len(found)


TRAINING = {"use_lora": "true", "lora_r": 4, "lora_dropout": 0.1, "learning_rate": 1e-2, "save_steps": 2}


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model.eval()(input_ids=torch.arange(10, 30)[None])[0]  # those, or last hidden states


def test_a_reader_keeps_its_base_and_its_adapters_are_peft_s_resumed_and_merged_on_request(
    train: Train, evaluate: Callable[..., dict[str, float]], lm_path: str, encoder_path: str, tmp_path: Path
) -> None:
    flags = TRAINING | {"gradient_checkpointing": "true", "max_new_tokens": 4, "save_total_limit": 4}
    out, half = train("train_swr", **flags, eval_steps=2), tmp_path / "half"
    for path in (out, out / "checkpoint-2"):
        assert not (path / "model.safetensors").exists()
        assert all("lora_" in name for name in load_file(path / "adapter_model.safetensors"))
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(lm_path), out / "checkpoint-4")
    ours, base = load_causal_lm(str(out / "checkpoint-4")), load_causal_lm(lm_path)
    assert not load_config(str(out)).is_encoder_decoder
    torch.testing.assert_close(logits(ours), logits(theirs))
    assert (logits(ours) - logits(base)).abs().max() > 1e-2
    evaluation = {"embedding_model": encoder_path, "dtype": "float32", "max_new_tokens": 4, "max_seq_length": 256}
    assert evaluate(out, **evaluation)["test_gen/f1"] == scores(out)["test_gen/f1"]

    shutil.copytree(out / "checkpoint-2", half / "checkpoint-2")
    train("train_swr", **flags, output_dir=half, resume_from_checkpoint="true", load_best_model_at_end="false",
          merge_lora_on_save="true")  # fmt: skip
    whole, resumed = (load_file(path / "checkpoint-4/adapter_model.safetensors") for path in (out, half))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert not (half / "adapter_config.json").exists()
    assert not any("lora" in name for name in load_file(half / "model.safetensors"))
    merged = AutoModelForCausalLM.from_pretrained(half)
    torch.testing.assert_close(logits(merged), logits(ours), rtol=1e-4, atol=1e-5)

    train_adapters(ours, LoraArguments(use_lora=True, lora_r=4), str(out))
    assert all(parameter.requires_grad == ("lora_" in name) for name, parameter in ours.named_parameters())
    with pytest.raises(UserError, match="--lora_r 8: the adapter has 4"):
        train_adapters(ours, LoraArguments(use_lora=True, lora_r=8), str(out))
    with pytest.raises(UserError, match="is a LoRA adapter; add --use_lora true"):
        train_adapters(ours, LoraArguments(), str(out))


def test_a_retriever_with_adapters_is_loaded_as_an_encoder(train: Train, encoder_path: str) -> None:
    output = train("train_ctl", **TRAINING, query_prefix="query: ", load_best_model_at_end="false")
    encoder, base = load_encoder(str(output)), load_encoder(encoder_path)
    assert encoder.settings.query_prefix == "query: "
    theirs = PeftModel.from_pretrained(AutoModel.from_pretrained(encoder_path), output)
    torch.testing.assert_close(logits(encoder.backbone), logits(theirs), rtol=1e-4, atol=1e-5)
    assert (logits(encoder.backbone) - logits(base.backbone)).abs().max() > 1e-3


ADAPTED = {"use_lora": "true", "merge_lora_on_save": "true", "bf16": "true", "gradient_checkpointing": "true",
           "learning_rate": 1e-2, "truncate_dim": 16, "lora_r": 4}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "own"),
    [("train_ctl", ADAPTED), ("train_rpg", {}), ("train_dca", {"projection": "true"})],  # EMDR2 is loaded as RPG
)
def test_a_decoder_is_trained_as_an_encoder_and_sentence_transformers_loads_it_adapters_merged(
    name: str, own: dict[str, object], train: Train, t5_path: str, saved: Any
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(t5_path)
    config = transformers.Qwen3Config(vocab_size=len(tokenizer), **SMALL, num_key_value_heads=2, head_dim=8)
    path = saved("qwen3", 0, transformers.Qwen3Model, config, tokenizer)
    own = {"pooling_type": "lasttoken", "max_steps": 1, "test_file": None, "load_best_model_at_end": "false"} | own
    output = str(train(name, model_name_or_path=path, query_instruction="find it", **own))
    ours, theirs = load_encoder(output), SentenceTransformer(output, device="cpu")
    assert not Path(output, "adapter_config.json").exists()
    found = ours.embed(ours.tokenize_queries(["What?", "Who was it?"]))
    expected = theirs.encode_query(["What?", "Who was it?"], normalize_embeddings=True)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    base = load_encoder(path).backbone.state_dict()
    assert any((weight - base[name]).abs().max() > 1e-6 for name, weight in ours.backbone.state_dict().items())


def test_adapters_of_no_module_and_without_peft_are_refused(lm_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def train(*targets: str) -> None:
        flags = {"lora_target_modules": [*targets]} if targets else {}
        train_adapters(load_causal_lm(lm_path), LoraArguments(use_lora=True, **flags), lm_path)

    train("q_proj", "nowhere")
    with pytest.raises(UserError, match="--lora_target_modules nowhere"):
        train("nowhere")
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r'--use_lora true: peft is not installed; pip install "rqa\[lora\]"'):
        train()
