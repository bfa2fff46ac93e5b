"""The optimizer, its learning rate and the loss scaler: everything between a loss and new weights."""

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rqa.models.loading import holding, lowered
from rqa.runtime import distributed
from rqa.runtime.errors import UserError
from rqa.runtime.parallelize import assembled, divided_like, sum_gradients, whole_on_main
from rqa.training.arguments import LoopArguments


def rate_factor(kind: str, step: int, warmup: int, steps: int) -> float:
    """The share of the peak learning rate after `step` of `steps` steps, as `transformers.get_scheduler` has it."""
    if step < warmup and kind != "constant":
        return step / warmup
    if kind.startswith("constant"):
        return 1.0
    if kind == "cosine":
        return max(0.0, 0.5 * (1.0 + math.cos(math.pi * ((step - warmup) / max(1, steps - warmup)))))
    return max(0.0, (steps - step) / max(1, steps - warmup))


class Optimization:
    """AdamW with gradient clipping; for bf16 over float32 copies of the weights, for fp16 with loss scaling.

    With bf16 the module computes in bfloat16 weights. Each has a float32 master here, which gets its gradient, summed
    over micro-batches in float32, and is what AdamW updates, checkpoints hold and a resumed run goes on from
    (Micikevicius et al. 2018, section 3.1). What is frozen is lowered, too, and kept in CPU memory until it is saved.
    """

    def __init__(self, module: nn.Module, flags: LoopArguments, steps: int) -> None:
        self.flags, self.steps = flags, steps
        self.warmup = flags.warmup_steps or round(flags.warmup_ratio * steps)
        self.masters: dict[nn.Parameter, nn.Parameter] = {}  # float32 weights by the parameter of the module
        self.unrounded: dict[nn.Parameter, Tensor] = {}  # the same of what is frozen
        if flags.precision is torch.bfloat16:
            self._lower(module)
        groups, betas = parameter_groups(module, flags), (flags.adam_beta1, flags.adam_beta2)
        for group in groups:
            group["params"] = [(name, self.masters.get(part, part)) for name, part in group["params"]]
        self.peaks = [group["lr"] for group in groups]
        self.trained: dict[str, nn.Parameter] = {name: part for group in groups for name, part in group["params"]}
        self.optimizer = torch.optim.AdamW(groups, betas=betas, eps=flags.adam_epsilon, fused=True)
        self.scaler = torch.amp.GradScaler(distributed.device().type, enabled=flags.fp16)

    def _lower(self, module: nn.Module) -> None:
        for weight, low in lowered(module).items():
            whole, weight.data = weight.data, low
            if weight.requires_grad:
                self.masters[weight] = nn.Parameter(whole)
                weight.register_post_accumulate_grad_hook(partial(_hand_over, self.masters[weight]))
            else:
                self.unrounded[weight] = whole.cpu()

    @contextmanager
    def whole_precision(self) -> Iterator[None]:
        """Inside, the module's weights are the float32 ones: what is saved."""
        with holding(self.unrounded | self.masters):
            yield

    def learning_rates(self, step: int) -> list[float]:
        """Of each parameter group, after so many steps."""
        factor = rate_factor(self.flags.lr_scheduler_type, step, self.warmup, self.steps)
        return [peak * factor for peak in self.peaks]

    def step(self, done: int) -> float:
        """Clip, and update the weights, after so many steps. Returns the gradient's norm before clipping."""
        for group, rate in zip(self.optimizer.param_groups, self.learning_rates(done), strict=True):
            group["lr"] = rate
        sum_gradients(self.trained.values())
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.trained.values(), self.flags.max_grad_norm or math.inf)
        norm = float(assembled(norm))
        if not math.isfinite(norm) and not self.scaler.is_enabled():
            raise UserError("the gradient is not finite; lower --learning_rate")
        self.scaler.step(self.optimizer)  # skips the update if fp16 overflowed
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for weight, master in self.masters.items():
                weight.copy_(master)
        return norm

    def state_dict(self) -> dict[str, Any]:
        """The moments by parameter name, whole, on the main process and its CPU. Every process calls this."""
        state = {name: self.optimizer.state.get(parameter, {}) for name, parameter in self.trained.items()}
        moments = {name: {key: whole_on_main(value) for key, value in own.items()} for name, own in state.items()}
        return {"optimizer": moments, "scaler": self.scaler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore moments and loss scale; learning rates and decay stay those of the present flags."""
        moments = state["optimizer"]
        if "param_groups" in moments:  # until November 2026 parameters were numbered, in the same order
            numbers = [number for group in moments["param_groups"] for number in group["params"]]
            moments = {name: moments["state"].get(n, {}) for name, n in zip(self.trained, numbers, strict=True)}
        same = moments.keys() == self.trained.keys() and all(
            value.shape in ((), self.trained[name].shape) for name, own in moments.items() for value in own.values()
        )
        if not same:
            raise ValueError("the optimizer's state is of a model with other parameters")
        for name, own in moments.items():
            if own:  # nothing before the first step
                parameter = self.trained[name]
                self.optimizer.state[parameter] = {key: divided_like(parameter, value) for key, value in own.items()}
        self.scaler.load_state_dict(state["scaler"])


def _hand_over(master: nn.Parameter, weight: nn.Parameter) -> None:
    """Add a weight's new gradient to its master's, and drop it."""
    gradient, weight.grad = weight.grad, None
    assert gradient is not None
    if master.grad is None:
        master.grad = gradient.to(master.dtype)
    else:
        master.grad.add_(gradient)


def parameter_groups(module: nn.Module, flags: LoopArguments) -> list[dict[str, Any]]:
    """What is trained: matrices decay, biases and normalisation weights do not; new layers learn at their own rate."""
    groups: dict[tuple[bool, bool], list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            new = flags.new_layers is not None and re.search(flags.new_layers, name) is not None
            groups.setdefault((new, parameter.ndim < 2), []).append((name, parameter))
    if flags.new_layers is not None and not any(new for new, _ in groups):
        raise UserError(f"--new_layers {flags.new_layers}: found in the name of no parameter that is trained")
    rates = {False: flags.learning_rate, True: flags.new_layers_learning_rate}
    decays = {False: flags.weight_decay, True: 0.0}
    return [
        {"params": groups[new, is_vector], "weight_decay": decays[is_vector], "lr": rates[new]}
        for new, is_vector in sorted(groups)
    ]
