"""Low-rank adapters (Hu et al. 2022) by `peft`: the base model stays as it is, and only they are trained and saved."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import PreTrainedModel

from rqa.runtime.errors import UserError, check_bounds, one_line

ADAPTER_CONFIG = "adapter_config.json"


@dataclass
class LoraArguments:
    """Whether adapters are trained instead of the whole model, and which."""

    use_lora: bool = field(default=False, metadata={"help": "Train low-rank adapters; the model itself is frozen."})
    lora_r: int = field(default=16, metadata={"help": "The adapters' rank."})
    lora_alpha: int = field(default=32, metadata={"help": "Their scale, times 1/rank."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout before them."})
    lora_target_modules: list[str] = field(
        default_factory=lambda: ["all-linear"], metadata={"help": "Names of the layers that get one, or all-linear."}
    )
    merge_lora_on_save: bool = field(
        default=False, metadata={"help": "Leave a plain model in output_dir; its checkpoints still hold adapters."}
    )

    def __post_init__(self) -> None:
        check_bounds(self, "lora_r", at_least=1)
        check_bounds(self, "lora_dropout", at_least=0, below=1)
        if self.merge_lora_on_save and not self.use_lora:
            raise UserError("--merge_lora_on_save true: there is nothing to merge without --use_lora true")


def train_adapters(model: PreTrainedModel, arguments: LoraArguments) -> None:
    """Freeze a model and give it adapters to train; those that it was loaded with are trained on.

    Raises:
        UserError: peft is missing, a target module does not exist, or the model has adapters of another kind.
    """
    present = getattr(model, "peft_config", None) if getattr(model, "_hf_peft_config_loaded", False) else None
    if not arguments.use_lora:
        if present:
            raise UserError(f"model {model.name_or_path}: is a LoRA adapter; train it on with --use_lora true")
        return
    if not model.name_or_path:
        raise UserError("--use_lora true: bert:: makes new layers, which must be trained whole; leave the flag out")
    require_peft("--use_lora true")
    if present:
        (name,) = present
        for flag, saved in (("lora_r", present[name].r), ("lora_alpha", present[name].lora_alpha)):
            if getattr(arguments, flag) != saved:
                raise UserError(f"--{flag} {getattr(arguments, flag)}: the adapter to train on has {saved}")
        model.set_adapter(name)
        return
    _add_adapters(model, arguments)


def _add_adapters(model: PreTrainedModel, arguments: LoraArguments) -> None:
    from peft import LoraConfig

    targets = arguments.lora_target_modules
    config = LoraConfig(
        r=arguments.lora_r,
        lora_alpha=arguments.lora_alpha,
        lora_dropout=arguments.lora_dropout,
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
