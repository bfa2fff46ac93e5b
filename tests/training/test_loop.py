"""The loop, with an objective small enough to compute by hand and with the real one."""

import json
import math
import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import pytest
from torch import Tensor, nn
from safetensors.torch import load_file, save_file
from transformers import get_scheduler

from rqa.runtime.errors import UserError
from rqa.training import journal
from rqa.training.arguments import LoopArguments
from rqa.training.checkpoint import checkpoint_to_resume, checkpoints
from rqa.training.loop import Batches, train

CPU = torch.device("cpu")


@dataclass
class Batch:
    """Rows with unequal weights, like answers of unequal length."""

    rows: Tensor
    weights: Tensor
    indices: tuple[int, ...]

    @property
    def weight(self) -> float:
        return float(self.weights.sum())

    @property
    def num_tokens(self) -> int:
        return len(self.rows)

    def to(self, device: torch.device) -> "Batch":
        return self


class Regression(nn.Module):
    """A linear layer behind dropout: the loss sum is the weighted squared error."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.linear = nn.Linear(4, 1)
        self.dropout = nn.Dropout(dropout)
        self.seen: list[tuple[int, ...]] = []

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        self.seen.append(batch.indices)
        error = self.linear(self.dropout(batch.rows)).squeeze(-1) - batch.rows.sum(-1)
        return (batch.weights * error**2).sum(), {"answer": 42.0}

    def save_pretrained(self, directory: str | Path) -> None:
        save_file(
            {name: value.contiguous() for name, value in self.state_dict().items()}, Path(directory) / "w.safetensors"
        )

    def restore(self, directory: Path) -> None:
        self.load_state_dict(load_file(directory / "w.safetensors"))


def make_batches(arguments: LoopArguments, size: int = 16, poison: int | None = None) -> Batches:
    generator = torch.Generator().manual_seed(5)
    rows = torch.randn(size, 4, generator=generator)
    weights = torch.arange(1.0, size + 1)
    if poison is not None:
        rows[poison] = math.inf

    def collate(indices: Sequence[int]) -> Batch:
        return Batch(rows[list(indices)], weights[list(indices)], tuple(indices))

    return Batches(size, collate, arguments)


@pytest.fixture
def arguments(tmp_path: Path) -> LoopArguments:
    return LoopArguments(
        output_dir=str(tmp_path / "run"),
        max_steps=6,
        per_device_train_batch_size=4,
        learning_rate=0.05,
        logging_steps=2,
        metric_for_best_model="loss",
    )


def run(arguments: LoopArguments, objective: Regression | None = None, **options: object) -> Regression:
    """As a recipe does it: resume if asked, then train."""
    Path(arguments.output_dir).mkdir(parents=True, exist_ok=True)
    objective = objective or Regression(dropout=0.2)
    torch.manual_seed(arguments.seed)
    checkpoint = checkpoint_to_resume(arguments)
    if checkpoint:
        objective.restore(checkpoint)
    objective.state = train(objective, make_batches(arguments), arguments, CPU, checkpoint=checkpoint, **options)
    return objective


@pytest.mark.parametrize(("micro_batches", "size"), [(1, 8), (2, 4), (4, 2), (8, 1)])
def test_any_split_into_micro_batches_gives_the_same_weights(
    arguments: LoopArguments, micro_batches: int, size: int
) -> None:
    split = replace(
        arguments,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=micro_batches,
        lr_scheduler_type="constant",
    )
    ours = run(replace(split, max_steps=1, max_grad_norm=0.0), Regression()).linear.weight

    reference = Regression()
    everything = make_batches(replace(split, per_device_train_batch_size=8, gradient_accumulation_steps=1))[0][0]
    loss = reference(everything)[0] / everything.weight
    loss.backward()
    torch.optim.AdamW(reference.parameters(), lr=0.05, weight_decay=0.0).step()
    torch.testing.assert_close(ours, reference.linear.weight, rtol=1e-5, atol=1e-6)


def test_every_epoch_sees_each_example_once_and_the_order_depends_on_seed_and_step_alone(
    arguments: LoopArguments,
) -> None:
    wide = make_batches(replace(arguments, per_device_train_batch_size=4, gradient_accumulation_steps=2))
    narrow = make_batches(replace(arguments, per_device_train_batch_size=2, gradient_accumulation_steps=4))
    orders = [[i for step in range(4) for batch in batches[step] for i in batch.indices] for batches in (wide, narrow)]
    assert orders[0] == orders[1]
    assert sorted(orders[0][:16]) == sorted(orders[0][16:]) == list(range(16))
    assert orders[0][:16] != orders[0][16:]
    other = make_batches(replace(arguments, seed=7))
    assert [b.indices for b in other[0]] != [b.indices for b in make_batches(arguments)[0]]


def test_epochs_that_the_step_size_does_not_divide_lose_and_repeat_nothing(arguments: LoopArguments) -> None:
    batches = make_batches(replace(arguments, per_device_train_batch_size=3, max_steps=-1, num_train_epochs=3), size=8)
    stream = [i for step in range(len(batches)) for batch in batches[step] for i in batch.indices]
    assert len(batches) == 8
    assert [sorted(stream[start : start + 8]) for start in (0, 8, 16)] == [list(range(8))] * 3


@pytest.mark.parametrize("rates", [{}, {"new_layers": "bias", "new_layers_learning_rate": 0.2}])
def test_a_resumed_run_ends_with_the_very_weights_of_an_uninterrupted_one(
    arguments: LoopArguments, tmp_path: Path, rates: dict[str, Any]
) -> None:
    arguments = replace(arguments, **rates)
    whole = run(replace(arguments, output_dir=str(tmp_path / "whole"), save_steps=3))
    first = replace(arguments, save_steps=3)

    class Stop(Exception):
        pass

    def crash(step: int) -> None:
        if step == 5:
            raise Stop

    with pytest.raises(Stop):
        run(first, before_step=crash)
    assert [path.name for path in checkpoints(Path(first.output_dir))] == ["checkpoint-3"]
    second = run(replace(first, resume_from_checkpoint="true"))
    assert second.seen == whole.seen[3:]
    assert torch.equal(second.linear.weight, whole.linear.weight)
    assert torch.equal(second.linear.bias, whole.linear.bias)
    histories = [
        [{k: v for k, v in entry.items() if k != "tokens_per_second"} for entry in trained.state.log_history]
        for trained in (whole, second)
    ]
    assert histories[0] == histories[1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_a_checkpoint_from_which_the_run_goes_on_unchanged(
    arguments: LoopArguments, tmp_path: Path, number: signal.Signals
) -> None:
    whole = run(replace(arguments, output_dir=str(tmp_path / "whole")))

    def interrupt(step: int) -> None:
        if step == 2:
            os.kill(os.getpid(), number)

    stopped = run(arguments, before_step=interrupt)
    assert stopped.state.interrupted
    assert stopped.state.step == 3
    assert not (Path(arguments.output_dir) / "w.safetensors").exists()
    resumed = run(replace(arguments, resume_from_checkpoint="true"))
    assert torch.equal(resumed.linear.weight, whole.linear.weight)


def test_an_incomplete_checkpoint_is_never_read(arguments: LoopArguments) -> None:
    run(replace(arguments, save_steps=2))
    output = Path(arguments.output_dir)
    assert [path.name for path in checkpoints(output)] == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    (output / "checkpoint-6" / "COMPLETE").unlink()
    assert checkpoint_to_resume(replace(arguments, resume_from_checkpoint="true")) == output / "checkpoint-4"
    with pytest.raises(UserError, match="checkpoint-6: is not a complete checkpoint"):
        checkpoint_to_resume(replace(arguments, resume_from_checkpoint=str(output / "checkpoint-6")))


def test_an_output_directory_with_a_run_in_it_is_not_overwritten_unless_asked(arguments: LoopArguments) -> None:
    run(arguments)
    with pytest.raises(UserError, match="holds a run already"):
        run(arguments)
    run(replace(arguments, overwrite_output_dir=True))


def test_the_best_model_is_on_top_and_survives_save_total_limit(arguments: LoopArguments) -> None:
    scores = {2: 0.3, 4: 0.9, 6: 0.5}
    plan = replace(
        arguments,
        eval_steps=2,
        save_steps=1,
        save_total_limit=1,
        metric_for_best_model="eval_retr/document_recall/recall4",
    )
    trained = run(plan, evaluate=lambda step: {"eval_retr/document_recall/recall4": scores[step]})
    output = Path(plan.output_dir)
    assert [path.name for path in checkpoints(output)] == ["checkpoint-4", "checkpoint-6"]
    best, top, last = (load_file(path / "w.safetensors")["linear.weight"]
                       for path in (output / "checkpoint-4", output, output / "checkpoint-6"))  # fmt: skip
    assert torch.equal(top, best)
    assert not torch.equal(top, last)
    state = json.loads((output / "trainer_state.json").read_text())
    assert state["best_metric"] == 0.9
    assert state["best_model_checkpoint"] == "checkpoint-4"
    assert torch.equal(trained.linear.weight, last)


def test_the_history_is_written_line_by_line(arguments: LoopArguments) -> None:
    state = run(replace(arguments, eval_steps=2), evaluate=lambda step: {"eval_loss": float(step)}).state
    lines = (Path(arguments.output_dir) / "log.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == state.log_history


def test_what_happened_is_an_entry_at_its_step_and_what_was_measured_a_mean(arguments: LoopArguments) -> None:
    plan = replace(arguments, logging_steps=3, max_steps=6)
    state = run(plan, before_step=lambda step: {"age": float(step), **({"renewed": True} if step == 4 else {})}).state
    assert [(entry["step"], entry["renewed"]) for entry in state.log_history if "renewed" in entry] == [(4, 1.0)]
    assert [(entry["step"], entry["age"]) for entry in state.log_history if "age" in entry] == [
        (1, 0),
        (3, 1.5),
        (6, 4),
    ]
    lines = (Path(arguments.output_dir) / "log.jsonl").read_text().splitlines()
    assert json.loads(lines[2]) == {"step": 4, "renewed": 1.0}


def test_tokens_a_second_are_those_of_the_steps_alone(
    arguments: LoopArguments, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An evaluation between two log lines takes time, and neither its time nor its end hides that of the steps."""
    now = [0.0]
    monkeypatch.setattr(journal, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def pass_by(seconds: float) -> dict[str, float]:
        now[0] += seconds
        return {}

    plan = replace(arguments, logging_steps=3, max_steps=6, eval_steps=2)
    evaluate = {"evaluate": lambda step: {"eval_loss": 1.0, **pass_by(1000)}}
    state = run(plan, before_step=lambda step: pass_by(2), **evaluate).state
    rates = [entry["tokens_per_second"] for entry in state.log_history if "tokens_per_second" in entry]
    assert rates == [4 / 2] * 3


def test_a_model_that_training_only_made_worse_is_left_as_it_was(arguments: LoopArguments) -> None:
    start = Regression().linear.weight
    run(replace(arguments, eval_on_start=True, eval_steps=2), evaluate=lambda step: {"eval_loss": float(step)})
    assert torch.equal(load_file(Path(arguments.output_dir) / "w.safetensors")["linear.weight"], start)


def test_a_loss_is_better_when_it_is_smaller(arguments: LoopArguments) -> None:
    scores = {2: 3.0, 4: 1.0, 6: 2.0}
    state = run(replace(arguments, eval_steps=2), evaluate=lambda step: {"eval_loss": scores[step]}).state
    assert (state.best_metric, state.best_model_checkpoint) == (1.0, "checkpoint-4")


def test_an_unknown_metric_is_refused_with_those_that_exist(arguments: LoopArguments) -> None:
    with pytest.raises(UserError, match="--metric_for_best_model bleu: not measured; choose one of eval_loss"):
        run(
            replace(arguments, metric_for_best_model="bleu", eval_on_start=True),
            evaluate=lambda step: {"eval_loss": 1.0},
        )


def test_evaluation_leaves_train_mode_on(arguments: LoopArguments) -> None:
    objective = Regression(dropout=0.5)
    modes = []

    def evaluate(step: int) -> dict[str, float]:
        objective.eval()
        return {"eval_loss": 1.0}

    run(
        replace(arguments, eval_steps=1),
        objective,
        evaluate=evaluate,
        before_step=lambda step: modes.append(objective.training),
    )
    assert modes == [True] * 6


@pytest.mark.parametrize(("strategy", "expected"), [("steps", [2, 4, 6]), ("epoch", [4, 6]), ("no", [6])])
def test_evaluation_strategies(arguments: LoopArguments, strategy: str, expected: list[int]) -> None:
    steps = []

    def evaluate(step: int) -> dict[str, float]:
        steps.append(step)
        return {"eval_loss": 1.0}

    run(replace(arguments, eval_strategy=strategy, eval_steps=2), evaluate=evaluate)
    assert steps == expected  # an epoch is 4 steps; the last step is always evaluated


def test_a_loss_that_is_not_finite_stops_with_step_and_examples_and_leaves_the_weights(
    arguments: LoopArguments,
) -> None:
    objective = Regression()
    before = objective.linear.weight.clone()
    batches = make_batches(arguments, poison=11)
    step = next(s for s in range(4) if 11 in batches[s][0].indices)
    Path(arguments.output_dir).mkdir()
    with pytest.raises(UserError, match=rf"step {step + 1}: the loss is not finite.*11") as error:
        train(objective, batches, arguments, CPU)
    assert str(sorted(batches[step][0].indices)) != ""
    assert objective.linear.weight.isfinite().all()
    assert step > 0 or torch.equal(objective.linear.weight, before)
    assert "Traceback" not in str(error.value)


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant", "constant_with_warmup"])
def test_learning_rates_are_those_of_transformers_schedules(arguments: LoopArguments, kind: str) -> None:
    plan = replace(arguments, lr_scheduler_type=kind, warmup_ratio=0.5, logging_steps=1)
    ours = [entry["learning_rate"] for entry in run(plan).state.log_history]
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=plan.learning_rate)
    schedule = get_scheduler(kind, optimizer, 3, 6)
    theirs = []
    for _ in range(6):
        optimizer.step()
        schedule.step()
        theirs.append(schedule.get_last_lr()[0])
    assert ours == pytest.approx(theirs)


def test_matrices_decay_and_vectors_do_not(arguments: LoopArguments) -> None:
    plan = replace(arguments, max_steps=1, lr_scheduler_type="constant", weight_decay=0.0)
    plain = run(plan, Regression())
    decayed = run(replace(plan, weight_decay=0.5, overwrite_output_dir=True), Regression())
    start = Regression().linear.weight
    torch.testing.assert_close(decayed.linear.weight, plain.linear.weight - 0.05 * 0.5 * start)
    assert torch.equal(decayed.linear.bias, plain.linear.bias)


def test_new_layers_learn_at_their_own_rate(arguments: LoopArguments) -> None:
    plan = replace(arguments, max_steps=1, lr_scheduler_type="constant", adam_epsilon=0.0)
    start = Regression().linear
    trained = run(replace(plan, new_layers="bias$", new_layers_learning_rate=0.2), Regression()).linear
    # Adam's first step is the rate itself, whatever the gradient.
    torch.testing.assert_close((trained.weight - start.weight).abs(), torch.full((1, 4), 0.05))
    torch.testing.assert_close((trained.bias - start.bias).abs(), torch.full((1,), 0.2))


def test_new_layers_that_nothing_is_named_are_refused(arguments: LoopArguments) -> None:
    with pytest.raises(UserError, match="--new_layers crossattention: found in the name of no parameter"):
        run(replace(arguments, new_layers="crossattention", new_layers_learning_rate=0.2))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"new_layers": "bias"}, "--new_layers: goes with --new_layers_learning_rate"),
        ({"new_layers_learning_rate": 0.1}, "--new_layers: goes with --new_layers_learning_rate"),
        ({"new_layers": "(", "new_layers_learning_rate": 0.1}, r"--new_layers \(: is no regular expression"),
        (
            {"new_layers": "bias", "new_layers_learning_rate": -1.0},
            "--new_layers_learning_rate -1.0: must be at least 0",
        ),
    ],
)
def test_rates_of_new_layers_that_make_no_sense_are_refused(
    arguments: LoopArguments, flags: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        replace(arguments, **flags)


def test_the_first_step_and_every_logging_step_are_logged_with_their_mean_loss(arguments: LoopArguments) -> None:
    every, some = (
        run(replace(arguments, logging_steps=n, overwrite_output_dir=True)).state.log_history for n in (1, 3)
    )
    assert [entry["step"] for entry in some] == [1, 3, 6]
    assert some[2]["loss"] == pytest.approx(sum(entry["loss"] for entry in every[3:]) / 3)
    assert some[0]["answer"] == 42.0


def test_batches_made_ahead_by_workers_are_the_same_batches(arguments: LoopArguments) -> None:
    ours, theirs = (
        run(replace(arguments, dataloader_num_workers=n, overwrite_output_dir=True)).linear.weight for n in (0, 2)
    )
    assert torch.equal(ours, theirs)


def test_before_step_comes_before_the_batch_is_made(arguments: LoopArguments) -> None:
    made: list[str] = []

    def collate(indices: Sequence[int]) -> Batch:
        made.append("batch")
        return Batch(torch.ones(len(indices), 4), torch.ones(len(indices)), tuple(indices))

    Path(arguments.output_dir).mkdir()
    train(
        Regression(),
        Batches(16, collate, arguments),
        arguments,
        CPU,
        before_step=lambda step: made.append(f"before {step}"),
    )
    assert made == [event for step in range(6) for event in (f"before {step}", "batch")]


def test_bf16_and_fp16_together_and_fp16_on_a_cpu_are_refused(arguments: LoopArguments) -> None:
    with pytest.raises(UserError, match="exclude each other"):
        run(replace(arguments, bf16=True, fp16=True))
    with pytest.raises(UserError, match="needs a CUDA device"):
        run(replace(arguments, fp16=True))


def test_bf16_autocast_is_used_where_the_cpu_has_it(arguments: LoopArguments, monkeypatch: pytest.MonkeyPatch) -> None:
    from rqa.runtime import precision

    class Spy(Regression):
        def forward(self, batch: Batch) -> tuple[Tensor, dict[str, float]]:
            dtypes.add(self.linear(batch.rows).dtype)
            return super().forward(batch)

    for has_bf16, expected in ((True, torch.bfloat16), (False, torch.float32)):
        precision.compute_dtype.cache_clear()
        monkeypatch.setattr(precision, "cpu_has_bf16", lambda answer=has_bf16: answer)
        dtypes: set[torch.dtype] = set()
        trained = run(replace(arguments, bf16=True, overwrite_output_dir=True), Spy())
        assert dtypes == {expected}
        assert trained.linear.weight.dtype == torch.float32
        assert math.isfinite(trained.state.log_history[-1]["loss"])
    precision.compute_dtype.cache_clear()
