"""The optimizer, its schedule and the loss scaler: everything between a loss and new weights."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import get_scheduler

from rqa.runtime.errors import UserError
from rqa.runtime.parallelize import shard_optimizer_state, whole_optimizer_state
from rqa.training.arguments import LoopArguments


class Optimization:
    """AdamW on a schedule, with gradient clipping and, for fp16, loss scaling."""

    def __init__(self, module: nn.Module, arguments: LoopArguments, steps: int, device: torch.device) -> None:
        self.trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self.max_norm = arguments.max_grad_norm or math.inf
        self.optimizer = torch.optim.AdamW(
            decay_groups(self.trained, arguments.weight_decay),
            lr=arguments.learning_rate,
            betas=(arguments.adam_beta1, arguments.adam_beta2),
            eps=arguments.adam_epsilon,
            fused=True,
        )
        warmup = arguments.warmup_steps or round(arguments.warmup_ratio * steps)
        self.schedule = get_scheduler(arguments.lr_scheduler_type, self.optimizer, warmup, steps)
        self.scaler = torch.amp.GradScaler(device.type, enabled=arguments.fp16)

    @property
    def learning_rate(self) -> float:
        return float(self.schedule.get_last_lr()[0])

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of a loss."""
        self.scaler.scale(loss).backward()

    def step(self) -> float:
        """Clip, update the weights, advance the schedule; the gradient's norm before clipping.

        Raises:
            UserError: the gradient is not finite; the weights are as before.
        """
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.trained, self.max_norm)
        norm = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        if not math.isfinite(norm) and not self.scaler.is_enabled():
            raise UserError("the gradient is not finite; lower --learning_rate")
        self.scaler.step(self.optimizer)  # skips the update if fp16 overflowed
        self.scaler.update()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's moments, whole and on the CPU, and the loss scale. Every process calls this."""
        return {"optimizer": whole_optimizer_state(self.optimizer), "scaler": self.scaler.state_dict()}

    def load_state_dict(self, state: dict[str, Any], steps: int) -> None:
        """Restore moments and loss scale after so many steps; rates and decay stay those of the present arguments.

        Raises:
            ValueError: they are not of these parameters.
        """
        present = self.optimizer.state_dict()["param_groups"]
        saved = state["optimizer"]["param_groups"]
        if [len(group["params"]) for group in saved] != [len(group["params"]) for group in present]:
            raise ValueError("the optimizer's state is of a model with other parameters")
        ordered = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        moments = shard_optimizer_state(state["optimizer"], ordered)["state"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": present})
        self.scaler.load_state_dict(state["scaler"])
        self.schedule.last_epoch = steps
        rates = [
            base * factor(steps) for base, factor in zip(self.schedule.base_lrs, self.schedule.lr_lambdas, strict=True)
        ]
        self.schedule._last_lr = rates
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate


def decay_groups(parameters: list[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay; biases and normalisation weights do not."""
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
