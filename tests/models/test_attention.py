"""A packed row is attended to as its sequences would be one by one, and anything else as sdpa does."""

import copy
import inspect
from functools import partialmethod
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import pytest
import transformers
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel

from rqa.models import attention
from rqa.models.attention import PACKED_ATTENTION, packed_attention, packed_mask
from rqa.models.loading import choose_collate, hidden_states, load_causal_lm, load_model
from rqa.models.reader import CausalLMReader, read_prompts
from rqa.packing import answer_batch, answer_logits, pack
from rqa.prompts import TokenSequence
from rqa.runtime.errors import UserError
from rqa.runtime.parallelize import parallelize

VOCABULARY = 50
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
         "num_attention_heads": 4, "max_position_embeddings": 64, "pad_token_id": 0,
         "attention_dropout": 0.0}  # fmt: skip
ENDS = {"bos_token_id": 1, "eos_token_id": 2}
GROUPED = {**SIZES, **ENDS, "num_key_value_heads": 2}
DECODERS = {
    "Llama": transformers.LlamaConfig(**GROUPED),
    "Qwen2": transformers.Qwen2Config(**GROUPED),
    "Qwen3": transformers.Qwen3Config(**GROUPED, head_dim=4),
    "GPTNeoX": transformers.GPTNeoXConfig(**SIZES, **ENDS, hidden_dropout=0.0),
    "Mistral": transformers.MistralConfig(**GROUPED, sliding_window=4),
}
ALL = DECODERS | {
    "Bert": transformers.BertConfig(**SIZES, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
    "ModernBert": transformers.ModernBertConfig(**SIZES, **ENDS, local_attention=6, global_attn_every_n_layers=2),
}
SEQUENCES = [[5 + (7 * step + shift) % 40 for step in range(length)] for shift, length in enumerate((9, 1, 12, 9, 5))]


def build(config: PreTrainedConfig, implementation: str, head: str = "Model") -> PreTrainedModel:
    torch.manual_seed(0)
    model_class = getattr(transformers, type(config).__name__.replace("Config", head))
    return model_class._from_config(copy.deepcopy(config), attn_implementation=implementation).float()


def states(model: PreTrainedModel, **inputs: Tensor | int) -> Tensor:
    return model(**inputs, **({} if "Bert" in type(model).__name__ else {"use_cache": False})).last_hidden_state[0]


@pytest.mark.parametrize("name", ALL)
def test_a_packed_row_gives_the_states_and_gradients_of_its_sequences_without_a_mask_in_memory(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    masks = []

    def spy(module: torch.nn.Module, *args: Tensor | None, **kwargs: object) -> tuple[Tensor, None]:
        masks.append(args[3] if len(args) > 3 else kwargs["attention_mask"])
        assert kwargs["sequence_lengths"].values == kwargs["cu_seq_lens_q"].diff().tolist()  # no layer waits for these
        return packed_attention(module, *args, **kwargs)

    monkeypatch.setitem(transformers.AttentionInterface._global_mapping, PACKED_ATTENTION, spy)
    ours, theirs = build(ALL[name], PACKED_ATTENTION), build(ALL[name], "eager")
    for sequences in (SEQUENCES[2:3], SEQUENCES):  # one, longer than a window, is a packed row, too
        masks.clear()
        packed = states(ours, **pack(sequences).inputs)
        assert len(masks) == 2
        if len(sequences) > 1:
            assert all(mask is None or mask.untyped_storage().nbytes() == 1 for mask in masks)
        single = torch.cat([states(theirs, input_ids=torch.tensor([sequence])) for sequence in sequences])
        torch.testing.assert_close(packed, single, atol=2e-6, rtol=1e-5)
    weights = torch.randn_like(single)
    (packed * weights).sum().backward()
    (single * weights).sum().backward()
    for (parameter, our), (_, their) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        if their.grad is not None:
            torch.testing.assert_close(our.grad, their.grad, atol=2e-5, rtol=1e-4, msg=parameter)


def test_in_a_packed_row_no_attention_probability_is_dropped() -> None:
    config = transformers.BertConfig(**SIZES, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.5)
    model, batch = build(config, PACKED_ATTENTION), pack(SEQUENCES)
    torch.testing.assert_close(states(model.train(), **batch.inputs), states(model.eval(), **batch.inputs))


def naive(query: Tensor, key: Tensor, value: Tensor, borders: list[int], causal: bool, window: int | None) -> Tensor:
    """One query and one head at a time, in float64. -> [1, T, H, d]"""
    group = query.shape[1] // key.shape[1]
    rows = []
    for start, end in pairwise(borders):
        for at in range(start, end):
            others = range(start, at + 1 if causal else end)
            seen = [other for other in others if window is None or abs(at - other) < window]
            heads = []
            for head in range(query.shape[1]):
                scores = key[0, head // group, seen] @ query[0, head, at] / query.shape[-1] ** 0.5
                heads.append(scores.softmax(0) @ value[0, head // group, seen])
            rows.append(torch.stack(heads))
    return torch.stack(rows)[None]


def attend(
    inputs: list[Tensor], lengths: list[int], causal: bool, mask: Tensor | None = None, **more: object
) -> Tensor:
    borders = {"cu_seq_lens_q": torch.tensor([0, *lengths]).cumsum(0).int(), "max_length_q": max(lengths)}
    return packed_attention(SimpleNamespace(is_causal=causal), *inputs, attention_mask=mask, **borders, **more)[0]


def random_inputs(lengths: list[int], key_heads: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Query, key and value as models make them: views of [1, T, H, d]."""
    heads = (4, key_heads, key_heads)
    return [torch.randn(1, sum(lengths), H, 8, dtype=dtype).transpose(1, 2).requires_grad_() for H in heads]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("key_heads", [4, 2])
@pytest.mark.parametrize("causal", [True, False])
def test_attention_is_the_naive_loop_in_float64_forward_and_backward(
    causal: bool, key_heads: int, window: int | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "QUERY_ROWS", 4)  # lengths below, at, and across a block's border
    monkeypatch.setattr(attention, "LONGEST_WRITTEN_OUT", 10)
    monkeypatch.setattr(attention, "cpu_has_bf16", lambda: True)
    lengths = [5, 1, 4, 11, 5, 9]
    ours = random_inputs(lengths, key_heads, dtype)
    theirs = [x.detach().double().requires_grad_() for x in ours]
    output = attend(ours, lengths, causal, sliding_window=window)
    expected = naive(*theirs, torch.tensor([0, *lengths]).cumsum(0).tolist(), causal, window)
    weights = torch.randn_like(output)
    output.backward(weights)
    expected.backward(weights.double())
    tolerance = 5e-6 if dtype == torch.float32 else 6e-2
    for our, their in zip([output, *(x.grad for x in ours)], [expected, *(x.grad for x in theirs)], strict=True):
        assert our.dtype == dtype
        torch.testing.assert_close(our.double(), their, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("causal", [True, False])
def test_the_kernel_is_called_as_its_version_takes_it(
    causal: bool, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    takes = inspect.signature(varlen_attn)

    def kernel(*args: Any, **options: Any) -> Tensor:
        query, key, value, borders, same, longest, _ = args
        assert takes.bind(*args, **options)
        assert ("enable_gqa" in options) == ("enable_gqa" in takes.parameters)
        assert (same is borders, longest) == (True, 5)
        left, right = options["window_size"]
        assert right == (0 if causal else left)
        heads = (x.transpose(0, 1)[None] for x in (query, key, value))
        return naive(*heads, borders.tolist(), causal, None if left < 0 else left + 1)[0]

    inputs = random_inputs([4, 1, 5], 2)
    expected = attend(inputs, [4, 1, 5], causal, sliding_window=window)
    monkeypatch.setattr(attention, "varlen_attn", kernel)
    monkeypatch.setattr(attention, "_kernel_takes", lambda query, value: True)
    torch.testing.assert_close(attend(inputs, [4, 1, 5], causal, sliding_window=window), expected)


def test_the_kernel_gets_only_heads_that_it_knows_on_cards_that_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def taken(width: int, value_width: int = 0, size: int = 2, cuda: bool = True, capability: int = 9) -> bool:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (capability, 0))
        tensor = {"element_size": lambda: size, "is_cuda": cuda, "device": "cuda"}
        query, value = (SimpleNamespace(shape=(1, 2, 7, each), **tensor) for each in (width, value_width or width))
        return attention._kernel_takes(query, value)

    assert all([taken(64), taken(256), taken(8, capability=8)])
    assert not any([taken(20), taken(264), taken(64, 32), taken(64, size=4), taken(64, cuda=False)])
    assert not taken(64, capability=7)


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("name", DECODERS)
def test_generation_is_that_of_sdpa(name: str, padded: bool) -> None:
    prompts = torch.tensor([[7, 9, 11, 13, 15, 17], [0, 0, 0, 21, 23, 25]] if padded else [[7, 9, 11, 13, 15, 17]])
    static = transformers.StaticCache(DECODERS[name], max_cache_len=14)
    options = {"attention_mask": (prompts != 0).long(), "max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    tokens = [
        build(DECODERS[name], kind, "ForCausalLM").eval().generate(prompts, past_key_values=cache, **options).tolist()
        for kind, cache in ((PACKED_ATTENTION, None), (PACKED_ATTENTION, static), ("sdpa", None))
    ]
    assert len(tokens[0][0]) == 14
    assert tokens[0] == tokens[1] == tokens[2]


def reader_of(model: PreTrainedModel, most: int = 8) -> CausalLMReader:
    prompter = SimpleNamespace(stop_ids=[0], arguments=SimpleNamespace(max_new_tokens=most, max_seq_length=20))
    return CausalLMReader(model.eval(), prompter)


@pytest.mark.parametrize("name", DECODERS)
def test_under_autocast_keys_and_values_of_a_prompt_are_kept_in_its_dtype(name: str) -> None:
    reader = reader_of(build(DECODERS[name], PACKED_ATTENTION, "ForCausalLM"))
    with torch.no_grad():
        expected = torch.cat([reader.model(torch.tensor([ids])).logits[:, -1] for ids in SEQUENCES])
        with torch.autocast("cpu", torch.bfloat16):
            logits, states = read_prompts(reader.model, SEQUENCES, 20)
            assert len(reader.generate(SEQUENCES)) == len(SEQUENCES)
    torch.testing.assert_close(logits.float(), expected, atol=3e-2, rtol=3e-2)
    assert {kept.dtype for layer in states for kept in layer} == {torch.bfloat16}


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("name", ALL)
def test_a_batch_that_is_not_packed_is_that_of_sdpa(name: str, padded: bool) -> None:
    ids = torch.randint(3, VOCABULARY, (3 if padded else 1, 12))
    mask = {"attention_mask": (torch.arange(12) < torch.tensor([12, 7, 1])[:, None]).long()} if padded else {}
    ours, theirs = (states(build(ALL[name], kind), input_ids=ids, **mask) for kind in (PACKED_ATTENTION, "sdpa"))
    torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=1e-5)


def test_what_would_change_scores_is_refused() -> None:
    for argument in ("softcap", "s_aux", "position_bias", "cache"):
        with pytest.raises(NotImplementedError, match=argument):
            attend(random_inputs([3, 4], 2), [3, 4], causal=True, **{argument: 1.0})
    windowed = packed_mask(batch_size=1, q_length=7, kv_length=7, local_size=3, allow_is_causal_skip=False)
    with pytest.raises(NotImplementedError, match="only the mask defines"):
        attend(random_inputs([3, 4], 2), [3, 4], causal=True, mask=windowed)
    without_borders = {name: pack(SEQUENCES).inputs[name] for name in ("input_ids", "position_ids")}
    with pytest.raises(NotImplementedError, match="without cu_seq_lens_q"):
        states(build(DECODERS["Llama"], PACKED_ATTENTION), **without_borders)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["Llama", "Bert"])
def test_layers_are_compiled_once_for_rows_of_all_lengths_and_give_the_same(
    name: str, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend="aot_eager"))
    torch.compiler.reset()
    ours, theirs = (build(ALL[name], PACKED_ATTENTION).train() for _ in range(2))
    parallelize(ours, checkpointing, compile=True, shard=False, dtype=torch.float32)
    for number, last in enumerate((5, 2, 4, 3)):
        inputs = pack(SEQUENCES[:last]).inputs
        with torch.compiler.set_stance("fail_on_recompile" if number else "default"):
            packed, plain = states(ours, **inputs), states(theirs, **inputs)
            torch.testing.assert_close(packed, plain, atol=2e-6, rtol=1e-5)
            (packed.pow(3).sum() - plain.pow(3).sum()).backward()
        for (parameter, our), (_, their) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
            if their.grad is not None:
                torch.testing.assert_close(our.grad, -their.grad, atol=2e-5, rtol=1e-4, msg=parameter)


EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "num_local_experts": 4}
RANKS = {"q_lora_rank": 8, "kv_lora_rank": 8, "n_group": 1, "topk_group": 1, "n_routed_experts": 4}
LATENT = {"qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4, "num_key_value_heads": 4}
NARROW = {"head_dim": 4, "sliding_window": 4}
PLAIN = """Apertus Arcee BitNet Bloom Cohere DiffLlama Doge Falcon GPT2 GPTBigCode GPTNeoX Granite Llama Mamba Mpt
    Nemotron Olmo Olmo2 OPT Persimmon Phi Phi3 Qwen2 SmolLM3 StableLm Starcoder2"""
WINDOWED = """Cohere2 Cwm Ernie4_5 Exaone4 Gemma Gemma2 Gemma3 Glm Glm4 Helium HunYuanDenseV1 Mistral Olmo3 Qwen3
    SeedOss VaultGemma"""
GROUPS = ((PLAIN, {}), (WINDOWED, NARROW), ("GptOss GraniteMoe Mixtral Olmoe Phimoe Qwen3Moe", EXPERTS | NARROW),
          ("DeepseekV2 DeepseekV3", EXPERTS | RANKS | LATENT), ("CodeGen GPTJ", {"rotary_dim": 4}))  # fmt: skip
FAMILIES = {name: GROUPED | options for names, options in GROUPS for name in names.split()}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_of_decoders_is_packed_or_padded_and_generates_as_its_own_attention(
    name: str, tmp_path: Path
) -> None:
    config = getattr(transformers, f"{name}TextConfig" if name == "Gemma3" else f"{name}Config")(**FAMILIES[name])
    head = "LMHeadModel" if name == "GPT2" else "ForCausalLM"
    theirs = getattr(transformers, name + head)._from_config(config, attn_implementation="eager").eval()
    for weight in theirs.parameters():
        weight.data.normal_(0, 0.3) if weight.dim() > 1 else None
    theirs.save_pretrained(tmp_path)
    ours = load_causal_lm(str(tmp_path))
    collate = choose_collate(ours)
    with torch.no_grad():
        logits = answer_logits(ours, answer_batch([TokenSequence(ids, 1) for ids in SEQUENCES], collate))
        expected = torch.cat([theirs(torch.tensor([ids])).logits[0, :-1] for ids in SEQUENCES])
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    asked, read = SEQUENCES if name in DECODERS else SEQUENCES[2:4], []  # the first have one of a single token
    ours.get_input_embeddings().register_forward_pre_hook(lambda _, ids: read.append(tuple(ids[0].shape)))
    for ids, answer in zip(asked, reader_of(ours, 4).generate(asked), strict=True):
        alone = theirs.generate(torch.tensor([ids]), max_new_tokens=4, do_sample=False, eos_token_id=0)
        assert [*answer, 0][:4] == alone[0, len(ids) :].tolist()[:4]
    if name in DECODERS:  # prompts are one packed row
        assert read[-4:] == [(1, sum(map(len, asked))), *[(len(asked), 1)] * 3]


ENCODERS = """Albert Bart Bert BigBird Camembert Deberta DebertaV2 DistilBert Electra Ernie Esm EuroBert Gemma2
    Gemma3Text GptOss GPT2 IBert Llama Longformer MegatronBert ModernBert MPNet MT5 NomicBert OPT Qwen3 RemBert RoFormer
    Roberta SqueezeBert T5 XLM XLMRoberta"""
OWN = {"embedding_size": 16, "input_embedding_size": 16, "output_embedding_size": 16, "attention_window": 8, "d_kv": 4,
       "num_local_experts": 4, "mask_token_id": 4, "decoder_start_token_id": 2}  # fmt: skip


@pytest.mark.parametrize("name", ENCODERS.split())
def test_every_family_of_encoders_is_packed_or_padded_as_its_own_attention(
    name: str, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    options = GROUPED | NARROW | OWN
    config = getattr(transformers, f"{name}Config")(**options)
    kind = "EncoderModel" if name.endswith("T5") else "Model"
    theirs = getattr(transformers, name + kind)._from_config(config, attn_implementation="eager").eval()
    theirs.save_pretrained(tmp_path)
    ours = load_model(AutoModel, str(tmp_path))
    batch = choose_collate(ours)(SEQUENCES)
    assert "change with the padding" not in caplog.text
    with torch.no_grad():
        found = batch.real(hidden_states(ours, batch))
        alone = [theirs(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids))) for ids in SEQUENCES]
    torch.testing.assert_close(found, torch.cat([each.last_hidden_state[0] for each in alone]), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["FNet", "ConvBert"])
def test_a_model_whose_results_change_with_padding_is_named_once(
    name: str, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    config = getattr(transformers, f"{name}Config")(**SIZES | OWN)
    getattr(transformers, f"{name}Model")(config).save_pretrained(tmp_path)
    choose_collate(load_model(AutoModel, str(tmp_path)))
    told = f"model {tmp_path}: its results change with the padding of a batch; set --max_batch_tokens 1"
    assert caplog.text.count(told) == 1


def test_a_model_whose_layers_do_not_fit_together_is_one_line(tmp_path: Path) -> None:
    config = transformers.DeepseekV3Config(**FAMILIES["DeepseekV3"] | {"num_key_value_heads": 2})
    transformers.DeepseekV3ForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"model .*: cannot be run: The size of tensor a"):
        load_causal_lm(str(tmp_path))
