"""Checkpoints in, models and tokenizers out; and whether a model may be packed."""

import json
import logging
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import is_flash_attn_2_available
from transformers.utils.logging import disable_progress_bar

from rqa.models.attention import PACKED_ATTENTION
from rqa.packing import Collate, TokenBatch, pack, pad
from rqa.runtime import distributed
from rqa.runtime.errors import UserError, one_line
from rqa.runtime.files import fingerprint_of
from rqa.runtime.flags import Arguments, flag
from rqa.runtime.parallelize import assembled

log = logging.getLogger(__name__)
disable_progress_bar()

ADAPTER_CONFIG = "adapter_config.json"


@dataclass(kw_only=True)
class LoraArguments(Arguments):
    """LoRA: low-rank adapters instead of the whole model."""

    use_lora: bool = flag(False, "Whether to train low-rank adapters and freeze the model itself.")
    lora_r: int = flag(16, "Rank of the adapters.")
    lora_alpha: int = flag(32, "LoRA alpha; adapters are scaled by alpha / rank.", rare=True)
    lora_dropout: float = flag(0.0, "Dropout on the adapters' input.", rare=True)
    lora_target_modules: list[str] = flag(
        ["all-linear"], "Names of the layers that get an adapter, or all-linear.", rare=True
    )
    merge_lora_on_save: bool = flag(
        False, "Whether output_dir gets a plain model, with the adapters merged; checkpoints keep adapters."
    )

    def check(self) -> None:
        self.check_bounds("lora_r", at_least=1)
        self.check_bounds("lora_dropout", at_least=0, below=1)
        if self.merge_lora_on_save and not self.use_lora:
            raise UserError("--merge_lora_on_save true: there is nothing to merge without --use_lora true")


def train_adapters(model: PreTrainedModel, flags: LoraArguments) -> None:
    """Freeze a model and give it adapters to train; those that it was loaded with are trained on.

    Raises:
        UserError: peft is missing, a target module does not exist, or the model has adapters of another kind.
    """
    present = getattr(model, "peft_config", None) if getattr(model, "_hf_peft_config_loaded", False) else None
    if not flags.use_lora:
        if present:
            raise UserError(f"model {model.name_or_path}: is a LoRA adapter; train it on with --use_lora true")
        return
    if not model.name_or_path:
        raise UserError("--use_lora true: bert:: makes new layers, which must be trained whole; leave the flag out")
    require_peft("--use_lora true")
    if present:
        (adapter,) = present
        for name, saved in (("lora_r", present[adapter].r), ("lora_alpha", present[adapter].lora_alpha)):
            if getattr(flags, name) != saved:
                raise UserError(f"--{name} {getattr(flags, name)}: the adapter to train on has {saved}")
        model.set_adapter(adapter)
        return
    _add_adapters(model, flags)


def _add_adapters(model: PreTrainedModel, flags: LoraArguments) -> None:
    from peft import LoraConfig

    targets = flags.lora_target_modules
    config = LoraConfig(
        r=flags.lora_r,
        lora_alpha=flags.lora_alpha,
        lora_dropout=flags.lora_dropout,
        target_modules=targets[0] if targets == ["all-linear"] else targets,
    )
    try:
        model.add_adapter(config)
    except ValueError as error:
        raise UserError(f"--lora_target_modules {' '.join(targets)}: {one_line(error)}") from None
    if model.name_or_path and Path(model.name_or_path).is_dir():  # the adapter is of use from any working directory
        config.base_model_name_or_path = str(Path(model.name_or_path).resolve())


def merged(directory: str | Path, kind: type[PreTrainedModel]) -> PreTrainedModel:
    """The plain model that an adapter directory and its base amount to, in CPU memory."""
    from peft import PeftConfig, PeftModel

    base = kind.from_pretrained(PeftConfig.from_pretrained(str(directory)).base_model_name_or_path, dtype=torch.float32)
    return PeftModel.from_pretrained(base, str(directory)).merge_and_unload()


def require_peft(reason: str) -> None:
    """Raises:
    UserError: peft is not installed.
    """
    try:
        import peft  # noqa: F401
    except ImportError:
        raise UserError(f'{reason}: peft is not installed; pip install "rqa[lora]"') from None


@dataclass(kw_only=True)
class LoadingArguments(Arguments):
    """How models are loaded, and what they compute in."""

    bf16: bool = flag(False, "Whether to compute in bfloat16, on CUDA and on CPUs that multiply it.")
    use_flash_attention: bool = flag(False, "Whether the flash-attn package computes attention (CUDA only).")
    trust_remote_code: bool = flag(False, "Whether to run Python code that a checkpoint brings.", rare=True)

    @property
    def dtype(self) -> torch.dtype:
        """What matrix products run in."""
        return distributed.compute_dtype(self.bf16, fp16=False)

    def autocast(self) -> AbstractContextManager:
        return distributed.autocast(self.dtype)


def load_model(
    auto_class: Any,
    path: str,
    flags: LoadingArguments = LoadingArguments(),
    dtype: torch.dtype = torch.float32,
    main_only: bool = False,
    **config: Any,
) -> PreTrainedModel:
    """Load a checkpoint on this process's device, with packed attention: flash-attn's kernel when asked, else ours.

    The processes of a node load in turn, so that its memory holds one whole model at a time beside those on devices.

    Args:
        auto_class: A class of `transformers` with `from_pretrained`, such as `AutoModelForCausalLM`.
        path: A directory, or a hub name.
        dtype: What the weights are stored in.
        main_only: The main process alone reads weights; the others reserve memory that `parallelize` fills.
        config: Values that replace those of the checkpoint's configuration.
    """
    if flags.use_flash_attention and not is_flash_attn_2_available():
        raise UserError(
            "--use_flash_attention true: flash-attn is not installed or finds no CUDA device; "
            'pip install "rqa[flash]" on a CUDA machine, or leave the flag out'
        )
    if (Path(path) / ADAPTER_CONFIG).exists():
        require_peft(f"model {path}: is a LoRA adapter")
    empty = main_only and not distributed.is_main()
    config |= {"dtype": dtype, "trust_remote_code": flags.trust_remote_code}
    config |= {"device_map": "meta"} if empty else {}
    with nullcontext() if main_only else distributed.in_turn():
        for attention in ("flash_attention_2" if flags.use_flash_attention else PACKED_ATTENTION, "eager"):
            try:
                model = auto_class.from_pretrained(path, attn_implementation=attention, **config)
                # A model that computes attention itself adds the mask to its scores, and ours is true and false.
                if attention != PACKED_ATTENTION or model._supports_attention_backend:
                    return _reserve(model) if empty else model.to(distributed.device())
            except ValueError as error:
                if attention == "eager" or "attention" not in str(error).lower():
                    raise _unreadable(path, error) from None
            except (OSError, KeyError, ImportError, RuntimeError, SafetensorError, UnpicklingError) as error:
                raise _unreadable(path, error) from None
    raise AssertionError("unreachable")


def _reserve(model: PreTrainedModel) -> PreTrainedModel:
    """A model on the meta device with memory on this process's, whatever it holds."""
    model.to_empty(device=distributed.device())
    model.tie_weights()
    return model


def is_encoder_decoder(path: str, trust_remote_code: bool = False) -> bool:
    """Whether a checkpoint, or the one that a LoRA adapter belongs to, is an encoder-decoder.

    Raises:
        UserError: it cannot be found or read.
    """
    try:
        adapter = Path(path) / ADAPTER_CONFIG
        name = json.loads(adapter.read_text(encoding="utf-8"))["base_model_name_or_path"] if adapter.exists() else path
        return AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code).is_encoder_decoder
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise _unreadable(path, error) from None


def load_tokenizer(path: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load a tokenizer.

    Raises:
        UserError: it cannot be found or read.
    """
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # the tokenizers library raises bare Exception
        raise _unreadable(path, error) from None


def _unreadable(path: str, error: Exception) -> UserError:
    reason = one_line(error)
    if not Path(path).exists() and (path.startswith((".", "/", "~")) or path.count("/") > 1):
        reason = "no such directory"
    elif not Path(path).exists() and ("offline" in reason.lower() or os.environ.get("HF_HUB_OFFLINE") == "1"):
        reason = f"no such directory, and no model hub can be reached ({reason})"
    return UserError(f"model {path}: cannot be loaded: {reason}")


def choose_collate(model: PreTrainedModel, pad_id: int | None) -> Collate:
    """How batches for this model are built: packed if that gives what one sequence at a time gives, else padded.

    Relative position biases, positions that do not start at 0 and state-space layers show up as a difference. Nothing
    is assumed from the architecture's name. Every process calls this, and the main process decides: its model has
    weights.
    """
    if distributed.from_main(distributed.is_main() and packing_is_exact(model)):
        return pack
    log.info("%s cannot be packed; padded batches of similar length serve instead", type(model).__name__)
    return partial(pad, pad_id=pad_id or 0)


@torch.no_grad()
def packing_is_exact(model: PreTrainedModel) -> bool:
    """Whether a packed row gives what one sequence at a time gives; runs a few tokens both ways."""
    vocabulary = len(model.get_input_embeddings().weight)
    sequences = [[vocabulary // 2 + (3 * step + shift) % (vocabulary // 2) for step in range(length)]
                 for shift, length in ((0, 7), (1, 4), (2, 6))]  # fmt: skip
    dtype = torch.bfloat16 if "flash" in (model.config._attn_implementation or "") else model.dtype
    with evaluating(model), distributed.autocast(dtype):
        try:
            packed = hidden_states(model, pack(sequences).to(model.device))
        except (TypeError, ValueError, NotImplementedError, RuntimeError, IndexError):
            return False
        single = [hidden_states(model, pad([sequence]).to(model.device)) for sequence in sequences]
    expected = torch.cat(single)
    if packed.shape != expected.shape:
        return False
    tolerance = torch.finfo(dtype).eps ** 0.5 * expected.float().std()
    return bool((packed - expected).abs().max() <= tolerance)


def freeze_pooler(model: PreTrainedModel) -> None:
    """BERT has a layer behind its last one that nothing here depends on; DDP would wait for its gradient."""
    if pooler := getattr(model, "pooler", None):
        pooler.requires_grad_(False)


def hidden_states(model: PreTrainedModel, batch: TokenBatch, **options: Any) -> Tensor:
    """The last layer's output, flattened; options go to the model. -> [rows, D]"""
    options |= {"use_cache": False} if model.can_generate() else {}
    output = model.base_model(**batch.inputs, **options)
    return output.last_hidden_state.flatten(0, 1)


def model_fingerprint(model: nn.Module, tokenizer: Any) -> str:
    """A hash of a model's weights, also of divided ones, and of its tokenizer."""
    tensors = (assembled(tensor.detach()).contiguous().cpu() for tensor in model.state_dict().values())
    weights = (tensor.flatten().view(torch.uint8).numpy().data for tensor in tensors)
    rules = str(tokenizer)
    if tokenizer.is_fast:  # it remembers the last call's truncation and padding, which decide nothing
        state = json.loads(tokenizer.backend_tokenizer.to_str()) | {"truncation": None, "padding": None}
        rules = json.dumps(state, sort_keys=True)
    return fingerprint_of(chain([rules], weights))


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put a module in eval mode, and afterwards each of its parts back in the mode it was in."""
    training = [part for part in module.modules() if part.training]
    if training:
        module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True
