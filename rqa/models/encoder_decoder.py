"""What a reader attends to: its decoder's cross-attention at the first position, seen through public interfaces.

An attention function registered as `rqa_recording` does what sdpa does. While somebody records, it also shows every
cross-attention's query, keys and values. Nothing of a model is patched.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    EncoderDecoderModel,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_outputs import BaseModelOutput

from rqa.data import Document, Example
from rqa.models.attention import PACKED_ATTENTION
from rqa.models.loading import LoadingArguments, evaluating, hidden_states, load_model, load_tokenizer
from rqa.models.reader import GenerationArguments, LocalReader
from rqa.packing import IGNORED, Collate, FiDBatch, fid_batch, pad
from rqa.prompts import FiDPrompter, FiDSequence, PassagePromptArguments
from rqa.runtime.errors import UserError
from rqa.runtime.parallelize import in_step, is_sharded

WARM_START = "bert::"
NEW_LAYERS = "crossattention|predictions"  # parameters that a warm start begins anew, as a regular expression
NEAR_ZERO = 0.1
MAX_ENCODER_TOKENS = 16384
OVERFLOWING = ("t5", "mt5", "umt5", "longt5", "switch_transformers")


@dataclass(kw_only=True)
class EncoderDecoderArguments(LoadingArguments, PassagePromptArguments):
    """How an encoder-decoder is loaded and asked."""


def load_encoder_decoder(
    path: str, flags: EncoderDecoderArguments, dtype: torch.dtype = torch.float32, main_only: bool = False
) -> tuple[PreTrainedModel, FiDPrompter]:
    """An encoder-decoder, and what builds its inputs.

    Args:
        path: A directory or hub name; `bert::path` builds encoder and decoder from one BERT-like checkpoint (Rothe
            et al. 2020), whose cross-attention begins as the checkpoint's attention.
        dtype, main_only: As in `load_model`.
    """
    name = path.removeprefix(WARM_START)
    tokenizer = load_tokenizer(name, flags.trust_remote_code)
    if path.startswith(WARM_START):
        model = _warm_start(name, tokenizer, flags, dtype, main_only)
    else:
        model = load_model(AutoModelForSeq2SeqLM, name, flags, dtype, main_only)
    encoder = model.get_encoder()
    if not flags.use_flash_attention:
        _set_attention(model)
    for side, config in (("encoder", encoder.config), ("decoder", getattr(model.get_decoder(), "config", None))):
        limit, asked = getattr(config, "max_position_embeddings", None), getattr(flags, f"max_{side}_seq_length", None)
        if limit and asked and asked > limit:
            raise UserError(f"--max_{side}_seq_length {asked}: {name} takes at most {limit} tokens")
    return model, FiDPrompter(tokenizer, flags, start_token(model))


def _set_attention(model: PreTrainedModel) -> None:
    """Packed in the encoder, sdpa elsewhere; whatever cannot run so computes attention itself."""
    try:
        model.set_attn_implementation("sdpa")
    except ValueError:  # T5Gemma caps its scores
        model.set_attn_implementation("eager")
        return
    if model.get_encoder()._supports_attention_backend:
        model.get_encoder().set_attn_implementation(PACKED_ATTENTION)


def _warm_start(
    path: str, tokenizer: PreTrainedTokenizerBase, flags: LoadingArguments, dtype: torch.dtype, main_only: bool
) -> PreTrainedModel:
    if tokenizer.cls_token_id is None or tokenizer.sep_token_id is None or tokenizer.pad_token_id is None:
        raise UserError(f"--model_name_or_path {WARM_START}{path}: the tokenizer lacks [CLS], [SEP] or [PAD]")
    encoder = load_model(AutoModel, path, flags, dtype, main_only)
    decoder = load_model(AutoModelForCausalLM, path, flags, dtype, main_only, is_decoder=True, add_cross_attention=True)
    for layer in decoder.modules():
        if hasattr(layer, "crossattention"):  # attends to passages as to its own text, until it learns better
            layer.crossattention.load_state_dict(layer.attention.state_dict())
    if encoder.config.architectures == [type(encoder).__name__]:  # the checkpoint has no head that predicts tokens
        _see_through(decoder)
    model = EncoderDecoderModel(encoder=encoder, decoder=decoder)
    special = {
        "decoder_start_token_id": tokenizer.cls_token_id,
        "eos_token_id": tokenizer.sep_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    for config in (model.config, model.generation_config):
        for name, token in special.items():
            setattr(config, name, token)
    return model


@torch.no_grad()
def _see_through(decoder: PreTrainedModel) -> None:
    """Let a new head begin as the identity: its activation is linear near zero, its LayerNorm restores the scale."""
    for name, module in decoder.named_modules():
        if isinstance(module, nn.Linear) and name.endswith(("predictions.transform.dense", "lm_head.dense")):
            module.weight.copy_(NEAR_ZERO * torch.eye(*module.weight.shape))
            module.bias.zero_()


def refuse_overflow(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Raises:
    UserError: a T5 in float16.
    """
    if dtype is torch.float16 and model.config.model_type in OVERFLOWING:
        raise UserError("--fp16 true: T5's activations exceed what float16 can hold; use --bf16 true or neither")


def start_token(model: PreTrainedModel) -> int:
    """The token that the decoder starts from."""
    return int(model.prepare_decoder_input_ids_from_labels(torch.zeros(1, 1, dtype=torch.long))[0, 0])


def encode_passages(model: PreTrainedModel, batch: FiDBatch) -> dict[str, Any]:
    """The real tokens' states of all passages of each question, as the decoder's keyword arguments. -> [B, S, D]"""
    encoder = model.get_encoder()
    nothing = replace(pad([[0]]), lengths=torch.zeros(1, dtype=torch.long)).to(batch.owners.device)
    parts = in_step(encoder, batch.parts, filler=nothing)
    states = torch.cat([hidden_states(encoder, part)[part.rows] for part in parts])  # [T, D]
    padded = states.new_zeros(batch.owners.numel(), states.shape[1]).index_copy(0, batch.places, states)
    padded = padded.view(*batch.owners.shape, -1)  # [B, S, D]
    mask = (batch.owners >= 0).long()  # [B, S]
    return {"encoder_outputs": BaseModelOutput(last_hidden_state=padded), "attention_mask": mask}


class FiD(nn.Module):
    """An encoder-decoder that reads the passages of each question one by one.

    `forward` and `generate` are whole passes through encoder and decoder: what FSDP2 gathers weights around.
    """

    forward_methods = ("generate",)

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: FiDBatch) -> tuple[Tensor, Tensor]:
        """Next-token logits of the answers' tokens, and these tokens. -> [N, V], [N]"""
        decoder_input_ids = self.model.prepare_decoder_input_ids_from_labels(labels=batch.labels)  # [B, L]
        output = self.model(**encode_passages(self.model, batch), decoder_input_ids=decoder_input_ids, use_cache=False)
        real = batch.labels != IGNORED  # [B, L]
        return output.logits[real], batch.labels[real]

    @torch.no_grad()
    def generate(self, batch: FiDBatch, config: GenerationConfig) -> Tensor:
        """The answers' tokens behind the first one, passages encoded once. -> [B, new]"""
        synced = is_sharded(self.model)  # then a process that is done steps on until all are
        passages = encode_passages(self.model, batch)
        return self.model.generate(**passages, generation_config=config, synced_gpus=synced)[:, 1:]


class FiDReader(LocalReader[FiDSequence]):
    """Answers questions over passages with an encoder-decoder."""

    def __init__(self, fid: FiD, prompter: FiDPrompter, flags: GenerationArguments, collate: Collate) -> None:
        super().__init__(fid, prompter, flags)
        self.collate = collate

    def encode(self, example: Example, passages: Sequence[Document]) -> FiDSequence:
        return self.prompter.encode(example, passages)

    def cost(self, prompt: FiDSequence) -> int:
        return sum(map(len, prompt.passages))

    @property
    def filler(self) -> FiDSequence:
        return FiDSequence([[self.prompter.end_token]], [])

    def generate(self, prompts: Sequence[FiDSequence], max_new_tokens: int | None = None) -> list[list[int]]:
        fid, end = self.model, self.prompter.end_token
        size = max_new_tokens or self.prompter.arguments.max_decoder_seq_length
        config = self.flags.config(size, [end], decoder_start_token_id=start_token(fid.model))
        with evaluating(fid):
            batch = fid_batch(prompts, self.collate, self.max_batch_tokens).to(fid.model.device)
            answers = fid.generate(batch, config).tolist()
        return [ids[: ids.index(end)] if end in ids else ids for ids in answers]


RECORDING_ATTENTION = "rqa_recording"

Record = Callable[[Tensor, Tensor], None]
_record: ContextVar[Record | None] = ContextVar("record", default=None)


def recording_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention of one decoded position, written out and recorded; whatever nobody records goes to sdpa.

    Args:
        query: [B, H, 1, d]; key and value [B, H_kv, S, d], where H_kv divides H.
        attention_mask: True where a key is seen. [B, 1, 1, S]
    """
    record = _record.get()
    if record is None:
        kwargs |= {"scaling": scaling, "softcap": softcap}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))  # [B, H, S, d]
    scores = query.float() @ key.float().mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)  # [B, H, 1, S]
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, float("-inf"))
    record(scores[:, :, 0], value)
    return (scores.softmax(-1).to(value.dtype) @ value).transpose(1, 2), None


AttentionInterface.register(RECORDING_ATTENTION, recording_attention)
AttentionMaskInterface.register(RECORDING_ATTENTION, sdpa_mask)


def observe(model: PreTrainedModel) -> None:
    """Make the decoder's attention one that `passage_scores` sees."""
    model.get_decoder().set_attn_implementation(RECORDING_ATTENTION)


@torch.no_grad()
def passage_scores(model: PreTrainedModel, batch: FiDBatch, kind: str = "plain") -> Tensor:
    """How much the first decoded position attends to each passage (Izacard & Grave 2020, section 3.2). -> [B, K]

    The mean over layers, heads and the passage's real tokens, in float32; -inf where a question has fewer passages.

    Args:
        model: An encoder-decoder, observed.
        kind: `plain` takes the score before the softmax, with the model's own scale; `value_norm` the probability
            times the norm of the value (Izacard et al. 2022, Atlas, equation 3).
    """
    inputs = encode_passages(model, batch)
    first = torch.full((len(batch.owners), 1), start_token(model), device=batch.owners.device)
    layers: list[Tensor] = []

    def record(scores: Tensor, value: Tensor) -> None:
        if scores.shape[-1] != batch.owners.shape[1]:
            return  # the decoder's own, over one position
        tokens = scores.softmax(-1) * value.float().norm(dim=-1) if kind == "value_norm" else scores  # [B, H, S]
        layers.append(tokens.mean(1))

    with _recording(record):
        model(**inputs, decoder_input_ids=first, use_cache=False)
    assert layers, "no cross-attention was seen"
    tokens = torch.stack(layers).mean(0)  # [B, S]
    return mean_by_owner(tokens, batch.owners)


def mean_by_owner(values: Tensor, owners: Tensor) -> Tensor:
    """The mean of each passage's values; -inf for a passage that a question does not have. [B, S], [B, S] -> [B, K]"""
    column = owners + 1  # the padding's is dropped
    shape = (len(owners), int(column.max()) + 1)
    values = values.masked_fill(owners < 0, 0.0)  # padding scores -inf
    sums = values.new_zeros(shape).scatter_add(1, column, values)
    counts = values.new_zeros(shape).scatter_add(1, column, torch.ones_like(values))
    return (sums / counts).masked_fill(counts == 0, float("-inf"))[:, 1:]


@contextmanager
def _recording(record: Record) -> Iterator[None]:
    token = _record.set(record)
    try:
        yield
    finally:
        _record.reset(token)
