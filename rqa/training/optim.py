"""The optimizer, its learning rate and the loss scaler."""

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
    """The default learning rate for the model's width and the step's examples, times an objective's `faster`.

    Adam's best rate falls as the inverse of the width (Yang et al. 2022, Tensor Programs V), and rises as the root of
    the batch (Malladi et al. 2022, "On the SDEs and scaling rules for adaptive gradient algorithms").
    """
    configs = (each.config.get_text_config() for each in module.modules() if isinstance(each, PreTrainedModel))
    width = next((config.hidden_size for config in configs if getattr(config, "hidden_size", None)), 768)
    examples = flags.per_device_train_batch_size * flags.gradient_accumulation_steps * distributed.world_size()
    return 0.0048 * getattr(module, "faster", 1) * math.sqrt(examples) / width * (10 if flags.use_lora else 1)


class Optimization:
    """AdamW with gradient clipping; with float32 master weights for bf16, and loss scaling for fp16.

    With bf16 the module computes with bfloat16 weights. Each trained one has a float32 master, which sums its gradients
    over micro-batches; AdamW updates it, and checkpoints hold it (Micikevicius et al. 2018, section 3.1). Frozen
    weights are bfloat16 as well; the CPU keeps their float32 values for saving.
    """

    def __init__(self, module: nn.Module, flags: LoopArguments, steps: int) -> None:
        self.flags = flags
        warmup = flags.warmup_steps or round(flags.warmup_ratio * steps)
        schedule = get_scheduler(flags.lr_scheduler_type, torch.optim.SGD([torch.zeros(1)]), warmup, steps)
        (self.rate_factor,) = schedule.lr_lambdas  # steps done -> share of the peak learning rate
        self.masters: dict[nn.Parameter, nn.Parameter] = {}  # float32 weights by module parameter
        self.unrounded: dict[nn.Parameter, Tensor] = {}  # the same for frozen parameters
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
        self.skipped = 0  # steps without an update, since fp16 overflowed; the schedule does not count them
        self.scaler = torch.amp.GradScaler(distributed.device().type, enabled=flags.fp16)

    def _groups(self, module: nn.Module) -> list[dict[str, Any]]:
        """Parameter groups: biases and norms do not decay, and new layers have their own learning rate."""
        flags, groups = self.flags, defaultdict(list)
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                new = flags.new_layers is not None and re.search(flags.new_layers, name) is not None
                groups[new, parameter.ndim < 2].append((name, self.masters.get(parameter, parameter)))
        if flags.new_layers is not None and not any(new for new, _ in groups):
            raise UserError(f"--new_layers {flags.new_layers}: matches no trained parameter; correct the expression")
        if (rate := flags.learning_rate) is None:
            rate = usual_learning_rate(module, flags)
            log.info("--learning_rate %.2g: chosen by the model's width and the batch size", rate)
        rates, decays = (rate, flags.new_layers_learning_rate), (flags.weight_decay, 0.0)
        ordered = sorted(groups.items())
        return [{"params": group, "weight_decay": decays[vector], "lr": rates[new]} for (new, vector), group in ordered]

    def whole_precision(self) -> AbstractContextManager[None]:
        """A context in which the module has its float32 weights, for saving."""
        return holding(self.unrounded | self.masters)

    def learning_rates(self, step: int) -> list[float]:
        """The learning rate of each parameter group after `step` steps."""
        return [peak * self.rate_factor(step - self.skipped) for peak in self.peaks]

    def clip(self) -> Tensor:
        """Sum the gradient over processes and clip it. -> its norm before clipping, on the device"""
        sum_gradients(self.trained.values())
        self.scaler.unscale_(self.optimizer)
        return assembled(nn.utils.clip_grad_norm_(self.trained.values(), self.flags.max_grad_norm or math.inf))

    def step(self, done: int, norm: float) -> None:
        """Update the weights after `done` steps; `norm` is that of the gradient before clipping."""
        for group, rate in zip(self.optimizer.param_groups, self.learning_rates(done), strict=True):
            # torchao keeps the rate in a tensor; a new number would recompile its step.
            group["lr"] = group["lr"].fill_(rate) if isinstance(group["lr"], Tensor) else rate
        if not math.isfinite(norm) and not self.scaler.is_enabled():
            raise UserError("the gradient is not finite; lower --learning_rate")
        self.skipped += not math.isfinite(norm)
        rounds = self.flags.optim == "adamw_8bit"
        with torch.random.fork_rng([distributed.device()] if torch.cuda.is_available() else [], enabled=rounds):
            if rounds:  # stochastically, but the same on every process
                torch.manual_seed(self.flags.seed + done)
            self.scaler.step(self.optimizer)  # skips the update if fp16 overflowed
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.masters:
            with torch.no_grad():
                torch._foreach_copy_(list(self.masters), list(self.masters.values()))

    def state_dict(self) -> dict[str, Any]:
        """The moments by parameter name, unsharded, on the main process's CPU. Every process calls this."""
        state = {name: self.optimizer.state.get(parameter, {}) for name, parameter in self.trained.items()}
        moments = {name: {key: whole_on_main(value) for key, value in own.items()} for name, own in state.items()}
        scale, optim = self.scaler.state_dict(), self.flags.optim
        return {"optimizer": moments, "scaler": scale, "optim": optim, "skipped": self.skipped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore moments and loss scale; learning rates and decay are those of the present flags."""
        moments = state["optimizer"]
        if state["optim"] != self.flags.optim:
            raise ValueError(f"it was saved with --optim {state['optim']}")
        same = moments.keys() == self.trained.keys() and all(
            value.shape in ((), self.trained[name].shape) for name, own in moments.items() for value in own.values()
        )
        if not same:
            raise ValueError("the optimizer's state belongs to a model with other parameters")
        for name, own in moments.items():
            if own:  # empty before the first step
                parameter = self.trained[name]
                self.optimizer.state[parameter] = {key: divided_like(parameter, value) for key, value in own.items()}
                if self.flags.optim == "adamw_8bit":  # counts steps on the CPU
                    self.optimizer.state[parameter]["step"] = own["step"]
        self.scaler.load_state_dict(state["scaler"])
        self.skipped = state["skipped"]


def _hand_over(master: nn.Parameter, weight: nn.Parameter) -> None:
    """Move a weight's new gradient to its master."""
    gradient, weight.grad = weight.grad, None
    assert gradient is not None
    master.grad = gradient.to(master.dtype) if master.grad is None else master.grad.add_(gradient)


def new_optimizer(groups: list[dict[str, Any]], flags: LoopArguments) -> torch.optim.Optimizer:
    """AdamW, or torchao's with 8-bit moments (Dettmers et al. 2022), which rounds bf16 weights stochastically."""
    settings: dict[str, Any] = {"betas": (flags.adam_beta1, flags.adam_beta2), "eps": flags.adam_epsilon}
    if flags.optim == "adamw":
        return torch.optim.AdamW(groups, **settings, fused=True)
    from torchao.optim import AdamW8bit

    return AdamW8bit(groups, **settings, bf16_stochastic_round=True)
