"""The optimizer, its schedule and the loss scaler: everything between a loss and new weights."""

import math
import re
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import get_scheduler

from rqa.runtime import distributed
from rqa.runtime.errors import UserError
from rqa.runtime.parallelize import shard_optimizer_state, whole_optimizer_state
from rqa.training.arguments import LoopArguments


class Optimization:
    """AdamW on a schedule, with gradient clipping and, for fp16, loss scaling."""

    def __init__(self, module: nn.Module, arguments: LoopArguments, steps: int) -> None:
        groups = parameter_groups(module, arguments)
        self.trained = [parameter for group in groups for parameter in group["params"]]
        self.max_norm = arguments.max_grad_norm or math.inf
        self.optimizer = torch.optim.AdamW(
            groups,
            lr=arguments.learning_rate,
            betas=(arguments.adam_beta1, arguments.adam_beta2),
            eps=arguments.adam_epsilon,
            fused=True,
        )
        warmup = arguments.warmup_steps or round(arguments.warmup_ratio * steps)
        self.schedule = get_scheduler(arguments.lr_scheduler_type, self.optimizer, warmup, steps)
        self.scaler = torch.amp.GradScaler(distributed.device().type, enabled=arguments.fp16)

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


def parameter_groups(module: nn.Module, arguments: LoopArguments) -> list[dict[str, Any]]:
    """What is trained: matrices decay, biases and normalisation weights do not; new layers learn at their own rate.

    Raises:
        UserError: `--new_layers` is found in no parameter's name.
    """
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            new = arguments.new_layers is not None and re.search(arguments.new_layers, name) is not None
            groups.setdefault((new, parameter.ndim < 2), []).append(parameter)
    if arguments.new_layers is not None and not any(new for new, _ in groups):
        raise UserError(f"--new_layers {arguments.new_layers}: found in the name of no parameter that is trained")
    return [
        {
            "params": parameters,
            "weight_decay": 0.0 if vector else arguments.weight_decay,
            "lr": arguments.new_layers_learning_rate if new else arguments.learning_rate,
        }
        for (new, vector), parameters in sorted(groups.items(), key=lambda item: item[0])
    ]
