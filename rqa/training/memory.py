"""Memory that a training run needs on each device, estimated from its flags: `--estimate_memory true`.

The model is built without values, on PyTorch's meta device, and run once, to measure its parameters and the tensors
that autograd saves for the backward pass. Every text is assumed to be as long as the flags allow.
"""

import inspect
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM
from transformers.modeling_layers import GradientCheckpointingLayer

from rqa.models.loading import (
    WARM_START,
    freeze_pooler,
    learned_positions,
    load_config,
    model_class,
    positions_of,
    train_adapters,
)
from rqa.runtime import distributed

FUSED_ATTENTION = "rqa_fused"  # saves queries, keys, values and output, as every fused kernel does
# Bytes of a trained parameter: weight, master weight, gradients, moments (8 bits: with a float32 scale for each 256).
FLOAT32, BF16, EIGHT_BITS = (4, 0, 4, 8), (2, 4, 4, 8), (2, 0, 2, 2 + 2 * 4 / 256)


def _fused(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
    return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0].transpose(1, 2), None


transformers.AttentionInterface.register(FUSED_ATTENTION, _fused)


def estimate(flags: Any, trains_retriever: bool) -> str:
    """A table of GiB on each device for a trainer's flags."""
    about, terms = needs(flags, trains_retriever)
    terms["in total; add 1 to 2 for CUDA and its allocator"] = sum(terms.values())
    if torch.cuda.is_available():
        terms[torch.cuda.get_device_name()] = torch.cuda.get_device_properties(0).total_memory
    return "\n".join([about, *(f"{size / 2**30:8.2f}  {name}" for name, size in terms.items() if size)])


def needs(flags: Any, trains_retriever: bool) -> tuple[str, dict[str, float]]:
    """A description of model and batch, and bytes by purpose."""
    model, width = _unloaded(flags.model_name_or_path, flags, trains_retriever), 2 if flags.bf16 else 4
    train_adapters(model, flags, flags.model_name_or_path)
    freeze_pooler(model.to(model.dtype))  # training will lower the float32 adapters to this dtype, too
    whole, trained = model.num_parameters(), model.num_parameters(only_trainable=True)
    shard = flags.fsdp == "full_shard"
    processes = distributed.world_size() if shard else 1
    sizes = FLOAT32 if shard or not flags.bf16 else EIGHT_BITS if flags.optim == "adamw_8bit" else BF16
    names = "weights", "master weights", "gradients", "moments"
    terms = {name: size * trained / processes for name, size in zip(names, sizes, strict=True)}
    terms["weights"] += width * (whole - trained) / processes
    layers = [layer for layer in model.modules() if isinstance(layer, GradientCheckpointingLayer)]
    if shard:  # weights and gradients of two layers, since the next is prefetched
        counts = [sum(parameter.numel() for parameter in layer.parameters()) for layer in layers]
        terms["gathered layers"] = 2 * width * (whole - sum(counts) + 2 * max(counts, default=0))
    batch, terms["activations"] = _activations(model, len(layers), flags, trains_retriever)
    for name in ("lm_model_path", "reader_model_path", "embedding_model", "reranker"):
        path = getattr(flags, name, None)
        if path and path != "bm25" and not path.startswith("openai::"):
            size = width if flags.dtype == "auto" else getattr(torch, flags.dtype).itemsize
            place = path.removeprefix("reranker::")
            encodes = name in ("embedding_model", "reranker") or place != path
            terms[f"{path}, frozen"] = size * _unloaded(place, flags, encodes).num_parameters()
    return f"GiB on each device: {whole / 1e9:.2f} billion parameters, {trained / 1e9:.2f} trained, on {batch}", terms


def _unloaded(path: str, flags: Any, is_retriever: bool) -> Any:
    """The model at `path` without values, in the dtype that it computes in; only its config.json is read."""
    config = load_config(path.removeprefix(WARM_START), flags.trust_remote_code)
    if path.startswith(WARM_START):
        config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(config, config)
    reader = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    kind = model_class(AutoModel, config) if is_retriever else reader
    dtype = torch.bfloat16 if flags.bf16 else torch.float32
    build = partial(kind.from_config, config, dtype=dtype, trust_remote_code=flags.trust_remote_code)
    with torch.device("meta"):
        try:
            return build(attn_implementation=FUSED_ATTENTION)
        except (ValueError, KeyError):
            return build(attn_implementation="eager")


def _activations(model: Any, layers: int, flags: Any, trains_retriever: bool) -> tuple[str, float]:
    """A description of a micro-batch, and the bytes that its forward pass saves, with the gradient of its logits."""
    given, B, answer = vars(flags).get, flags.per_device_train_batch_size, 0
    fusion = not trains_retriever and model.config.is_encoder_decoder
    if trains_retriever:
        other = given("num_other_gold")  # RERANK only, whose texts are questions with passages
        hard = given("num_hard_negatives") or given("hard_neg_ratio")
        documents = given("num_docs") or given("n_context") or 1 + hard + (other or 0)
        longest = flags.max_passage_length if other is None else flags.max_pair_length
        length = longest or min(positions_of(model, unknown=512), 512)
        rows = min(int(B * documents), given("chunk_size") or 2**32)
    elif fusion:
        rows, length = B * (flags.embedding_max_num_to_retrieve + 1), flags.max_encoder_seq_length
        answer = flags.max_decoder_seq_length
    else:
        rows, length, answer = B, flags.max_seq_length, flags.max_new_tokens
    length = int(min(length, learned_positions(model)))
    zeros, kept = partial(torch.zeros, dtype=torch.long, device="meta"), []
    inputs = {"input_ids": zeros(rows, length), "attention_mask": zeros(rows, length)}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        inputs["logits_to_keep"] = answer
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda nothing: nothing):
        if fusion:
            states = model.get_encoder()(**inputs).last_hidden_state.unflatten(0, (B, -1)).flatten(1, 2)  # [B, S, D]
            inputs = {"encoder_outputs": (states,), "decoder_input_ids": zeros(B, answer), "use_cache": False}
        logits = model(**inputs).get("logits", torch.empty(0))
    own = {weight.untyped_storage()._cdata for weight in (*model.parameters(), *model.buffers())}
    sizes = {storage._cdata: storage.nbytes() for storage in map(Tensor.untyped_storage, kept)}
    size = sum(nbytes for storage, nbytes in sizes.items() if storage not in own)
    if flags.gradient_checkpointing and layers:  # saves each layer's input, and recomputes one layer at a time
        size = size / layers + layers * rows * length * model.get_input_embeddings().weight[0].nbytes
    size += 2 * logits.nbytes + 8 * logits.numel()  # their softmax and its gradient are float32
    return f"{rows} x {length} tokens" + f", answers of {answer}" * bool(answer), size
