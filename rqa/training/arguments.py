"""The training loop's flags, named as in Hugging Face's TrainingArguments."""

import re
from dataclasses import dataclass
from importlib.util import find_spec

import torch

from rqa.models.loading import LoadingArguments, LoraArguments
from rqa.runtime.distributed import compute_dtype
from rqa.runtime.errors import UserError
from rqa.runtime.flags import RESULTS, Arguments, flag

SCHEDULES = ["linear", "cosine", "constant", "constant_with_warmup"]
STRATEGIES = ["no", "steps", "epoch"]


@dataclass(kw_only=True)
class OptimizerArguments(Arguments):
    """The optimizer and its learning rate."""

    optim: str = flag(
        "adamw", "Optimizer; adamw_8bit (with bf16) needs 6 bytes per parameter, not 18, and sums gradients in bf16.",
        choices=["adamw", "adamw_8bit"], rare=True,
    )  # fmt: skip
    learning_rate: float | None = flag(
        None,
        "Peak learning rate. Default: by width and batch size, 1e-4 at 384 and 64; times 4 for readers, 10 for LoRA.",
    )
    new_layers: str | None = flag(None, "Regular expression of parameters with their own learning rate.", rare=True)
    new_layers_learning_rate: float | None = flag(None, "Peak learning rate of new_layers' parameters.", rare=True)
    lr_scheduler_type: str = flag("linear", "Learning-rate schedule after the warm-up.", SCHEDULES, rare=True)
    warmup_ratio: float = flag(0.0, "Share of all steps during which the learning rate rises from 0 to its peak.")
    warmup_steps: int = flag(0, "Warm-up steps; a positive number replaces warmup_ratio.", rare=True)
    weight_decay: float = flag(0.0, "AdamW's weight decay; biases and normalisation weights do not decay.", rare=True)
    adam_beta1: float = flag(0.9, "AdamW's decay rate for the first moment.", rare=True)
    adam_beta2: float = flag(0.999, "AdamW's decay rate for the second moment.", rare=True)
    adam_epsilon: float = flag(1e-8, "AdamW's epsilon.", rare=True)
    max_grad_norm: float = flag(1.0, "Gradient norm above which gradients are clipped; 0: no clipping.", rare=True)

    def check(self) -> None:
        amounts = ("learning_rate", "new_layers_learning_rate", "weight_decay", "adam_epsilon", "max_grad_norm")
        self.check_bounds(*amounts, "warmup_steps", at_least=0)
        self.check_bounds("warmup_ratio", at_least=0, at_most=1)
        self.check_bounds("adam_beta1", "adam_beta2", at_least=0, below=1)
        if (self.new_layers is None) != (self.new_layers_learning_rate is None):
            raise UserError("--new_layers: belongs with --new_layers_learning_rate; give both or neither")
        try:
            re.compile(self.new_layers or "")
        except re.error as error:
            raise UserError(f"--new_layers {self.new_layers}: is not a regular expression ({error})") from None


@dataclass(kw_only=True)
class DeviceArguments(LoadingArguments):
    """Memory and speed on the device."""

    fp16: bool = flag(False, "Whether to compute in float16 with a loss scaler (CUDA only).", rare=True)
    gradient_checkpointing: bool = flag(False, "Whether to recompute activations, which saves memory and costs time.")
    torch_compile: bool = flag(False, "Whether to compile the model's layers with torch.compile.", rare=True)
    deterministic: bool = flag(False, "Whether to use deterministic CUDA kernels, which are slower.", rare=True)
    fsdp: str = flag("no", "FSDP2; full_shard divides the model among processes.", choices=["no", "full_shard"])

    @property
    def precision(self) -> torch.dtype:
        return compute_dtype(bool(self.bf16), self.fp16)

    def check(self) -> None:
        if self.use_flash_attention and not (self.bf16 or self.fp16):
            raise UserError("--use_flash_attention true: needs half precision; add --bf16 true")
        if self.fsdp != "no" and self.fp16:
            raise UserError("--fp16 true: is not supported with --fsdp full_shard; use --bf16 true")


@dataclass(kw_only=True)
class JournalArguments(Arguments):
    """Logs, evaluations and checkpoints."""

    logging_steps: int = flag(10, "Steps between two log lines.")
    eval_strategy: str = flag("steps", "When to evaluate on eval_file.", choices=STRATEGIES, also="evaluation_strategy")
    eval_steps: int | None = flag(
        None,
        "Steps between two evaluations. Default: a quarter of all, at most 100; all if the last model is kept.",
    )
    eval_max_examples: int = flag(0, "Questions to evaluate on, a fixed random subset of eval_file; 0: all.", rare=True)
    save_strategy: str = flag("steps", "When to save a checkpoint.", choices=STRATEGIES, rare=True)
    save_steps: int = flag(500, "Steps between two checkpoints.")
    save_total_limit: int = flag(2, "Newest checkpoints to keep, besides the best one.")
    metric_for_best_model: str | None = flag(None, "Metric that chooses the best model. Default: the executable's own.")
    greater_is_better: bool | None = flag(
        None, "Whether a higher metric_for_best_model is better. Default: false for losses, true otherwise.", rare=True
    )
    load_best_model_at_end: bool | None = flag(
        None, "Whether output_dir gets the best model, not the last. Default: true, unless fewer than 30 questions "
        "rank passages.", rare=True,
    )  # fmt: skip
    write_predictions: bool = flag(False, "Whether to write the predictions of each evaluation as JSONL.", rare=True)
    report_to: str = flag("none", "Experiment tracker.", choices=["none", "tensorboard", "wandb", "trackio"], rare=True)
    run_project: str = flag("rqa", "Project name for the tracker.", rare=True)
    run_group: str | None = flag(None, "Group of runs for the tracker.", rare=True)

    def check(self) -> None:
        self.check_bounds("logging_steps", "eval_steps", "save_steps", "save_total_limit", at_least=1)
        self.check_bounds("eval_max_examples", at_least=0)


@dataclass(kw_only=True)
class LoopArguments(OptimizerArguments, DeviceArguments, LoraArguments, JournalArguments):
    """The run: its directory, batches and length."""

    output_dir: str = flag(help="Directory for the best model, checkpoints, logs and scores.")
    overwrite_output_dir: bool = flag(False, "Whether to start over in an output_dir that holds a run.")
    resume_from_checkpoint: str | None = flag(None, "Checkpoint to continue from: a path, or true for the newest.")
    seed: int = flag(42, "Random seed of data order, dropout and new weights.", rare=True)
    per_device_train_batch_size: int = flag(8, "Examples in one forward pass of training.")
    per_device_eval_batch_size: int = flag(
        8, "Examples in one forward pass that measures the evaluation loss (readers).", rare=True
    )
    gradient_accumulation_steps: int = flag(1, "Forward passes in one optimizer step.")
    num_train_epochs: float = flag(3.0, "Passes over the training file.")
    max_steps: int = flag(-1, "Number of optimizer steps; -1: set by num_train_epochs.")
    dataloader_num_workers: int = flag(0, "Ignored: a thread prepares batches ahead.", rare=True)
    estimate_memory: bool = flag(False, "Whether to print the memory that each device needs, and exit.", rare=True)

    @property
    def trained_dtype(self) -> torch.dtype:
        """The dtype to load the trained model in, even if training computes in a lower one."""
        only_bf16 = (self.use_lora or self.optim == "adamw_8bit") and self.precision is torch.bfloat16
        return torch.bfloat16 if only_bf16 else torch.float32

    def check(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, int | float) and not abs(value) < 2**32:  # NaN, too
                raise UserError(f"--{name} {value}: must be a finite number below 2**32")
        counts = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
        self.check_bounds(*counts, at_least=1)
        self.check_bounds("seed", at_least=0)
        if self.max_steps < 1 and self.max_steps != -1:
            raise UserError(f"--max_steps {self.max_steps}: must be at least 1, or -1 to use num_train_epochs")
        if self.optim == "adamw_8bit" and (not self.bf16 or self.fsdp != "no"):
            raise UserError("--optim adamw_8bit: needs unsharded bf16 weights; add --bf16 true and remove --fsdp")
        if self.optim == "adamw_8bit" and not find_spec("torchao"):
            raise UserError('--optim adamw_8bit: torchao is not installed; pip install "rqa[8bit]"')
        if self.max_steps == -1 and self.num_train_epochs <= 0:
            raise UserError("--num_train_epochs: must be positive when --max_steps is not given")
        self.refuse_input_as("output_dir", ("", *RESULTS, "checkpoint-[0-9]*", "index-[0-9]*"))  # it deletes old ones
