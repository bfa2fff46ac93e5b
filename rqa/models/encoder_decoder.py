"""Encoder-decoders: fusion-in-decoder (Izacard & Grave 2020), and its decoder's cross-attention to each passage.

Cross-attention is recorded without patching a model: an attention function registered as `rqa_recording` computes what
sdpa does and, within `passage_scores`, records scores and values.
"""

from collections.abc import Callable, Sequence
from contextvars import ContextVar, copy_context
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_outputs import BaseModelOutput

from rqa.data import Document, Example
from rqa.models import loading
from rqa.models.attention import PACKED_ATTENTION
from rqa.models.loading import WARM_START, LoadingArguments, hidden_states, load_model, load_tokenizer
from rqa.models.reader import GenerationArguments, LocalReader, Watch, generate
from rqa.packing import Batch, Collate, TokenBatch, pack, token_budget_batches
from rqa.prompts import DoesNotFit, cut, cut_history, cut_passages, fill, read_template, retrieval_query
from rqa.runtime.errors import UserError
from rqa.runtime.flags import flag
from rqa.runtime.parallelize import WholePass, in_step, is_sharded
from rqa.runtime.text import as_text

NEW_LAYERS = "crossattention|predictions|lm_head"  # new parameters of a warm start, which must learn faster
FASTER = 7  # factor of their learning rate; at this rate for all, the encoder's states would collapse
NEAR_ZERO = 0.1
RECORDING_ATTENTION = "rqa_recording"
IGNORED = -100  # the label of a position without loss
OVERFLOWING = ("t5", "mt5", "umt5", "longt5", "switch_transformers")
FID_TEMPLATE = "question: {question} context: {passage}"
LEAST_FULL = 0.8  # shortest sequence of a padded batch, as a share of its longest


@dataclass(kw_only=True)
class EncoderDecoderArguments(LoadingArguments):
    """The encoder-decoder's prompts."""

    prompt_template: str | None = flag(None, "Text file with {passage} and {question} that replaces the prompt.")
    max_encoder_seq_length: int = flag(512, "Tokens of the question and one passage, at most.")

    def check(self) -> None:
        self.check_bounds(*(name for name in vars(self) if name.endswith("seq_length")), at_least=2)


@dataclass(kw_only=True)
class FiDPromptArguments(EncoderDecoderArguments):
    """The encoder-decoder's answers."""

    max_decoder_seq_length: int = flag(256, "Tokens of a gold or generated answer, at most.")


@dataclass(frozen=True)
class FiDSequence:
    """Token ids of each passage's prompt, and of the answer with its end token."""

    passages: list[list[int]]
    answer: list[int]
    cut_more = False  # answers have a separate limit, so prompts are never cut for them


class FiDPrompter:
    """Builds the inputs of a fusion-in-decoder reader: one prompt per passage, and the answer."""

    length_flag = "--max_encoder_seq_length or --max_decoder_seq_length"

    def __init__(
        self, tokenizer: Any, arguments: EncoderDecoderArguments = FiDPromptArguments(), start_token: int | None = None
    ) -> None:
        self.tokenizer, self.arguments = tokenizer, arguments
        self.as_text = as_text(tokenizer)
        self.start_token = start_token  # removed from answers, since the decoder adds it
        self.template = read_template(self.arguments.prompt_template, FID_TEMPLATE)
        end = tokenizer.eos_token_id
        self.end_token = tokenizer.sep_token_id if end is None else end  # at the end of every answer
        if self.end_token is None:
            raise UserError("--model_name_or_path: the tokenizer has neither an end token nor a separator")
        self.stop_ids = [self.end_token]

    def encode(self, example: Example, passages: Sequence[Document], answer: str | None = None) -> FiDSequence:
        """Token ids of each passage's prompt, or of the question alone without passages; and of the answer if given."""
        limit = self.arguments.max_encoder_seq_length
        bare, kept = cut_history(self._prompt, example, limit)  # the oldest turns are cut first
        target = [] if answer is None else self._encode_answer(answer)
        for part, ids, side in (("question", bare, "encoder"), ("answer", target, "decoder")):
            if ids and len(ids) > (most := getattr(self.arguments, f"max_{side}_seq_length")):
                taken = f"the {part} takes {len(ids)} tokens, more than --max_{side}_seq_length {most}"
                raise DoesNotFit(f"{example.where or 'example'}: {taken}")
        texts = [passage.fmt_content for passage in passages]
        prompts = [cut_passages(partial(self._prompt, kept, text), len(text), limit) for text in texts]
        return FiDSequence(prompts or [bare], target)

    def decode(self, ids: Sequence[int]) -> str:
        """The answer's text from generated ids."""
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()

    def _encode_answer(self, answer: str) -> list[int]:
        ids = self.tokenizer(text_target=self.as_text(answer.strip()))["input_ids"]
        ids = ids[1:] if ids[:1] == [self.start_token] else ids
        return ids if ids[-1:] == [self.end_token] else [*ids, self.end_token]

    def _prompt(self, example: Example, passage: str = "", cap: int | None = None) -> list[int]:
        fields = {"passage": cut(passage, cap), "question": retrieval_query(example)}
        return self.tokenizer.encode(fill(self.template, {name: self.as_text(fields[name]) for name in fields}))


@dataclass(frozen=True)
class FiDBatch(Batch):
    """B questions with passages, which are encoded separately, and answers."""

    parts: tuple[TokenBatch, ...]  # the passages of all questions, grouped by length
    places: Tensor  # positions of the parts' real tokens among the B * S states. [T]
    owners: Tensor  # the number of each state's passage within its question, -1 for padding. [B, S]
    labels: Tensor  # answer tokens, -100 for padding. [B, L]
    positions: Tensor  # positions of answer tokens in the flattened labels. [N]
    most: int  # K, the most passages of a question
    indices: tuple[int, ...] = ()  # the examples' numbers in their file, for messages

    @property
    def weight(self) -> int:
        """Number of target tokens."""
        return len(self.positions)

    @property
    def num_tokens(self) -> int:
        """Number of real tokens of passages and answers."""
        return super().num_tokens + self.weight


def fid_batch(
    sequences: Sequence[FiDSequence], collate: Collate, indices: Sequence[int] = (), max_tokens: int = 16384
) -> FiDBatch:
    """Collate questions with their passages; each part has at most `max_tokens` tokens."""
    passages = [passage for sequence in sequences for passage in sequence.passages]
    lengths = [torch.tensor([len(passage) for passage in sequence.passages]) for sequence in sequences]
    answers = [torch.tensor(sequence.answer, dtype=torch.long) for sequence in sequences]
    numbers = [torch.arange(len(each)).repeat_interleave(each) for each in lengths]
    owners = pad_sequence(numbers, batch_first=True, padding_value=-1)  # [B, S]
    labels = pad_sequence(answers, batch_first=True, padding_value=IGNORED)  # [B, L]
    positions = (labels.flatten() != IGNORED).nonzero()[:, 0]
    flat, padded = torch.cat(lengths).tolist(), collate is not pack
    places = (owners.flatten() >= 0).nonzero()[:, 0].split(flat)  # for each passage
    chosen = token_budget_batches(flat, max_tokens, padded, LEAST_FULL if padded else 0.0)
    parts = tuple(collate([passages[i] for i in part]) for part in chosen)
    in_order = torch.cat([places[i] for part in chosen for i in part])
    return FiDBatch(parts, in_order, owners, labels, positions, max(map(len, lengths)), tuple(indices))


def load_encoder_decoder(
    path: str, flags: EncoderDecoderArguments, dtype: torch.dtype | None = None, main_only: bool = False
) -> tuple[PreTrainedModel, FiDPrompter]:
    """A model and its prompter; `bert::path` initialises both sides from a BERT-like model (Rothe et al. 2020)."""
    name = path.removeprefix(WARM_START)
    tokenizer = load_tokenizer(name, flags.trust_remote_code)
    load = partial(load_model, path=name, flags=flags, dtype=dtype, main_only=main_only)
    model = load(transformers.AutoModelForSeq2SeqLM) if path == name else _warm_start(name, tokenizer, load)
    if not flags.use_flash_attention:
        try:
            model.set_attn_implementation("sdpa")
            if model.get_encoder().is_backend_compatible():
                model.get_encoder().set_attn_implementation(PACKED_ATTENTION)
        except ValueError:  # T5Gemma caps attention scores
            model.set_attn_implementation("eager")
    flags = loading.within_positions(model.get_encoder(), flags, "max_encoder_seq_length")
    if isinstance(flags, FiDPromptArguments):
        flags = loading.within_positions(model.get_decoder(), flags, "max_decoder_seq_length")
    if flags.precision is torch.float16 and model.config.model_type in OVERFLOWING:
        raise UserError("--fp16 true: T5's activations overflow float16; use --bf16 true or neither")
    return model, FiDPrompter(tokenizer, flags, start_token(model))


def _warm_start(path: str, tokenizer: Any, load: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    tokens = {"decoder_start": tokenizer.cls_token_id, "eos": tokenizer.sep_token_id, "pad": tokenizer.pad_token_id}
    if None in tokens.values():
        raise UserError(f"--model_name_or_path {WARM_START}{path}: the tokenizer lacks [CLS], [SEP] or [PAD]")
    encoder = load(transformers.AutoModel)
    headless = encoder.config.architectures == [type(encoder).__name__]  # the checkpoint has no language-model head
    new = {"new_layers": NEW_LAYERS if headless else "crossattention"}
    decoder = load(transformers.AutoModelForCausalLM, **new, is_decoder=True, add_cross_attention=True)
    for layer in decoder.modules():
        if hasattr(layer, "crossattention"):  # starts as a copy of self-attention
            layer.crossattention.load_state_dict(layer.attention.state_dict())
    if headless:
        for name, module in decoder.named_modules():
            if isinstance(module, nn.Linear) and name.endswith(("predictions.transform.dense", "lm_head.dense")):
                # Start as the identity: the activation is linear near zero, and LayerNorm restores the scale.
                module.weight.data.copy_(NEAR_ZERO * torch.eye(*module.weight.shape))
                nn.init.zeros_(module.bias)
    model = transformers.EncoderDecoderModel(encoder=encoder, decoder=decoder)
    for config in (model.config, model.generation_config):
        for name, token in tokens.items():
            setattr(config, f"{name}_token_id", token)
    return model


def start_token(model: PreTrainedModel) -> int:
    """The token that the decoder starts from."""
    return int(model.prepare_decoder_input_ids_from_labels(torch.zeros(1, 1, dtype=torch.long))[0, 0])


def encode_passages(model: PreTrainedModel, batch: FiDBatch) -> dict[str, Any]:
    """The encoder states [B, S, D] of all passages of each question, as the decoder's keyword arguments."""
    encoder = model.get_encoder()
    parts = in_step(encoder, batch.parts, filler=replace(batch.parts[0], rows=batch.parts[0].rows[:0]))
    states = torch.cat([part.real(hidden_states(encoder, part)) for part in parts])  # [T, D]
    padded = states.new_zeros(batch.owners.numel(), states.shape[1]).index_copy(0, batch.places, states)
    padded = padded.view(*batch.owners.shape, -1)  # [B, S, D]
    mask = (batch.owners >= 0).long()  # [B, S]
    return {"encoder_outputs": BaseModelOutput(last_hidden_state=padded), "attention_mask": mask}


class FiD(WholePass):
    """An encoder-decoder that encodes the passages of each question separately."""

    whole_passes = ("generate",)

    def __init__(self, model: PreTrainedModel, precision: torch.dtype | None = None) -> None:
        super().__init__()
        self.model, self.collate = model, loading.choose_collate(model.get_encoder(), precision)

    def forward(self, batch: FiDBatch) -> tuple[Tensor, Tensor]:
        """Logits of the answer tokens, and these tokens. -> [N, V], [N]"""
        decoder_input_ids = self.model.prepare_decoder_input_ids_from_labels(labels=batch.labels)  # [B, L]
        output = self.model(**encode_passages(self.model, batch), decoder_input_ids=decoder_input_ids, use_cache=False)
        return output.logits.flatten(0, 1)[batch.positions], batch.labels.flatten()[batch.positions]

    def generate(self, batch: FiDBatch, config: transformers.GenerationConfig, watch: Watch | None = None) -> Tensor:
        """Generated tokens, without the start token; passages are encoded once. -> [B, new]"""
        synced = is_sharded(self.model)  # sharded processes must keep stepping until all are done
        passages = encode_passages(self.model, batch)
        return generate(self.model, config, 1, watch, **passages, synced_gpus=synced)


class FiDReader(LocalReader):
    """Answers questions over passages with an encoder-decoder."""

    def __init__(self, fid: FiD, prompter: FiDPrompter, flags: GenerationArguments) -> None:
        filler = FiDSequence([prompter.stop_ids], [])
        super().__init__(fid, prompter, flags, filler, prompter.arguments.max_decoder_seq_length)

    def cost(self, prompt: FiDSequence) -> int:
        return sum(map(len, prompt.passages))

    def new_tokens(self, prompts: Sequence[FiDSequence], most: int, watch: Watch | None) -> list[list[int]]:
        fid, start = self.model, start_token(self.model.model)
        config = self.flags.config(most, self.prompter.stop_ids, decoder_start_token_id=start)
        batch = fid_batch(prompts, fid.collate, max_tokens=self.flags.generation_batch_tokens).to(fid.model.device)
        return fid.generate(batch, config, watch).tolist()


_record: ContextVar[Callable[[Tensor, Tensor], None] | None] = ContextVar("record", default=None)


def recording_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """sdpa; but within `passage_scores`, attention of the decoded position is computed in steps and recorded.

    query: [B, H, 1, d]; key and value: [B, H_kv, S, d], where H_kv divides H; mask: True for visible keys.
    """
    record = _record.get()
    if record is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    scaling, softcap = kwargs.get("scaling"), kwargs.get("softcap")
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))  # [B, H, S, d]
    scores = query.float() @ key.float().mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)  # [B, H, 1, S]
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, float("-inf"))
    record(scores[:, :, 0], value)
    return (scores.softmax(-1).to(value.dtype) @ value).transpose(1, 2), None


transformers.AttentionInterface.register(RECORDING_ATTENTION, recording_attention)
AttentionMaskInterface.register(RECORDING_ATTENTION, sdpa_mask)


def observe(model: PreTrainedModel) -> None:
    """Switch the decoder to the attention that `passage_scores` records."""
    for part in model.get_decoder().modules():
        if isinstance(part, PreTrainedModel):  # `transformers` 5.17 skips parts with their own configuration
            part.set_attn_implementation(RECORDING_ATTENTION)


@torch.no_grad()
def passage_scores(model: PreTrainedModel, batch: FiDBatch, kind: str = "plain") -> Tensor:
    """Cross-attention of the first decoded position to each passage (Izacard & Grave 2020, section 3.2). -> [B, K]

    Scores are means over layers, heads and the passage's real tokens, in float32; -inf where a question has fewer
    passages. `plain` averages scores before the softmax, with the model's own scale; `value_norm` averages
    probabilities times the norm of the value (Izacard et al. 2022, Atlas, equation 3). Call `observe` first.
    """
    first = torch.full((len(batch.owners), 1), start_token(model), device=batch.owners.device)
    layers: list[Tensor] = []

    def record(scores: Tensor, value: Tensor) -> None:
        if scores.shape[-1] != batch.owners.shape[1]:
            return  # self-attention, over one position
        tokens = scores.softmax(-1) * value.float().norm(dim=-1) if kind == "value_norm" else scores  # [B, H, S]
        layers.append(tokens.mean(1))

    inputs = encode_passages(model, batch)
    recording = copy_context()
    recording.run(_record.set, record)
    recording.run(model, **inputs, decoder_input_ids=first, use_cache=False)
    assert layers, "no cross-attention was seen"
    values = torch.stack(layers).mean(0).masked_fill(batch.owners < 0, 0.0)  # padding scores -inf. [B, S]
    column = batch.owners + 1  # column 0 collects the padding, and is dropped
    zeros = values.new_zeros(len(values), batch.most + 1)
    sums, counts = (zeros.scatter_add(1, column, x) for x in (values, torch.ones_like(values)))
    return (sums / counts).masked_fill(counts == 0, float("-inf"))[:, 1:]
