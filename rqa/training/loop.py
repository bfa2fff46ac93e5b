"""The training loop, which all algorithms share.

An objective is a module whose `forward(batch)` returns the loss summed over the batch, and statistics. A batch has its
`weight` before the forward pass, so that the loop can divide by the weight of the whole optimizer step: any split into
micro-batches and processes gives the same gradient.
"""

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rqa.runtime import distributed
from rqa.runtime.cli import deferred_signals
from rqa.runtime.errors import UserError
from rqa.runtime.files import beside, damage
from rqa.runtime.parallelize import ahead, parallelize, whole_weights
from rqa.training.arguments import LoopArguments
from rqa.training.checkpoint import LiveState, delete_old_checkpoints, load_checkpoint, promote, save_checkpoint
from rqa.training.journal import Journal, RunState, continues, metric_name, remember_if_best, resume_state
from rqa.training.optim import Optimization

log = logging.getLogger(__name__)


class Batches:
    """The training data by optimizer step: `batches[step]` is this process's list of micro-batches.

    The examples form one endless stream: a permutation per epoch, seeded by (seed, epoch). Each step takes the next
    `step_size` examples and deals them out over processes and micro-batches, so that all steps are full. A resumed run
    gets the very same batches from its step and its position in the stream; with another number of processes or batch
    size it continues at that position.

    `collate`: example indices -> one micro-batch, with `weight`, `num_tokens`, `indices` and `to(device)`.
    `ahead`: whether a batch depends on the indices alone, so that a thread can prepare it during the previous step.
    """

    def __init__(self, size: int, collate: Callable[..., Any], flags: LoopArguments, ahead: bool = False) -> None:
        self.size, self.collate, self.flags, self.ahead = size, collate, flags, ahead
        examples = flags.per_device_train_batch_size * flags.gradient_accumulation_steps
        self.step_size = examples * distributed.world_size()
        self.first_step = self.first_position = 0  # of a resumed run: steps done, and examples that they took

    def __len__(self) -> int:
        if self.flags.max_steps > 0:
            return self.flags.max_steps
        left = self.flags.num_train_epochs * self.size - self.first_position
        return self.first_step + max(math.ceil(left / self.step_size), 0)

    def position(self, step: int) -> int:
        """Number of examples that the steps before this one take from the stream."""
        return self.first_position + (step - self.first_step) * self.step_size

    def __getitem__(self, step: int) -> list[Any]:
        stream = range(self.position(step), self.position(step + 1))
        mine = distributed.share([_order(self.size, self.flags.seed, at // self.size)[at % self.size] for at in stream])
        width = self.flags.per_device_train_batch_size
        return [self.collate(mine[start : start + width]) for start in range(0, len(mine), width)]

    def since(self, step: int) -> Iterator[list[Any]]:
        """The micro-batches of this step and of each later one, made on demand or one step ahead."""
        steps = range(step, len(self))
        return ahead(self.__getitem__, steps) if self.ahead else map(self.__getitem__, steps)

    def due(self, strategy: str, every: int, step: int) -> bool:
        """Whether an action with this strategy (no, steps, epoch) is due after this step."""
        if strategy == "epoch":
            return self.position(step) // self.size > self.position(step - 1) // self.size
        return strategy == "steps" and step % every == 0


@lru_cache(2)
def _order(size: int, seed: int, epoch: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(size, generator=generator).tolist()


def train(
    objective: nn.Module,  # `forward(batch) -> (loss sum, statistics)` and `save_pretrained(directory)`
    batches: Batches, flags: LoopArguments,
    before_step: Callable[[int], Mapping[str, float]] | None = None,  # steps done -> statistics; may be a LiveState
    evaluate: Callable[[int], dict[str, float]] | None = None,  # steps done -> metrics by name
    evaluate_first: bool = False,  # before the first step, too
    checkpoint: Path | None = None,  # to continue from; the objective already has its weights
    eval_size: int = 0,  # number of evaluation questions, for a warning if no step improved the model
) -> RunState:  # fmt: skip
    """Train the objective's parameters and leave the best model at the top of the output directory."""
    output = Path(flags.output_dir)
    shard = flags.fsdp == "full_shard"
    parallelize(objective, flags.gradient_checkpointing, flags.torch_compile, shard, flags.precision)
    averaged = distributed.world_size() if shard else 1  # FSDP2 takes the mean of all processes' gradients
    live = before_step if isinstance(before_step, LiveState) else None
    state = resume_state(checkpoint, flags) if checkpoint else RunState()
    batches.first_step, batches.first_position = state.step, state.examples
    optimization = Optimization(objective, flags, len(batches))
    if checkpoint:
        load_checkpoint(checkpoint, objective, optimization, state, live)
    if not checkpoint or not continues(checkpoint, flags):
        delete_old_checkpoints(output, 0, state)  # of the run that --overwrite_output_dir replaces
    feed = batches.since(state.step)
    journal = Journal(state, len(batches), flags)
    chooses = flags.load_best_model_at_end is not False
    eval_steps = flags.eval_steps or (min(math.ceil(len(batches) / 4), 100) if chooses else len(batches))
    objective.train()
    measure, save = evaluate_first and not state.log_history, False
    with deferred_signals() as signals, journal.bar:
        while True:
            if evaluate and measure:
                with distributed.autocast(flags.precision):
                    metrics = evaluate(state.step)
                objective.train()
                journal.record(metrics)
                save |= remember_if_best(metrics, state, flags)
            if (save and flags.save_strategy != "no") or state.interrupted:
                save_checkpoint(output, objective, optimization, state, live)
                delete_old_checkpoints(output, flags.save_total_limit, state)
            if state.interrupted or state.step >= len(batches):
                break

            with distributed.autocast(flags.precision):
                news = journal.without_events(before_step(state.step)) if before_step else {}
            micro_batches = next(feed)
            weight, stop = distributed.total([sum(b.weight for b in micro_batches), bool(signals)])
            losses, statistics = [], []
            for batch in micro_batches:
                with distributed.tf32():
                    with distributed.autocast(flags.precision):
                        loss, values = objective(batch.to(distributed.device()))
                    optimization.scaler.scale(loss * (averaged / weight)).backward()
                losses.append(loss.detach())
                statistics.append({**news, **values})
            # The only wait for the device in a step; the optimizer keeps it busy while the next step is queued.
            loss, norm = torch.stack([sum(losses), optimization.clip().to(losses[0])]).tolist()
            if not math.isfinite(loss):
                pairs = zip(micro_batches, losses, strict=True)
                bad = [i for batch, part in pairs if not part.isfinite() for i in batch.indices]
                raise UserError(f"step {state.step + 1}: the loss is not finite; it comes from the examples {bad}")
            optimization.step(state.step, norm)
            state.step += 1
            state.examples = batches.position(state.step)
            tokens, rate = sum(b.num_tokens for b in micro_batches), optimization.learning_rates(state.step)[0]
            journal.step_done(loss / weight, tokens, statistics, norm, rate)

            last = state.step == len(batches)
            state.interrupted = bool(stop) and not last
            save = last or batches.due(flags.save_strategy, flags.save_steps, state.step)
            measure = last or (batches.due(flags.eval_strategy, eval_steps, state.step) and not stop)
    journal.save()
    if state.interrupted:
        log.warning("interrupted after step %d; continue with --resume_from_checkpoint true", state.step)
    else:
        with optimization.whole_precision():
            finish(output, objective, state, flags, eval_size)
    return state


def finish(output: Path, objective: nn.Module, state: RunState, flags: LoopArguments, eval_size: int) -> None:
    """Put the best model, or the last, at the top of the output directory."""
    chooses = flags.load_best_model_at_end is not False
    best = output / state.best_model_checkpoint if chooses and state.best_model_checkpoint else None
    values = [entry[name] for entry in state.log_history if (name := metric_name(flags)) in entry]
    if chooses and values and flags.save_strategy == "no" and values[-1] != state.best_metric:
        log.warning("--save_strategy no: keeps the last model, although %s was better before", metric_name(flags))
    with whole_weights(objective):
        if distributed.is_main():
            if best and not (problem := damage(best)):
                if best.name == "checkpoint-0" and state.step:
                    message = "best model: step 0, untrained; %s never improved (%d questions)"
                    log.warning(message, metric_name(flags), eval_size)
                promote(best, output)
            else:
                if best:
                    log.warning("best model %s cannot be used (%s); the last model replaces it", best, problem)
                with beside(output / "model") as directory:
                    objective.save_pretrained(directory)
                    promote(directory, output)
    distributed.barrier()
