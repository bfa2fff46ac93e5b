"""Checkpoints that were damaged, half-written, left behind by a crash, or continued under other circumstances."""

import logging
import resource
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import pytest
from torch import Tensor, nn
from safetensors.torch import load_file, save_file

from rqa.recipe import open_output
from rqa.runtime.errors import UserError
from rqa.runtime.files import atomic_file, damage
from rqa.training import checkpoint
from rqa.training.arguments import LoopArguments
from rqa.training.checkpoint import checkpoint_to_resume, checkpoints, delete_old_checkpoints
from rqa.training.journal import RunState
from rqa.training.loop import Batches, train

CPU = torch.device("cpu")


@dataclass
class Batch:
    rows: Tensor
    indices: tuple[int, ...]

    @property
    def weight(self) -> float:
        return float(len(self.rows))

    num_tokens = 1

    def to(self, device: torch.device) -> "Batch":
        return self


class Regression(nn.Module):
    """A linear layer whose loss is the squared error."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.linear = nn.Linear(4, 1)
        self.seen: list[int] = []

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        self.seen += batch.indices
        return ((self.linear(batch.rows).squeeze(-1) - batch.rows.sum(-1)) ** 2).sum(), {}

    def save_pretrained(self, directory: str | Path) -> None:
        save_file(dict(self.state_dict()), Path(directory) / "w.safetensors")


def make_batches(arguments: LoopArguments, size: int = 16) -> Batches:
    rows = torch.randn(size, 4, generator=torch.Generator().manual_seed(5))

    def collate(indices: Sequence[int]) -> Batch:
        return Batch(rows[list(indices)], tuple(indices))

    return Batches(size, collate, arguments)


def run(arguments: LoopArguments, **options: object) -> Regression:
    Path(arguments.output_dir).mkdir(parents=True, exist_ok=True)
    objective = Regression()
    start = checkpoint_to_resume(arguments)
    open_output(arguments, [arguments], start)
    if start:
        objective.load_state_dict(load_file(start / "w.safetensors"))
    objective.state = train(objective, make_batches(arguments), arguments, CPU, checkpoint=start, **options)
    return objective


@pytest.fixture
def arguments(tmp_path: Path) -> LoopArguments:
    return LoopArguments(
        output_dir=str(tmp_path / "run"),
        max_steps=6,
        per_device_train_batch_size=4,
        learning_rate=0.05,
        save_steps=2,
        metric_for_best_model="loss",
    )


@pytest.fixture(autouse=True)
def _close_log_files() -> None:
    yield
    logger = logging.getLogger("rqa")
    for handler in [handler for handler in logger.handlers if isinstance(handler, logging.FileHandler)]:
        handler.close()
        logger.removeHandler(handler)


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


def _flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "flipped bit": lambda path: _flip_a_bit(path / "training_state.pt"),
    "flipped bit in the weights": lambda path: _flip_a_bit(path / "w.safetensors"),
    "cut short": lambda path: (path / "training_state.pt").write_bytes((path / "training_state.pt").read_bytes()[:99]),
    "file gone": lambda path: (path / "w.safetensors").unlink(),
    "no mark": lambda path: (path / "COMPLETE").unlink(),
    "empty mark": lambda path: (path / "COMPLETE").write_bytes(b""),
    "mark of another kind": lambda path: (path / "COMPLETE").write_text("[1]"),
}


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_checkpoint_is_named_once_and_the_one_before_it_continues_to_the_very_same_weights(
    how: str, arguments: LoopArguments, caplog: pytest.LogCaptureFixture
) -> None:
    whole = run(arguments)
    output = Path(arguments.output_dir)
    DAMAGES[how](output / "checkpoint-6")
    again = replace(arguments, resume_from_checkpoint="true", save_total_limit=1)
    resumed = run(again)
    assert sum("checkpoint-6 cannot be used" in line for line in warnings_of(caplog)) == 1
    assert torch.equal(resumed.linear.weight, whole.linear.weight)
    assert len(resumed.seen) == 2 * 4
    assert [path.name for path in checkpoints(output)] == ["checkpoint-6"]
    assert damage(output / "checkpoint-6") is None
    DAMAGES[how](output / "checkpoint-6")
    with pytest.raises(UserError, match="checkpoint-6: is not a complete checkpoint"):
        run(replace(arguments, resume_from_checkpoint=str(output / "checkpoint-6")))


def test_when_no_checkpoint_is_good_nothing_is_deleted_and_the_user_decides(arguments: LoopArguments) -> None:
    run(replace(arguments, max_steps=2))
    newest = Path(arguments.output_dir) / "checkpoint-2"
    _flip_a_bit(newest / "w.safetensors")
    with pytest.raises(UserError, match="no checkpoint can be used; start afresh"):
        run(replace(arguments, resume_from_checkpoint="true"))
    assert newest.is_dir()


def test_a_newer_checkpoint_of_a_given_up_past_never_replaces_the_newest(arguments: LoopArguments) -> None:
    run(arguments)
    output = Path(arguments.output_dir)
    _flip_a_bit(output / "checkpoint-6" / "w.safetensors")
    limited = replace(arguments, resume_from_checkpoint="true", max_steps=5, save_total_limit=1)
    run(limited)
    assert [path.name for path in checkpoints(output)] == ["checkpoint-5"]


def test_the_limit_spares_the_best_and_the_only_one(tmp_path: Path) -> None:
    for step in (2, 4, 6):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "COMPLETE").write_text("{}")
    delete_old_checkpoints(tmp_path, 1, RunState(step=6, best_model_checkpoint="checkpoint-2"))
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-6"]
    delete_old_checkpoints(tmp_path, 5, RunState(step=6))
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-6"]


def test_a_damaged_best_model_is_replaced_by_the_last_with_one_line(
    arguments: LoopArguments, caplog: pytest.LogCaptureFixture
) -> None:
    def evaluate(step: int) -> dict[str, float]:
        if step == 6:
            _flip_a_bit(Path(arguments.output_dir) / "checkpoint-2" / "w.safetensors")
        return {"eval_loss": float(step)}

    trained = run(replace(arguments, eval_steps=2), evaluate=evaluate)
    assert any("checkpoint-2, the best, cannot be used" in line for line in warnings_of(caplog))
    top = load_file(Path(arguments.output_dir) / "w.safetensors")
    assert torch.equal(top["linear.weight"], trained.linear.weight)


@contextmanager
def full_disk() -> Iterator[None]:
    """A limit on file size stands for it: the kernel refuses the write in the midst of a file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)


@pytest.mark.parametrize("where", ["weights", "tensors", "state"])
def test_a_disk_that_takes_no_more_stops_the_run_with_one_line_and_the_last_checkpoint_intact(
    where: str, arguments: LoopArguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(replace(arguments, output_dir=str(tmp_path / "whole")))
    owner, name = {
        "weights": (Regression, "save_pretrained"),
        "tensors": (torch, "save"),
        "state": (checkpoint, "write_json"),
    }[where]
    write = getattr(owner, name)

    def fill(*arguments: object) -> None:
        directory = str(arguments[-1] if where != "state" else arguments[0])
        with full_disk() if "checkpoint-6" in directory else nullcontext():
            write(*arguments)

    monkeypatch.setattr(owner, name, fill)
    with pytest.raises(UserError) as error:
        run(arguments)
    monkeypatch.undo()
    output = Path(arguments.output_dir)
    assert "checkpoint-6: cannot be written" in str(error.value)
    assert f"continue from {output / 'checkpoint-4'}" in str(error.value)
    assert "\n" not in str(error.value)
    assert damage(output / "checkpoint-4") is None
    assert not [path for path in output.iterdir() if path.name.startswith(".")]
    resumed = run(replace(arguments, resume_from_checkpoint="true"))
    assert torch.equal(resumed.linear.weight, whole.linear.weight)


def test_a_write_that_the_disk_refuses_names_the_file(tmp_path: Path) -> None:
    with full_disk(), pytest.raises(OSError) as error, atomic_file(tmp_path / "rows.jsonl") as path:
        path.write_text("x" * 100)
    assert error.value.filename == str(tmp_path / "rows.jsonl")
    assert list(tmp_path.iterdir()) == []


def test_what_a_crash_left_half_written_is_cleaned_and_a_retired_checkpoint_gets_its_name_back(
    arguments: LoopArguments,
) -> None:
    run(arguments)
    output = Path(arguments.output_dir)
    (output / ".checkpoint-8.abc.tmp" / "1_Pooling").mkdir(parents=True)
    (output / ".trainer_state.json.12.tmp").write_text("{")
    shutil.copytree(output / "checkpoint-4", output / ".checkpoint-4.xyz.old")
    (output / "checkpoint-6").rename(output / ".checkpoint-6.abc.old")
    assert checkpoint_to_resume(replace(arguments, resume_from_checkpoint="true")) == output / "checkpoint-6"
    assert not [path.name for path in output.iterdir() if path.name.startswith(".")]


def test_other_arguments_are_told_and_the_command_line_wins(
    arguments: LoopArguments, caplog: pytest.LogCaptureFixture
) -> None:
    run(replace(arguments, max_steps=4))
    changed = replace(arguments, max_steps=8, learning_rate=0.01, weight_decay=0.5, lr_scheduler_type="constant")
    resumed = run(replace(changed, resume_from_checkpoint="true", logging_steps=1))
    (line,) = [line for line in warnings_of(caplog) if "other arguments" in line]
    for change in ("--learning_rate 0.01 (was 0.05)", "--weight_decay 0.5 (was 0.0)", "--max_steps 8 (was 4)"):
        assert change in line
    assert "the command line wins" in line
    assert "resume_from_checkpoint" not in line
    assert {entry["learning_rate"] for entry in resumed.state.log_history if entry["step"] > 4} == {0.01}


@dataclass
class Measured:
    """An `evaluate` whose loss and accuracy have their best values at other steps."""

    losses: dict[int, float]

    def __call__(self, step: int) -> dict[str, float]:
        return {"eval_loss": self.losses[step], "eval_accuracy": float(step)}


def test_the_best_model_of_another_directory_is_forgotten_with_one_line(
    arguments: LoopArguments, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = replace(arguments, max_steps=4, eval_steps=2)
    run(first, evaluate=Measured({2: 0.1, 4: 0.5}))
    start = Path(first.output_dir) / "checkpoint-4"
    other = replace(first, output_dir=str(tmp_path / "other"), max_steps=6, resume_from_checkpoint=str(start))
    resumed = run(other, evaluate=Measured({6: 0.9}))
    (line,) = [line for line in warnings_of(caplog) if "best model" in line]
    assert "none, not checkpoint-2 (0.1)" in line
    assert (resumed.state.best_metric, resumed.state.best_model_checkpoint) == (0.9, "checkpoint-6")
    assert torch.equal(load_file(tmp_path / "other" / "w.safetensors")["linear.weight"], resumed.linear.weight)
    log_lines = (tmp_path / "other" / "log.jsonl").read_text().splitlines()
    assert len(log_lines) == len(resumed.state.log_history)
    with pytest.raises(UserError, match="holds a run already"):
        run(other)
    run(replace(other, overwrite_output_dir=True, max_steps=5))
    assert [path.name for path in checkpoints(tmp_path / "other")] == ["checkpoint-5"]


def test_by_another_metric_the_best_is_chosen_again_among_the_models_that_stand(
    arguments: LoopArguments, caplog: pytest.LogCaptureFixture
) -> None:
    first = replace(arguments, max_steps=4, eval_steps=2)
    run(first, evaluate=Measured({2: 0.1, 4: 0.5}))
    again = replace(first, max_steps=6, resume_from_checkpoint="true", metric_for_best_model="accuracy")
    resumed = run(again, evaluate=lambda step: {"eval_accuracy": 0.0})
    (line,) = [line for line in warnings_of(caplog) if "best model" in line]
    assert "checkpoint-4 (4.0), not checkpoint-2 (0.1)" in line
    assert (resumed.state.best_metric, resumed.state.best_model_checkpoint) == (4.0, "checkpoint-4")


def test_the_same_arguments_are_not_worth_a_line(arguments: LoopArguments, caplog: pytest.LogCaptureFixture) -> None:
    evaluated = replace(arguments, eval_steps=2)
    run(evaluated, evaluate=Measured({2: 0.3, 4: 0.1, 6: 0.2}))
    run(replace(evaluated, resume_from_checkpoint="true"))
    assert warnings_of(caplog) == []


def test_another_step_size_goes_on_where_the_stream_was_left(arguments: LoopArguments) -> None:
    """Another number of processes is another step size, too: no example is lost, none repeated."""
    wide = replace(arguments, max_steps=-1, num_train_epochs=2, per_device_train_batch_size=4, save_steps=3)

    def stop(step: int) -> None:
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(wide, before_step=stop)
    narrow = replace(wide, per_device_train_batch_size=2, resume_from_checkpoint="true", logging_steps=1)
    resumed = run(narrow)
    whole = run(replace(wide, output_dir=arguments.output_dir + "-whole"))
    assert resumed.seen == whole.seen[12:]
    assert resumed.state.step == 3 + (32 - 12) // 2
    assert sorted(whole.seen) == sorted([*range(16)] * 2)


class Drift:
    """A `before_step` with a state of its own, renewed every third step as an index is."""

    def __init__(self, objective: Regression | None = None) -> None:
        self.bias = torch.zeros(1)
        self.calls: list[float] = []

    def __call__(self, step: int) -> None:
        if step % 3 == 0:
            self.bias = torch.randn(1, generator=torch.Generator().manual_seed(step))
        self.calls.append(float(self.bias))

    def snapshot(self) -> Callable[[Path], None]:
        return lambda directory: save_file({"bias": self.bias}, directory / "bias.safetensors")

    def load(self, directory: Path) -> None:
        self.bias = load_file(directory / "bias.safetensors")["bias"]


def test_live_state_between_two_renewals_is_that_of_the_uninterrupted_run(arguments: LoopArguments) -> None:
    whole, first, second = Drift(), Drift(), Drift()
    run(replace(arguments, output_dir=arguments.output_dir + "-whole"), before_step=whole)
    run(replace(arguments, max_steps=4), before_step=first)
    run(replace(arguments, resume_from_checkpoint="true"), before_step=second)
    assert first.calls + second.calls == whole.calls
    assert not (Path(arguments.output_dir) / "live_state").exists()
