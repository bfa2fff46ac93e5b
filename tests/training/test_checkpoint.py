"""Checkpoints that were damaged, half-written, left behind by a crash, or continued under other circumstances."""

import os
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import pytest
from fakes import Regression, full_disk, run, same_weights, weight_in
from safetensors.torch import load_file, save_file

from rqa.runtime import files
from rqa.runtime.errors import UserError
from rqa.runtime.files import atomic_file, damage
from rqa.training.arguments import LoopArguments
from rqa.training.checkpoint import checkpoint_to_resume


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


def names(output: str | Path, pattern: str = "checkpoint-*") -> list[str]:
    return sorted(path.name for path in Path(output).glob(pattern))


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


class Drift:
    """A `before_step` with a state of its own, renewed after steps 0, 2 and 5 as an index is."""

    def __init__(self) -> None:
        self.version: str | None = None
        self.bias = torch.zeros(1)
        self.calls: list[float] = []
        self.saved: list[str] = []

    def __call__(self, step: int) -> dict[str, float]:
        if step in (0, 2, 5):
            self.version, self.bias = f"index-{step}", torch.randn(1, generator=torch.Generator().manual_seed(step))
        self.calls.append(float(self.bias))
        return {}

    def collect(self) -> None:
        pass

    def save(self, directory: Path) -> None:
        self.saved.append(str(self.version))
        save_file({"bias": self.bias}, directory / "bias.safetensors")

    def load(self, directory: Path) -> None:
        self.version, self.bias = directory.name, load_file(directory / "bias.safetensors")["bias"]


def test_what_was_measured_is_continued_with_unless_a_flag_says_otherwise(flags: LoopArguments) -> None:
    first = Regression()
    first.measured = {"temperature": 2.0}
    run(replace(flags, max_steps=2), first)
    for given, used in (({}, 2.0), ({"temperature": 7.0}, 7.0)):
        again = Regression()
        again.measured = given
        run(replace(flags, max_steps=3, resume_from_checkpoint="true"), again)
        assert again.measured == {"temperature": used}


def test_step_0_is_evaluated_once_and_a_better_model_that_was_not_saved_is_said(
    flags: LoopArguments, caplog: pytest.LogCaptureFixture
) -> None:
    losses = {"evaluate": lambda step: {"eval_loss": float(step)}, "evaluate_first": True}
    run(replace(flags, max_steps=2, save_strategy="no"), **losses)
    assert "keeps the last model, although eval_loss was better before" in caplog.text
    state = run(replace(flags, max_steps=2, overwrite_output_dir=True), **losses).state
    assert state.best_model_checkpoint == "checkpoint-0"
    first = str(Path(flags.output_dir) / "checkpoint-0")
    again = run(replace(flags, max_steps=2, resume_from_checkpoint=first), **losses).state
    assert [entry["step"] for entry in again.log_history if "eval_loss" in entry].count(0) == 1


def test_a_run_is_not_overwritten_unless_asked_and_its_past_never_replaces_the_newest(flags: LoopArguments) -> None:
    """And where no checkpoint is good nothing is deleted: the user decides."""
    run(flags)
    with pytest.raises(UserError, match="already holds a run"):
        run(flags)
    flip_a_bit(Path(flags.output_dir) / "checkpoint-6" / "w.safetensors")
    run(replace(flags, resume_from_checkpoint="true", max_steps=5, save_total_limit=1))
    flip_a_bit(Path(flags.output_dir) / "checkpoint-5" / "w.safetensors")
    with pytest.raises(UserError, match="no checkpoint can be used; start over"):
        run(replace(flags, resume_from_checkpoint="true"))
    assert names(flags.output_dir) == ["checkpoint-5"]
    run(replace(flags, overwrite_output_dir=True, max_steps=4))
    assert names(flags.output_dir) == ["checkpoint-2", "checkpoint-4"]


def test_a_damaged_best_model_gives_way_to_the_last(flags: LoopArguments, caplog: pytest.LogCaptureFixture) -> None:
    def evaluate(step: int) -> dict[str, float]:
        if step == 6:
            flip_a_bit(Path(flags.output_dir) / "checkpoint-2" / "w.safetensors")
        return {"eval_loss": float(step)}

    trained = run(replace(flags, eval_steps=2), evaluate=evaluate)
    assert any("checkpoint-2 cannot be used" in line for line in warnings_of(caplog))
    assert torch.equal(weight_in(Path(flags.output_dir)), trained.linear.weight)


@pytest.mark.parametrize(
    ("owner", "name"), [(Regression, "save_pretrained"), (torch, "save"), (files, "write_json"), (Drift, "save")]
)
def test_a_disk_that_takes_no_more_stops_the_run_with_one_line_and_the_last_checkpoint_intact(
    owner: Any, name: str, flags: LoopArguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, write = run(replace(flags, output_dir=str(tmp_path / "whole")), before_step=Drift()), getattr(owner, name)
    output = Path(flags.output_dir)

    def fill(*given: object) -> None:
        is_last = (output / "checkpoint-4").exists() and any("/.rqa-" in str(path) for path in given)
        with full_disk(10) if is_last else nullcontext():
            write(*given)

    monkeypatch.setattr(owner, name, fill)
    with pytest.raises(UserError) as error:
        run(flags, before_step=Drift())
    monkeypatch.undo()
    assert "checkpoint-6: cannot be written" in str(error.value)
    assert f"free disk space and continue from {output / 'checkpoint-4'}" in str(error.value)
    assert "\n" not in str(error.value)
    assert damage(output / "checkpoint-4") is None
    assert not names(output, ".*")
    assert same_weights(run(replace(flags, resume_from_checkpoint="true"), before_step=Drift()), whole)


def test_a_write_that_the_disk_refuses_names_the_file(tmp_path: Path) -> None:
    with full_disk(10), pytest.raises(OSError) as error, atomic_file(tmp_path / "rows.jsonl") as path:
        path.write_text("x" * 100)
    assert error.value.filename == str(tmp_path / "rows.jsonl")
    assert list(tmp_path.iterdir()) == []


def test_what_a_crash_left_half_written_is_cleaned_and_a_retired_checkpoint_regains_its_name(
    flags: LoopArguments,
) -> None:
    run(flags)
    output = Path(flags.output_dir)
    theirs = [".notes.tmp", ".bashrc.old", ".rqa-notes"]
    for name in theirs:
        (output / name).touch()
    left = [
        output / f".rqa-{letter * 32}{name}"
        for letter, name in zip("abcd", ("", "", "-checkpoint-4", "-checkpoint-6"), strict=True)
    ]
    (left[0] / "1_Pooling").mkdir(parents=True)
    left[1].write_text("{")
    shutil.copytree(output / "checkpoint-4", left[2])
    (output / "checkpoint-6").rename(left[3])
    with atomic_file(output / "being-written") as alive:
        for path in (*left, alive):
            os.utime(path, (0, 0))
        assert checkpoint_to_resume(replace(flags, resume_from_checkpoint="true")) == output / "checkpoint-6"
        assert names(output, ".*") == sorted([*theirs, ".rqa-model.json", alive.name])


def test_the_flags_of_the_command_line_win_over_those_of_the_checkpoint(flags: LoopArguments) -> None:
    run(replace(flags, max_steps=4))
    changed = replace(flags, max_steps=8, learning_rate=0.01, weight_decay=0.5, lr_scheduler_type="constant")
    history = run(replace(changed, resume_from_checkpoint="true", logging_steps=1)).state.log_history
    assert [entry["learning_rate"] for entry in history if entry["step"] > 4] == [0.01] * 4


def measured(losses: dict[int, float]) -> Callable[[int], dict[str, float]]:
    """An `evaluate` whose loss and accuracy have their best values at other steps."""
    return lambda step: {"eval_loss": losses[step], "eval_accuracy": float(step)}


def test_the_best_model_of_another_directory_or_metric_is_chosen_again_with_one_line(
    flags: LoopArguments, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def told() -> list[str]:
        lines = [line for line in warnings_of(caplog) if "best model" in line]
        caplog.clear()
        return lines

    first = replace(flags, max_steps=4, eval_steps=2)
    run(first, evaluate=measured({2: 0.1, 4: 0.5}))
    run(replace(first, resume_from_checkpoint="true"))
    assert told() == []
    start = Path(first.output_dir) / "checkpoint-4"
    other = replace(first, output_dir=str(tmp_path / "other"), max_steps=6, resume_from_checkpoint=str(start))
    resumed = run(other, evaluate=measured({6: 0.9}))
    (line,) = told()
    assert "none, not checkpoint-2 (0.1)" in line
    assert (resumed.state.best_metric, resumed.state.best_model_checkpoint) == (0.9, "checkpoint-6")
    assert torch.equal(weight_in(tmp_path / "other"), resumed.linear.weight)
    assert (tmp_path / "other" / "log.jsonl").read_text().count("\n") == len(resumed.state.log_history)
    with pytest.raises(UserError, match="already holds a run"):
        run(other)
    run(replace(other, overwrite_output_dir=True, max_steps=5))
    assert names(tmp_path / "other") == ["checkpoint-5"]
    told()
    again = replace(first, max_steps=6, resume_from_checkpoint="true", metric_for_best_model="accuracy")
    resumed = run(again, evaluate=lambda step: {"eval_accuracy": 0.0})
    (line,) = told()
    assert "checkpoint-4 (4.0), not checkpoint-2 (0.1)" in line
    assert (resumed.state.best_metric, resumed.state.best_model_checkpoint) == (4.0, "checkpoint-4")


def test_another_step_size_goes_on_where_the_stream_was_left(flags: LoopArguments) -> None:
    """Another number of processes is another step size, too: no example is lost, none repeated."""
    wide = replace(flags, max_steps=-1, num_train_epochs=2)
    run(replace(wide, max_steps=3))
    resumed = run(replace(wide, per_device_train_batch_size=2, resume_from_checkpoint="true"))
    whole = run(replace(wide, output_dir=flags.output_dir + "-whole"))
    assert resumed.seen == whole.seen[12:]
    assert resumed.state.step == 3 + (32 - 12) // 2
    assert sorted(whole.seen) == sorted([*range(16)] * 2)


def test_an_index_is_saved_once_shared_by_checkpoints_restored_and_deleted_with_the_last_of_them(
    flags: LoopArguments, tmp_path: Path
) -> None:
    whole, first, second, third = Drift(), Drift(), Drift(), Drift()
    every = replace(flags, save_steps=1)
    run(replace(every, output_dir=str(tmp_path / "whole")), before_step=whole)
    assert whole.saved == names(tmp_path / "whole", "index-*") == ["index-0", "index-2", "index-5"]
    run(replace(every, max_steps=4), before_step=first)
    assert first.saved == names(flags.output_dir, "index-*") == ["index-0", "index-2"]
    assert not [path for path in Path(flags.output_dir).rglob("bias.*") if "checkpoint" in str(path)]
    resume = replace(every, resume_from_checkpoint="true", save_total_limit=2)
    run(resume, before_step=second)
    assert first.calls + second.calls == whole.calls
    assert second.saved == names(flags.output_dir, "index-*")[1:] == ["index-5"]  # checkpoint-5 needs index-2 still
    start = Path(flags.output_dir) / "checkpoint-5"
    run(replace(every, output_dir=str(tmp_path / "other"), resume_from_checkpoint=str(start)), before_step=third)
    assert [*whole.calls[:5], *third.calls] == whole.calls
    assert names(tmp_path / "other", "index-*") == ["index-5"]


@pytest.mark.parametrize(
    ("part", "harm"),
    [("index-5", shutil.rmtree), ("index-5", lambda path: flip_a_bit(path / "bias.safetensors")),
     ("checkpoint-6", lambda path: flip_a_bit(path / "w.safetensors"))],
)  # fmt: skip
def test_a_damaged_checkpoint_or_index_is_named_once_and_the_one_before_it_continues_to_the_very_same_weights(
    part: str, harm: Callable[[Path], object], flags: LoopArguments, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever the damage: see test_fuzz.py."""
    whole, resumed, output = Drift(), Drift(), Path(flags.output_dir)
    trained = run(flags, before_step=whole)
    harm(output / part)
    with pytest.raises(UserError, match="checkpoint-6: is not a complete checkpoint"):
        run(replace(flags, resume_from_checkpoint=str(output / "checkpoint-6")), before_step=Drift())
    caplog.clear()
    again = replace(flags, resume_from_checkpoint="true", save_total_limit=1)
    assert same_weights(run(again, before_step=resumed), trained)
    reason = "index-5, which it needs: " if part == "index-5" else ""
    assert sum(f"checkpoint-6 cannot be used ({reason}" in line for line in warnings_of(caplog)) == 1
    assert resumed.calls == whole.calls[4:]
    assert (names(output), resumed.saved) == (["checkpoint-6"], ["index-5"])
    assert damage(output / "index-5") is damage(output / "checkpoint-6") is None
