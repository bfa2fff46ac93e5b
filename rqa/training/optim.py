"""The optimizer, its learning rate and the loss scaler: everything between a loss and new weights."""

import logging
import math
import re
from collections import defaultdict
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, get_scheduler

from rqa.models.loading import holding, lowered
from rqa.runtime import distributed
from rqa.runtime.errors import UserError
from rqa.runtime.parallelize import assembled, divided_like, sum_gradients, whole_on_main
from rqa.training.arguments import LoopArguments

log = logging.getLogger(__name__)


def usual_learning_rate(module: nn.Module, flags: LoopArguments) -> float:
    """What suits a model of this width, and a step of so many examples; an objective's `faster` multiplies it.

    Adam's best rate falls as the inverse of the width (Yang et al. 2022, Tensor Programs V), and rises as the root of
    the batch (Malladi et al. 2022, "On the SDEs and scaling rules for adaptive gradient algorithms").
    """
    configs = (each.config.get_text_config() for each in module.modules() if isinstance(each, PreTrainedModel))
    width = next((config.hidden_size for config in configs if getattr(config, "hidden_size", None)), 768)
    examples = flags.per_device_train_batch_size * flags.gradient_accumulation_steps * distributed.world_size()
    return 0.0048 * getattr(module, "faster", 1) * math.sqrt(examples) / width * (10 if flags.use_lora else 1)


class Optimization:
    """AdamW with gradient clipping; for bf16 over float32 copies of the weights, for fp16 with loss scaling.

    With bf16 the module computes in bfloat16 weights. Each has a float32 master here, which gets its gradient, summed
    over micro-batches in float32, and is what AdamW updates, checkpoints hold and a resumed run goes on from
    (Micikevicius et al. 2018, section 3.1). What is frozen is lowered, too, and kept in CPU memory until it is saved.
    """

    def __init__(self, module: nn.Module, flags: LoopArguments, steps: int) -> None:
        self.flags = flags
        warmup = flags.warmup_steps or round(flags.warmup_ratio * steps)
        schedule = get_scheduler(flags.lr_scheduler_type, torch.optim.SGD([torch.zeros(1)]), warmup, steps)
        (self.rate_factor,) = schedule.lr_lambdas  # steps done -> share of the peak learning rate
        self.masters: dict[nn.Parameter, nn.Parameter] = {}  # float32 weights by the parameter of the module
        self.unrounded: dict[nn.Parameter, Tensor] = {}  # the same of what is frozen
        half = lowered(module) if flags.bf16 and flags.precision is torch.bfloat16 else {}
        for weight, low in half.items():
            whole, weight.data = weight.data, low
            if weight.requires_grad:
                self.masters[weight] = nn.Parameter(whole)
                weight.register_post_accumulate_grad_hook(partial(_hand_over, self.masters[weight]))
            else:
                self.unrounded[weight] = whole.cpu()
        groups = self._groups(module)
        self.peaks = [group["lr"] for group in groups]
        self.trained: dict[str, nn.Parameter] = {name: part for group in groups for name, part in group["params"]}
        self.optimizer = new_optimizer(groups, flags)
        self.skipped = 0  # steps without an update, as fp16 overflowed: the schedule does not count them
        self.scaler = torch.amp.GradScaler(distributed.device().type, enabled=flags.fp16)

    def _groups(self, module: nn.Module) -> list[dict[str, Any]]:
        """What is trained: matrices decay, biases and norms' weights do not; new layers learn at their own rate."""
        flags, groups = self.flags, defaultdict(list)
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                new = flags.new_layers is not None and re.search(flags.new_layers, name) is not None
                groups[new, parameter.ndim < 2].append((name, self.masters.get(parameter, parameter)))
        if flags.new_layers is not None and not any(new for new, _ in groups):
            raise UserError(f"--new_layers {flags.new_layers}: found in the name of no parameter that is trained")
        if (rate := flags.learning_rate) is None:
            rate = usual_learning_rate(module, flags)
            log.info("--learning_rate %.2g: follows from the model's width and the batch", rate)
        rates, decays = (rate, flags.new_layers_learning_rate), (flags.weight_decay, 0.0)
        ordered = sorted(groups.items())
        return [{"params": group, "weight_decay": decays[vector], "lr": rates[new]} for (new, vector), group in ordered]

    def whole_precision(self) -> AbstractContextManager[None]:
        """Inside, the module's weights are the float32 ones: what is saved."""
        return holding(self.unrounded | self.masters)

    def learning_rates(self, step: int) -> list[float]:
        """Of each parameter group, after so many steps."""
        return [peak * self.rate_factor(step - self.skipped) for peak in self.peaks]

    def clip(self) -> Tensor:
        """Sum the gradient over processes and clip it. -> its norm before that, on the device"""
        sum_gradients(self.trained.values())
        self.scaler.unscale_(self.optimizer)
        return assembled(nn.utils.clip_grad_norm_(self.trained.values(), self.flags.max_grad_norm or math.inf))

    def step(self, done: int, norm: float) -> None:
        """Update the weights, after so many steps, by a clipped gradient of this norm."""
        for group, rate in zip(self.optimizer.param_groups, self.learning_rates(done), strict=True):
            # torchao's is a tensor: for another number it would compile its step anew.
            group["lr"] = group["lr"].fill_(rate) if isinstance(group["lr"], Tensor) else rate
        if not math.isfinite(norm) and not self.scaler.is_enabled():
            raise UserError("the gradient is not finite; lower --learning_rate")
        self.skipped += not math.isfinite(norm)
        rounds = self.flags.optim == "adamw_8bit"
        with torch.random.fork_rng([distributed.device()] if torch.cuda.is_available() else [], enabled=rounds):
            if rounds:  # stochastically, and the same on every process
                torch.manual_seed(self.flags.seed + done)
            self.scaler.step(self.optimizer)  # skips the update if fp16 overflowed
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.masters:
            with torch.no_grad():
                torch._foreach_copy_(list(self.masters), list(self.masters.values()))

    def state_dict(self) -> dict[str, Any]:
        """The moments by parameter name, whole, on the main process and its CPU. Every process calls this."""
        state = {name: self.optimizer.state.get(parameter, {}) for name, parameter in self.trained.items()}
        moments = {name: {key: whole_on_main(value) for key, value in own.items()} for name, own in state.items()}
        scale, optim = self.scaler.state_dict(), self.flags.optim
        return {"optimizer": moments, "scaler": scale, "optim": optim, "skipped": self.skipped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore moments and loss scale; learning rates and decay stay those of the present flags."""
        moments = state["optimizer"]
        if state["optim"] != self.flags.optim:
            raise ValueError(f"it was saved with --optim {state['optim']}")
        same = moments.keys() == self.trained.keys() and all(
            value.shape in ((), self.trained[name].shape) for name, own in moments.items() for value in own.values()
        )
        if not same:
            raise ValueError("the optimizer's state is of a model with other parameters")
        for name, own in moments.items():
            if own:  # nothing before the first step
                parameter = self.trained[name]
                self.optimizer.state[parameter] = {key: divided_like(parameter, value) for key, value in own.items()}
                if self.flags.optim == "adamw_8bit":  # counts steps on the CPU
                    self.optimizer.state[parameter]["step"] = own["step"]
        self.scaler.load_state_dict(state["scaler"])
        self.skipped = state["skipped"]


def _hand_over(master: nn.Parameter, weight: nn.Parameter) -> None:
    """Add a weight's new gradient to its master's, and drop it."""
    gradient, weight.grad = weight.grad, None
    assert gradient is not None
    master.grad = gradient.to(master.dtype) if master.grad is None else master.grad.add_(gradient)


def new_optimizer(groups: list[dict[str, Any]], flags: LoopArguments) -> torch.optim.Optimizer:
    """AdamW, or torchao's with moments of 8 bits (Dettmers et al. 2022), which rounds bf16 weights stochastically."""
    settings: dict[str, Any] = {"betas": (flags.adam_beta1, flags.adam_beta2), "eps": flags.adam_epsilon}
    if flags.optim == "adamw":
        return torch.optim.AdamW(groups, **settings, fused=True)
    from torchao.optim import AdamW8bit

    return AdamW8bit(groups, **settings, bf16_stochastic_round=True)
