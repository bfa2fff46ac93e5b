"""The loop's flags, named as in Hugging Face's TrainingArguments."""

import re
from dataclasses import dataclass, field, fields
from pathlib import Path

from rqa.models.loading import LoadingArguments, LoraArguments
from rqa.runtime.errors import UserError, check_bounds

STRATEGIES = ["no", "steps", "epoch"]


@dataclass
class OptimizerArguments:
    """How weights are updated."""

    learning_rate: float = field(default=5e-5, metadata={"help": "The schedule's peak."})
    new_layers: str | None = field(
        default=None, metadata={"help": "Parameters with a peak of their own: a regular expression, found in the name."}
    )
    new_layers_learning_rate: float | None = field(
        default=None, metadata={"help": "Their peak, such as ten times --learning_rate."}
    )
    lr_scheduler_type: str = field(
        default="linear",
        metadata={"help": "After the warm-up.", "choices": ["linear", "cosine", "constant", "constant_with_warmup"]},
    )
    warmup_ratio: float = field(default=0.0, metadata={"help": "Share of all steps that warm up."})
    warmup_steps: int = field(default=0, metadata={"help": "Steps that warm up; replaces the ratio when positive."})
    weight_decay: float = field(default=0.0, metadata={"help": "AdamW's, on matrices only."})
    adam_beta1: float = field(default=0.9, metadata={"help": "AdamW's memory of gradients."})
    adam_beta2: float = field(default=0.999, metadata={"help": "AdamW's memory of their squares."})
    adam_epsilon: float = field(default=1e-8, metadata={"help": "AdamW's, against division by zero."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Gradients are clipped to this norm; 0: never."})


@dataclass
class DeviceArguments(LoadingArguments):
    """What fits on a device, and how fast it runs."""

    fp16: bool = field(default=False, metadata={"help": "Compute in float16 with a loss scaler, on CUDA."})
    gradient_checkpointing: bool = field(default=False, metadata={"help": "Recompute activations: slower, smaller."})
    torch_compile: bool = field(default=False, metadata={"help": "Compile the model."})
    fsdp: str = field(
        default="no",
        metadata={
            "help": "full_shard: divide weights, gradients and optimizer state among torchrun's processes (FSDP2).",
            "choices": ["no", "full_shard"],
        },
    )


@dataclass
class JournalArguments:
    """When a run logs, evaluates and saves, and which model it keeps."""

    logging_steps: int = field(default=10, metadata={"help": "Steps between two log lines."})
    eval_strategy: str = field(
        default="steps",
        metadata={
            "help": "When to evaluate on eval_file.",
            "choices": STRATEGIES,
            "aliases": ["--evaluation_strategy"],
        },
    )
    eval_steps: int = field(default=100, metadata={"help": "Steps between two evaluations."})
    eval_on_start: bool | None = field(
        default=None, metadata={"help": "Evaluate once before the first step; by default where retrievers train."}
    )
    eval_max_examples: int = field(
        default=0, metadata={"help": "Evaluate in training on this many questions, a fixed seeded subset; 0: all."}
    )
    save_strategy: str = field(default="steps", metadata={"help": "When to save.", "choices": STRATEGIES})
    save_steps: int = field(default=500, metadata={"help": "Steps between two checkpoints."})
    save_total_limit: int | None = field(
        default=None, metadata={"help": "Checkpoints to keep, newest first; the best one is always kept."}
    )
    metric_for_best_model: str | None = field(
        default=None, metadata={"help": "The evaluation metric that chooses the best; by default the algorithm's."}
    )
    greater_is_better: bool | None = field(
        default=None, metadata={"help": "Of that metric; by default true unless it is a loss."}
    )
    load_best_model_at_end: bool = field(default=True, metadata={"help": "Put the best model, not the last, on top."})
    write_predictions: bool = field(default=False, metadata={"help": "Keep each evaluation's predictions as JSONL."})
    report_to: str = field(
        default="none", metadata={"help": "A tracker.", "choices": ["none", "tensorboard", "wandb", "trackio"]}
    )
    run_project: str = field(default="rqa", metadata={"help": "The tracker's project."})
    run_group: str | None = field(default=None, metadata={"help": "The tracker's group of runs."})


@dataclass
class LoopArguments(OptimizerArguments, DeviceArguments, LoraArguments, JournalArguments):
    """How a run goes: its directory, its batches and its length."""

    output_dir: str = field(kw_only=True, metadata={"help": "Where checkpoints, logs, scores and the best model go."})
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Start afresh in an output_dir that holds a run."}
    )
    resume_from_checkpoint: str | None = field(
        default=None, metadata={"help": "true: the newest complete checkpoint of output_dir; or a checkpoint's path."}
    )
    seed: int = field(default=42, metadata={"help": "Seeds data order, dropout and new weights."})

    per_device_train_batch_size: int = field(default=8, metadata={"help": "Examples of one forward pass."})
    per_device_eval_batch_size: int = field(
        default=8, metadata={"help": "A reader's examples of one forward pass in evaluation."}
    )
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Forward passes of one optimizer step."})
    num_train_epochs: float = field(default=3.0, metadata={"help": "Passes over the training file."})
    max_steps: int = field(default=-1, metadata={"help": "Optimizer steps; -1: the epochs decide."})
    dataloader_num_workers: int = field(default=0, metadata={"help": "Processes that collate batches ahead."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_numbers()
        self._check_new_layers()
        if self.use_flash_attention and not (self.bf16 or self.fp16):
            raise UserError("--use_flash_attention true: flash-attn computes in half precision; add --bf16 true")
        if self.fsdp != "no" and self.fp16:
            raise UserError("--fp16 true: sharded training scales no loss; use --bf16 true with --fsdp full_shard")
        if self.max_steps < 1 and self.num_train_epochs <= 0:
            raise UserError("--num_train_epochs: must be positive when --max_steps is not given")
        if Path(self.output_dir).is_file():
            raise UserError(f"--output_dir {self.output_dir}: is a file")

    def _check_numbers(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, int | float) and not abs(value) < 2**32:  # NaN, too
                raise UserError(f"--{item.name} {value}: is no number to train with")
        counts = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps",
                  "logging_steps", "eval_steps", "save_steps", "save_total_limit")  # fmt: skip
        amounts = ("learning_rate", "new_layers_learning_rate", "weight_decay", "adam_epsilon", "max_grad_norm",
                   "warmup_steps", "seed", "dataloader_num_workers", "eval_max_examples")  # fmt: skip
        check_bounds(self, *counts, at_least=1)
        check_bounds(self, *amounts, at_least=0)
        check_bounds(self, "warmup_ratio", at_least=0, at_most=1)
        check_bounds(self, "adam_beta1", "adam_beta2", at_least=0, below=1)

    def _check_new_layers(self) -> None:
        if (self.new_layers is None) != (self.new_layers_learning_rate is None):
            raise UserError("--new_layers: goes with --new_layers_learning_rate; give both or neither")
        try:
            re.compile(self.new_layers or "")
        except re.error as error:
            raise UserError(f"--new_layers {self.new_layers}: is no regular expression ({error})") from None

    @property
    def maximize(self) -> bool:
        """Whether a greater value of `metric_for_best_model` is a better one."""
        if self.greater_is_better is None:
            return not (self.metric_for_best_model or "").endswith("loss")
        return self.greater_is_better
