"""Loading models and tokenizers, LoRA adapters, and the check whether a model can be packed."""

import json
import logging
import math
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from copy import copy
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import is_flash_attn_2_available
from transformers.utils.logging import disable_progress_bar

from rqa.models.attention import PACKED_ATTENTION
from rqa.packing import Collate, TokenBatch, pack, pad
from rqa.runtime import distributed
from rqa.runtime.errors import UserError, one_line
from rqa.runtime.files import damage, fingerprint, is_complete, read_json
from rqa.runtime.flags import Arguments, flag
from rqa.runtime.parallelize import assembled

log = logging.getLogger(__name__)
disable_progress_bar()

# Names of tensors without effect here: poolers, BERT's next-sentence head, and buffers that older versions saved.
NOT_READ = r"(^|\.)pooler\.|seq_relationship|position_ids$|inv_freq$|\b(attn|attention)\.(masked_)?bias$"
# Names in a model's or adapter's configuration without effect on outputs.
UNDECIDING = "name_or_path|version|dtype|architectures|_attn_impl|use_cache|inference_mode|revision|auto_map"
WARM_START = "bert::"  # prefix of an encoder's name: both sides of an encoder-decoder are initialised from it


@dataclass(kw_only=True)
class LoadingArguments(Arguments):
    """Model loading and precision."""

    bf16: bool | None = flag(
        None, "Whether to compute in bfloat16. Default: false in training, else true if the hardware supports it."
    )
    dtype: str = flag(
        "auto", "Dtype of models that are not trained; auto: the dtype that they compute in.",
        ["auto", "float32", "bfloat16"], rare=True,
    )  # fmt: skip
    use_flash_attention: bool = flag(False, "Whether to use the flash-attn package (CUDA only).", rare=True)
    trust_remote_code: bool = flag(False, "Whether to run Python code from a checkpoint.", rare=True)

    @property
    def precision(self) -> torch.dtype:
        """The dtype of matrix products."""
        return distributed.compute_dtype(distributed.has_bf16() if self.bf16 is None else self.bf16, fp16=False)


def load_model(
    auto_class: Any,
    path: str,
    flags: LoadingArguments = LoadingArguments(dtype="float32"),
    dtype: torch.dtype | None = None,  # None: as for frozen models
    main_only: bool = False,
    new_layers: str = "",  # a pattern: names of tensors that the checkpoint may lack
    **config: Any,
) -> PreTrainedModel:
    """Load a checkpoint on this process's device, with flash-attn if asked for, else with our packed attention.

    A model that our attention does not support gets eager attention. Files must match the checkpoint's checksums, if it
    has any. The processes of a node load in turn, so that its memory holds only one model not yet on a device. With
    `main_only` only the main process reads weights; the others reserve memory, which `parallelize` fills. `path` is a
    directory or a hub name; `config` replaces values of the configuration.
    """
    attention = "flash_attention_2" if flags.use_flash_attention else PACKED_ATTENTION
    if flags.use_flash_attention and not is_flash_attn_2_available():
        advice = 'pip install "rqa[flash]" on a CUDA machine, or remove the flag'
        raise UserError(f"--use_flash_attention true: flash-attn is not installed or finds no CUDA device; {advice}")
    if problem := distributed.from_main(damage(path) if distributed.is_main() and is_complete(path) else None):
        raise UserError(f"model {path}: {problem}; copy it again, or use another checkpoint")
    reserve = main_only and not distributed.is_main()
    config |= {"device_map": "meta"} if reserve else {}
    dtype = dtype or (flags.precision if flags.dtype == "auto" else getattr(torch, flags.dtype))
    config |= {"dtype": dtype, "trust_remote_code": flags.trust_remote_code}
    config |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    kind = model_class(auto_class, load_config(path, flags.trust_remote_code))
    with nullcontext() if main_only else distributed.in_turn(), _reading(path):
        load = partial(kind.from_pretrained, base := base_of(path), **config)
        try:
            model, found = load(attn_implementation=attention)
            # A model that computes attention itself would add our boolean mask to its scores.
            supported = flags.use_flash_attention or model.is_backend_compatible()
        except (ValueError, KeyError):  # the model lacks this attention; any other error is raised again below
            supported = False
        if not supported:
            model, found = load(attn_implementation="eager")
        check_checkpoint(model, found, new_layers)
        if base != path:
            found = model.load_adapter(path, dtype=dtype, ignore_mismatched_sizes=True).to_dict()
            check_checkpoint(model, found)
        if reserve:
            model.to_empty(device=distributed.device()).tie_weights()
        model.to(distributed.device())
    embeddings: Any = getattr(model.base_model, "embeddings", None)
    if hasattr(embeddings, "create_position_ids_from_input_ids") and not model.config.is_decoder:
        embeddings.register_forward_pre_hook(_behind_padding, with_kwargs=True)
    two_sided = auto_class is transformers.AutoModelForSeq2SeqLM  # `load_encoder_decoder` sets attention
    probed = distributed.is_main() and not two_sided and not flags.use_flash_attention
    if distributed.from_main(probed and _refusal(model)):
        model.set_attn_implementation("eager")
        if reason := distributed.from_main(probed and _refusal(model)):
            raise UserError(f"model {path}: cannot be run: {reason}")
    return model


load_causal_lm = partial(load_model, transformers.AutoModelForCausalLM)  # a decoder


def _behind_padding(embeddings: Any, args: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Shift a packed row's positions as RoBERTa counts them: after the padding index, instead of from 0."""
    positions = named.get("position_ids")
    return args, named | ({} if positions is None else {"position_ids": positions + embeddings.padding_idx + 1})


def model_class(auto_class: Any, config: PreTrainedConfig) -> Any:
    """The class to load a checkpoint with; T5 as an encoder is loaded without its decoder."""
    encodes = auto_class is transformers.AutoModel and type(config) in transformers.MODEL_FOR_TEXT_ENCODING_MAPPING
    return transformers.AutoModelForTextEncoding if encodes else auto_class


def check_checkpoint(model: PreTrainedModel, found: dict[str, Any], new_layers: str = "") -> None:
    """Raise if a checkpoint lacks tensors of the model, or has others; poolers and other tasks' heads are ignored.

    `found` is the loading info of `transformers`; `new_layers` is a pattern of tensors that may be missing.
    """
    inner = "|".join(name for name, _ in model.base_model.named_children())  # all parts but heads
    unexpected = rf"^({model.base_model_prefix}\.)?({inner})\."
    head = "ForSequenceClassification" in type(model).__name__  # it reads the pooler
    not_read = NOT_READ.removeprefix(r"(^|\.)pooler\.|") if head else NOT_READ
    faults = {
        "missing": [name for name in found["missing_keys"] if not re.search(new_layers or "$^", name)],
        "unexpected": [name for name in found["unexpected_keys"] if re.search(unexpected, name)],
        "of another shape": [name for name, *_ in found["mismatched_keys"]],
    }
    for fault, names in faults.items():
        if names := [name for name in names if not re.search(not_read, name)]:
            advice = "download it again, or restore its original config.json"
            raise ValueError(f"{len(names)} of its tensors are {fault}, such as {min(names)}; {advice}")


@torch.no_grad()
def _refusal(model: PreTrainedModel) -> str | None:
    """Why the model cannot compute a padded batch, such as attention that caps scores; None if it can."""
    try:
        hidden_states(model, pad([[1] * 8, [1] * 5]).to(model.device))
    except Exception as error:
        return one_line(error)
    return None


def base_of(path: str) -> str:
    """The base model of the LoRA adapter at `path`; `path` itself if it is not an adapter."""
    adapter = Path(path, "adapter_config.json")
    return read_json(adapter)["base_model_name_or_path"] if adapter.exists() else path


def load_config(path: str, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The configuration of a checkpoint, or of a LoRA adapter's base model."""
    with _reading(path):
        return AutoConfig.from_pretrained(base_of(path), trust_remote_code=trust_remote_code)


def load_tokenizer(path: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint; raises if the model, if any, lacks embeddings for some tokens."""
    with _reading(path):
        tokenizer, rows = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code), math.inf
        with suppress(UserError, AttributeError):  # a tokenizer without a model
            rows = load_config(path, trust_remote_code).get_text_config(decoder=True).vocab_size
        # Gemma 3's tokenizer has an image token without an embedding, which text never contains.
        named = {getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "cls", "sep")}
        added = tokenizer.added_tokens_decoder.items()
        needed = [number + 1 for number, token in added if not token.special or number in named]
        if (size := max([tokenizer.vocab_size, *needed])) > rows:
            raise ValueError(f"its tokenizer has {size} tokens, its embedding {rows}; use this model's own tokenizer")
        return tokenizer


@contextmanager
def _reading(path: str) -> Iterator[None]:
    """Turn any error into one line about the checkpoint; for damaged files `transformers` raises nearly anything."""
    try:
        yield
    except Exception as error:
        reason = one_line(error)
        if not Path(path).exists() and (path.startswith((".", "/", "~")) or path.count("/") > 1):
            reason = "no such directory"
        elif not Path(path).exists() and ("offline" in reason.lower() or os.environ.get("HF_HUB_OFFLINE") == "1"):
            reason = f"no such directory, and no model hub can be reached ({reason})"
        raise UserError(f"model {path}: cannot be loaded: {reason}") from None


def choose_collate(model: PreTrainedModel, precision: torch.dtype | None = None) -> Collate:
    """`pack` if that is exact in `precision` (default: the model's dtype), else `pad`. Every process calls this."""
    # Only the main process's model is certain to have weights.
    if distributed.from_main(distributed.is_main() and batching_is_exact(model, precision)):
        return pack
    log.info("%s cannot be packed; batches are padded, sequences of similar length together", type(model).__name__)
    if distributed.is_main() and not batching_is_exact(model, precision, pad):
        advice = "set --max_batch_tokens 1 (in training --chunk_size 1), or use another model"
        log.warning("model %s: its results change with the padding of a batch; %s", model.name_or_path, advice)
    return pad


@torch.no_grad()
def batching_is_exact(model: PreTrainedModel, precision: torch.dtype | None = None, collate: Collate = pack) -> bool:
    """Whether a packed or padded batch gives the same as one sequence at a time, tried on a few tokens."""
    # Packing changes relative position biases, positions that do not start at 0 and state-space layers.
    half = len(model.get_input_embeddings().weight) // 2  # of the vocabulary; its first half has special tokens
    sequences = [[half + (3 * i + shift) % half for i in range(length)] for shift, length in ((0, 7), (1, 4), (2, 6))]
    dtype = precision or (torch.bfloat16 if "flash" in attention_of(model) else model.dtype)
    with evaluating(model), distributed.autocast(dtype), holding(lowered(model) if dtype is torch.bfloat16 else {}):
        try:
            found = (batch := collate(sequences).to(model.device)).real(hidden_states(model, batch))
        except (TypeError, ValueError, NotImplementedError, RuntimeError, IndexError) as error:
            if isinstance(error, TypeError) and "cu_seq_lens" not in str(error):  # a bug, not an unsupported batch
                raise
            log.info("a batch fails: %s", one_line(error))
            return False
        expected = torch.cat([hidden_states(model, pad([sequence]).to(model.device)) for sequence in sequences])
    # By norm, not by element: bfloat16 changes SmolLM2's largest values by more than the spread of all others.
    tolerance = torch.finfo(dtype).eps ** 0.5 * expected.float().norm()
    return found.shape == expected.shape and bool((found - expected).float().norm() <= tolerance)


def lowered(module: nn.Module) -> dict[nn.Parameter, Tensor]:
    """bfloat16 copies of the float32 weights of a module's models; sharded weights are left to FSDP2."""
    models = [part for part in module.modules() if isinstance(part, PreTrainedModel)]
    wide = dict.fromkeys(w for model in models for w in model.parameters() if w.dtype is torch.float32)
    return {weight: weight.detach().bfloat16() for weight in wide if not isinstance(weight, DTensor)}


@contextmanager
def holding(values: Mapping[nn.Parameter, Tensor]) -> Iterator[None]:
    """A context in which parameters have these values, of any dtype."""
    own = {parameter: parameter.data for parameter in values}
    try:
        for parameter, value in values.items():
            parameter.data = value.data
        yield
    finally:
        for parameter, value in own.items():
            parameter.data = value


def attention_of(model: PreTrainedModel) -> str:
    """The name of the attention function that a model was loaded with."""
    return model.config._attn_implementation or ""  # private: transformers has a public setter and no getter


def hidden_states(model: PreTrainedModel, batch: TokenBatch, **options: Any) -> Tensor:
    """The last layer's output, flattened; `options` go to the model. -> [rows, D]"""
    options |= {"use_cache": False} if getattr(model.config.get_text_config(), "use_cache", False) else {}
    return model.base_model(**batch.inputs, **options).last_hidden_state.flatten(0, 1)


def not_finite(model: nn.Module, what: str, text: str) -> UserError:
    """The error for a model whose answer, score or embedding is NaN or infinite."""
    names = [part.name_or_path for part in model.modules() if isinstance(part, PreTrainedModel)]
    reason = f"the {what} of {text[:60]!r} is not finite; its weights or adapter are damaged, or it needs --bf16 false"
    return UserError(f"model {next(filter(None, names), '')}: {reason}")


def freeze_pooler(model: PreTrainedModel) -> None:
    """Freeze BERT's pooler, which nothing here uses and weight decay would shrink."""
    if pooler := getattr(model, "pooler", None):
        pooler.requires_grad_(False)


def learned_positions(model: nn.Module) -> float:
    """The longest sequence that a model's table of positions allows; infinite without a table."""
    tables = [part for name, part in model.named_modules()
              if isinstance(part, nn.Embedding) and re.search("pos|wpe", name.rpartition(".")[2])]  # fmt: skip
    # RoBERTa's positions begin after the padding index, BART's and OPT's at an offset.
    before = [getattr(table, "offset", 0 if table.padding_idx is None else table.padding_idx + 1) for table in tables]
    fixed = [len(table) for name, table in model.named_buffers() if re.search(r"embed_positions$|pos_encoding$", name)]
    return min([table.num_embeddings - n for table, n in zip(tables, before, strict=True)] + fixed, default=math.inf)


def positions_of(model: nn.Module, unknown: float = math.inf) -> float:
    """The longest sequence that a model reads, by its position tables and configuration; `unknown` if neither says."""
    stated = max(getattr(model.config, "max_position_embeddings", None) or unknown, 0) or math.inf  # XLNet's is -1
    return min(learned_positions(model), stated)


def within_positions(model: nn.Module, flags: Any, name: str) -> Any:
    """The flags, with the length `name` lowered to the model's number of positions if needed."""
    limit, given, kind = learned_positions(model), getattr(flags, name), type(model).__name__
    if given > limit:
        log.warning("--%s %d: is lowered to %d tokens, for which %s has positions", name, given, limit, kind)
        setattr(flags := copy(flags), name, limit)
    return flags


def model_fingerprint(model: nn.Module, tokenizer: Any) -> str:
    """A hash of everything that determines outputs: weights rounded to bfloat16, configuration, tokenizer."""
    whole = (assembled(tensor.detach()) for tensor in model.state_dict().values())  # sharded or not
    tensors = ((t.bfloat16() if t.is_floating_point() else t).contiguous().cpu() for t in whole)
    weights = (tensor.flatten().view(torch.uint8).numpy().data for tensor in tensors)
    vocabulary = str(tokenizer)
    if tokenizer.is_fast:  # its state includes the last call's truncation and padding
        state = json.loads(tokenizer.backend_tokenizer.to_str()) | {"truncation": None, "padding": None}
        vocabulary = json.dumps(state, sort_keys=True)
    configs = [model.config] if isinstance(model, PreTrainedModel) else []
    stated = [config.to_dict() for config in (*configs, *getattr(model, "peft_config", {}).values())]
    stated += [{name: getattr(tokenizer, name) for name in ("chat_template", "special_tokens_map", "truncation_side")}]
    text = json.dumps(stated, default=lambda value: sorted(value) if isinstance(value, set) else str(value))
    decides = json.loads(text, object_hook=lambda d: {k: v for k, v in d.items() if not re.search(UNDECIDING, k)})
    kind = type(model).__name__.removeprefix("FSDP")  # FSDP2 adds this prefix
    return fingerprint(kind, json.dumps(decides, sort_keys=True), vocabulary, more=weights)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """A context in which the module is in eval mode; afterwards each of its parts has its former mode."""
    training = [part for part in module.modules() if part.training]
    for part in training:  # `module.eval()` takes as long as two layers on a question
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True


@dataclass(kw_only=True)
class LoraArguments(Arguments):
    """LoRA."""

    use_lora: bool = flag(False, "Whether to train low-rank adapters and freeze the model.")
    lora_r: int = flag(16, "Rank of the adapters.", rare=True)
    lora_alpha: int = flag(32, "LoRA alpha; adapters are scaled by alpha / rank.", rare=True)
    lora_dropout: float = flag(0.0, "Dropout of the adapters' input.", rare=True)
    lora_target_modules: list[str] = flag(["all-linear"], "Names of layers that get an adapter.", rare=True)
    merge_lora_on_save: bool = flag(False, "Whether output_dir gets the merged model, not the adapter.", rare=True)

    def check(self) -> None:
        self.check_bounds("lora_r", at_least=1)
        self.check_bounds("lora_dropout", at_least=0, below=1)
        if self.merge_lora_on_save and not self.use_lora:
            raise UserError("--merge_lora_on_save true: has no effect without --use_lora true; add it")


def train_adapters(model: PreTrainedModel, flags: LoraArguments, source: str) -> None:
    """With `--use_lora`, freeze the model and add adapters; if `source` is an adapter, continue training it."""
    present = getattr(model, "peft_config", None)
    if not flags.use_lora:
        if present:
            raise UserError(f"model {model.name_or_path}: is a LoRA adapter; add --use_lora true to train it further")
        return
    if not model.name_or_path:
        raise UserError("--use_lora true: the new layers of bert:: must be trained in full; remove the flag")
    if not find_spec("peft"):
        raise UserError('--use_lora true: peft is not installed; pip install "rqa[lora]"')
    from peft import LoraConfig, load_peft_weights, set_peft_model_state_dict

    if present:
        ((adapter, config),) = present.items()
        for name, saved in (("lora_r", config.r), ("lora_alpha", config.lora_alpha)):
            if getattr(flags, name) != saved:
                raise UserError(f"--{name} {getattr(flags, name)}: the adapter has {saved}; use that")
        model.set_adapter(adapter)
    else:
        targets = "all-linear" if flags.lora_target_modules == ["all-linear"] else flags.lora_target_modules
        numbers = {"r": flags.lora_r, "lora_alpha": flags.lora_alpha, "lora_dropout": flags.lora_dropout}
        config = LoraConfig(target_modules=targets, **numbers)
        try:
            model.add_adapter(config)
        except ValueError as error:
            raise UserError(f"--lora_target_modules {' '.join(flags.lora_target_modules)}: {one_line(error)}") from None
        if Path(model.name_or_path).is_dir():  # so that the base is found from any working directory
            config.base_model_name_or_path = str(Path(model.name_or_path).resolve())
    for weight in (weight for weight in model.parameters() if weight.requires_grad):
        weight.data = weight.data.float()  # peft creates them in the model's dtype
    if present:
        set_peft_model_state_dict(model, load_peft_weights(source, device="cpu"), adapter)  # in full precision


def merged(directory: str | Path, kind: type[PreTrainedModel]) -> PreTrainedModel:
    """The base model with the adapter in `directory` merged into it, in CPU memory."""
    from peft import PeftModel

    base = kind.from_pretrained(base_of(str(directory)), dtype=torch.float32)
    return PeftModel.from_pretrained(base, str(directory)).merge_and_unload()
