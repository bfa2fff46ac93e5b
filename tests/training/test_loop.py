"""The loop, its batches, its optimizer and its log, with an objective small enough to compute by hand."""

import json
import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch
import pytest
from torch import Tensor, nn
from fakes import Batch, Regression, make_batches, run, same_weights, weight_in
from safetensors.torch import load_file
from transformers import BertConfig, BertModel, PreTrainedConfig, PreTrainedModel

from rqa.runtime import distributed
from rqa.runtime.errors import UserError
from rqa.training import journal
from rqa.training.arguments import LoopArguments
from rqa.training.checkpoint import checkpoints
from rqa.training.journal import Journal, RunState, read_state, start_tracker
from rqa.training.loop import Batches, train
from rqa.training.optim import Optimization, usual_learning_rate


@pytest.mark.parametrize(("count", "size"), [(1, 8), (2, 4), (8, 1)])
def test_any_split_into_micro_batches_gives_the_same_weights(flags: LoopArguments, count: int, size: int) -> None:
    plan = replace(flags, max_steps=1, max_grad_norm=0.0, lr_scheduler_type="constant", per_device_train_batch_size=8)
    split = replace(plan, per_device_train_batch_size=size, gradient_accumulation_steps=count)
    ours, reference = run(split, Regression()).linear.weight, Regression()
    everything = make_batches(plan)[0][0]
    (reference(everything)[0] / everything.weight).backward()
    torch.optim.AdamW(reference.parameters(), lr=0.05, weight_decay=0.0).step()
    torch.testing.assert_close(ours, reference.linear.weight, rtol=1e-5, atol=1e-6)


def stream(batches: Batches) -> list[int]:
    return [i for step in range(len(batches)) for batch in batches[step] for i in batch.indices]


def test_every_epoch_sees_each_example_once_in_an_order_of_seed_and_step_alone(flags: LoopArguments) -> None:
    whole = replace(flags, max_steps=-1, num_train_epochs=3)
    changes = [{}, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
               {"per_device_train_batch_size": 3}, {"seed": 7}]  # fmt: skip
    wide, narrow, uneven, other = (stream(make_batches(replace(whole, **change), size=8)) for change in changes)
    assert wide == narrow == uneven  # three epochs of eight: three steps of three end within an epoch
    assert [sorted(wide[start : start + 8]) for start in (0, 8, 16)] == [list(range(8))] * 3
    assert wide[:8] not in (wide[8:16], other[:8])


@pytest.mark.parametrize("how", ["crash", "crash in bf16", signal.SIGTERM, signal.SIGINT])
def test_a_run_that_was_stopped_and_resumed_ends_with_the_very_weights_of_an_uninterrupted_one(
    how: str | signal.Signals, flags: LoopArguments, has_bf16: Callable[[bool], None], tmp_path: Path
) -> None:
    has_bf16(True)
    kind, bf16 = (InModel, True) if how == "crash in bf16" else (Regression, False)
    new_layers = {"new_layers": "bias", "new_layers_learning_rate": 0.2}
    flags = replace(flags, save_steps=3, logging_steps=4, learning_rate=0.01, bf16=bf16, **new_layers)
    whole = run(replace(flags, output_dir=str(tmp_path / "whole")), kind(dropout=0.2))

    def stop(step: int) -> dict[str, float]:
        if step == 4 and isinstance(how, str):
            raise RuntimeError
        if step == 2 and not isinstance(how, str):
            os.kill(os.getpid(), how)
        return {}

    if isinstance(how, str):
        with pytest.raises(RuntimeError):
            run(flags, kind(dropout=0.2), before_step=stop)
    else:
        stopped = run(flags, before_step=stop).state
        assert (stopped.interrupted, stopped.step) == (True, 3)
        assert not (Path(flags.output_dir) / "w.safetensors").exists()
    assert [path.name for path in checkpoints(Path(flags.output_dir))] == ["checkpoint-3"]
    second = run(replace(flags, resume_from_checkpoint="true"), kind(dropout=0.2))
    assert second.seen == whole.seen[12:]
    ends = [load_file(Path(output) / "w.safetensors") for output in (flags.output_dir, tmp_path / "whole")]
    assert all(torch.equal(weight, ends[1][name]) for name, weight in ends[0].items())
    ours, theirs = ({e["step"]: e["loss"] for e in each.state.log_history} for each in (second, whole))
    every = run(replace(flags, output_dir=str(tmp_path / "every"), logging_steps=1), kind(dropout=0.2))
    losses = [entry["loss"] for entry in every.state.log_history]
    assert theirs[4] == pytest.approx(sum(losses[1:4]) / 3)
    assert ours == theirs | {4: losses[3]}  # the first line after resuming is of its own steps


def test_the_best_model_is_on_top_and_survives_save_total_limit(flags: LoopArguments) -> None:
    scores = {2: 0.3, 4: 0.9, 6: 0.5}
    metric = "eval_retr/document_recall/recall4"
    plan = replace(flags, eval_steps=2, save_steps=1, save_total_limit=1, metric_for_best_model=metric)
    trained = run(plan, evaluate=lambda step: {metric: scores[step]})
    output = Path(plan.output_dir)
    assert [path.name for path in checkpoints(output)] == ["checkpoint-4", "checkpoint-6"]
    assert torch.equal(weight_in(output), weight_in(output / "checkpoint-4"))
    assert torch.equal(trained.linear.weight, weight_in(output / "checkpoint-6"))
    assert not torch.equal(weight_in(output), trained.linear.weight)
    state = json.loads((output / "trainer_state.json").read_text())
    assert (state["best_metric"], state["best_model_checkpoint"]) == (0.9, "checkpoint-4")


@pytest.mark.parametrize(
    ("losses", "best"), [({0: 9, 3: 3.0, 6: 1.0}, 6), ({0: 1.0, 3: 1.0, 6: 1.5}, 3), ({0: 1.0, 3: 2.0, 6: 3.0}, 0)]
)
def test_a_loss_is_better_when_smaller_a_tie_goes_to_the_later_model_and_one_that_never_improves_is_told(
    losses: dict[int, float], best: int, flags: LoopArguments, caplog: pytest.LogCaptureFixture
) -> None:
    plan = replace(flags, eval_steps=3)
    state = run(plan, evaluate=lambda step: {"eval_loss": losses[step]}, evaluate_first=True, eval_size=2).state
    assert (state.best_metric, state.best_model_checkpoint) == (losses[best], f"checkpoint-{best}")
    told = "best model: step 0, untrained; eval_loss never improved (2 questions)" in caplog.messages
    assert told == (best == 0) == torch.equal(weight_in(Path(plan.output_dir)), Regression().linear.weight)


@pytest.mark.parametrize(("strategy", "steps"), [("steps", [2, 4, 6]), ("epoch", [4, 6]), ("no", [6])])
def test_evaluation_keeps_its_strategy_and_train_mode(flags: LoopArguments, strategy: str, steps: list[int]) -> None:
    objective, evaluated, modes = Regression(), [], []

    def evaluate(step: int) -> dict[str, float]:
        evaluated.append(step)
        return {"eval_loss": 1.0, "mode": objective.eval().training}

    plan = replace(flags, eval_strategy=strategy, eval_steps=2)
    run(plan, objective, evaluate=evaluate, before_step=lambda step: modes.append(objective.training) or {})
    assert evaluated == steps  # an epoch is 4 steps; the last step is always evaluated
    assert modes == [True] * 6


def test_a_loss_that_is_not_finite_stops_with_step_and_examples_and_leaves_the_weights(flags: LoopArguments) -> None:
    objective = Regression()
    batches = make_batches(flags, poison=11)
    step = next(s for s in range(4) if 11 in batches[s][0].indices)
    Path(flags.output_dir).mkdir()
    with pytest.raises(UserError, match=rf"step {step + 1}: the loss is not finite.*11"):
        train(objective, batches, flags)
    assert objective.linear.weight.isfinite().all()


@pytest.mark.parametrize(
    ("width", "batch", "faster", "lora", "rate"),
    [(384, 64, 1, False, 1e-4), (768, 16, 1, False, 2.5e-5), (384, 64, 4, False, 4e-4), (384, 64, 1, True, 1e-3)],
)
def test_the_usual_rate_follows_width_batch_objective_and_adapters(
    width: int, batch: int, faster: int, lora: bool, rate: float, flags: LoopArguments
) -> None:
    with torch.device("meta"):
        objective = nn.Sequential(BertModel(BertConfig(vocab_size=9, hidden_size=width, num_hidden_layers=1)))
    objective.faster = faster
    plan = replace(flags, per_device_train_batch_size=batch // 4, gradient_accumulation_steps=4, use_lora=lora)
    assert usual_learning_rate(objective, plan) == pytest.approx(rate)


@pytest.mark.parametrize(
    ("kind", "shares"),
    [("linear", [1 / 3, 2 / 3, 1, 2 / 3, 1 / 3, 0]), ("cosine", [1 / 3, 2 / 3, 1, 3 / 4, 1 / 4, 0]),
     ("constant_with_warmup", [1 / 3, 2 / 3, 1, 1, 1, 1]), ("constant", [1] * 6)],
)  # fmt: skip
def test_the_rate_of_the_next_step_is_logged_and_the_warm_up_is_a_share_of_the_steps(
    kind: str, shares: list[float], flags: LoopArguments
) -> None:
    history = run(replace(flags, lr_scheduler_type=kind, warmup_ratio=0.5, logging_steps=1)).state.log_history
    assert [entry["learning_rate"] for entry in history] == pytest.approx([0.05 * share for share in shares])


def test_an_overflow_of_fp16_moves_neither_weights_nor_the_schedule_and_is_logged_as_null(flags: LoopArguments) -> None:
    module = nn.Linear(2, 1)
    ours, resumed = (Optimization(module, replace(flags, fp16=True), 6) for _ in range(2))
    before = module.weight.clone()
    for largest, skipped in ((math.inf, 1), (1.0, 1)):
        loss = module(torch.tensor([[1.0, largest]])).sum()
        ours.scaler.scale(loss).backward()
        norm = float(ours.clip())
        ours.step(skipped, norm)
        assert math.isfinite(norm) == math.isfinite(largest)
        assert torch.equal(module.weight, before) == math.isinf(largest)
        assert ours.learning_rates(3)[0] == pytest.approx(0.05 * 4 / 6)
    resumed.load_state_dict(ours.state_dict())
    assert resumed.learning_rates(3) == ours.learning_rates(3)
    directory = Path(flags.output_dir)
    directory.mkdir()
    Journal(RunState(step=1), 6, flags).record({"loss": 1.0, "grad_norm": math.inf})
    line = json.loads((directory / "log.jsonl").read_text(), parse_constant=pytest.fail)
    assert read_state(directory).log_history == [line] == [{"step": 1, "loss": 1.0, "grad_norm": None}]


def test_cuda_multiplies_float32_fast_in_training_alone_and_deterministically_if_asked(
    flags: LoopArguments, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Spy(Regression):
        def forward(self, batch: Batch) -> tuple[Tensor, dict[str, float]]:
            seen.add((torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled()))
            return super().forward(batch)

    seen: set[tuple[str, bool]] = set()
    for name in ("CUBLAS_WORKSPACE_CONFIG", "FLASH_ATTENTION_DETERMINISTIC"):
        monkeypatch.setenv(name, "")  # and so restored
    try:
        distributed.start(deterministic=True)
        run(flags, Spy())
        monkeypatch.setattr(distributed, "device", lambda: torch.device("cuda"))
        with distributed.tf32():
            assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.use_deterministic_algorithms(False)
    assert seen == {("highest", True)}  # on this CPU
    assert torch.get_float32_matmul_precision() == "highest"
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


def test_matrices_decay_and_vectors_do_not_and_new_layers_learn_at_their_own_rate(flags: LoopArguments) -> None:
    start = Regression().linear
    plan = replace(flags, max_steps=1, lr_scheduler_type="constant", adam_epsilon=0.0, overwrite_output_dir=True,
                   new_layers="bias$", new_layers_learning_rate=0.2)  # fmt: skip
    plain = run(plan, Regression()).linear
    # Adam's first step is the rate itself, whatever the gradient.
    torch.testing.assert_close((plain.weight - start.weight).abs(), torch.full((1, 4), 0.05))
    torch.testing.assert_close((plain.bias - start.bias).abs(), torch.full((1,), 0.2))
    decayed = run(replace(plan, weight_decay=0.5), Regression())
    torch.testing.assert_close(decayed.linear.weight, plain.weight - 0.05 * 0.5 * start.weight)
    assert torch.equal(decayed.linear.bias, plain.bias)
    with pytest.raises(UserError, match="--new_layers crossattention: matches no trained parameter"):
        run(replace(plan, new_layers="crossattention"))


def test_every_log_line_is_the_mean_since_the_last_and_every_event_an_entry_of_its_own(flags: LoopArguments) -> None:
    def before_step(step: int) -> dict[str, float]:
        return {"index_staleness": float(step), **({"index_refreshed": 1.0} if step == 4 else {})}

    every, some = (
        run(replace(flags, logging_steps=n, overwrite_output_dir=True), before_step=before_step).state.log_history
        for n in (1, 3)
    )
    assert [(e["step"], e["index_refreshed"]) for e in some if "index_refreshed" in e] == [(4, 1.0)]
    lines = [json.loads(line) for line in (Path(flags.output_dir) / "log.jsonl").read_text().splitlines()]
    assert lines == some
    assert lines[2] == {"step": 4, "index_refreshed": 1.0}
    means = [entry for entry in some if "loss" in entry]
    assert [(entry["step"], entry["index_staleness"]) for entry in means] == [(1, 0), (3, 1.5), (6, 4)]
    losses = [entry["loss"] for entry in every if "loss" in entry]
    assert means[2]["loss"] == pytest.approx(sum(losses[3:]) / 3)
    assert means[0]["answer"] == 42.0


def test_tokens_a_second_are_those_of_the_steps_alone(flags: LoopArguments, monkeypatch: pytest.MonkeyPatch) -> None:
    """An evaluation between two log lines takes time, and neither its time nor its end hides that of the steps."""
    now = [0.0]
    monkeypatch.setattr(journal, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def pass_by(seconds: float) -> dict[str, float]:
        now[0] += seconds
        return {}

    plan = replace(flags, logging_steps=3, eval_steps=2)
    evaluate = {"evaluate": lambda step: {"eval_loss": 1.0, **pass_by(1000)}}
    state = run(plan, before_step=lambda step: pass_by(2), **evaluate).state
    rates = [entry["tokens_per_second"] for entry in state.log_history if "tokens_per_second" in entry]
    assert rates == [4 / 2] * 3


def test_batches_made_ahead_are_the_same_batches_one_step_early(flags: LoopArguments) -> None:
    ours, theirs = (run(replace(flags, overwrite_output_dir=True), ahead=ahead) for ahead in (False, True))
    assert same_weights(ours, theirs)
    made: list[int] = []
    batches = Batches(16, lambda indices: made.append(1) or indices, flags, ahead=True)
    for number, _ in enumerate(batches.since(2), start=1):
        while len(made) < min(number + 1, 4):
            time.sleep(0.001)
        assert len(made) == min(number + 1, 4)  # that of the next of four steps, too


def test_before_step_comes_before_the_batch_is_made(flags: LoopArguments) -> None:
    made, batch = [], Batch(torch.ones(4, 4), torch.ones(4), (0, 1, 2, 3))
    batches = Batches(16, lambda indices: made.append("batch") or batch, flags)
    Path(flags.output_dir).mkdir()
    train(Regression(), batches, flags, lambda step: made.append(f"before {step}") or {})
    assert made == [event for step in range(6) for event in (f"before {step}", "batch")]


class Small(PreTrainedModel):
    """What `transformers` caches about a class must not be cached about them all."""


class InModel(Regression):
    """The same within a model of `transformers`, which is what bf16 lowers."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__(dropout)
        self.model = Small(PreTrainedConfig())
        self.model.linear, self.model.frozen = self._modules.pop("linear"), nn.Linear(4, 1).requires_grad_(False)
        self.dtypes: set[torch.dtype] = set()

    @property
    def linear(self) -> nn.Linear:
        return self.model.linear

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        self.dtypes |= {weight.dtype for weight in self.parameters()}
        return super().forward(replace(batch, rows=batch.rows.to(self.linear.weight.dtype)))


def test_bf16_lowers_models_where_the_hardware_has_it_and_updates_float32_weights(
    flags: LoopArguments, has_bf16: Callable[[bool], None]
) -> None:
    plan = replace(flags, bf16=True, max_steps=2, lr_scheduler_type="constant", max_grad_norm=0.0, learning_rate=1e-3)
    with pytest.raises(UserError, match="conflicts with --fp16"):
        run(replace(flags, bf16=True, fp16=True))
    has_bf16(False)
    wide = run(plan, InModel())
    assert wide.dtypes == {torch.float32}
    has_bf16(True)
    ours = run(replace(plan, overwrite_output_dir=True, gradient_accumulation_steps=2), InModel())
    assert ours.dtypes == {torch.bfloat16}
    saved = load_file(Path(plan.output_dir) / "w.safetensors")
    reference = InModel()
    assert torch.equal(saved["model.frozen.weight"], reference.model.frozen.weight)
    optimizer = torch.optim.AdamW(reference.linear.parameters(), lr=1e-3, weight_decay=0.0, fused=True)
    for step in range(2):
        low = InModel().bfloat16()
        for master, weight in zip(reference.linear.parameters(), low.linear.parameters(), strict=True):
            weight.data, master.grad = master.data.bfloat16(), torch.zeros_like(master)
        batches = make_batches(replace(plan, gradient_accumulation_steps=2))[step]
        for batch in batches:
            low.zero_grad()
            (low(batch)[0] / sum(each.weight for each in batches)).backward()
            for master, weight in zip(reference.linear.parameters(), low.linear.parameters(), strict=True):
                master.grad += weight.grad.float()
        optimizer.step()
    for name, weight in reference.linear.named_parameters():
        assert saved[f"model.linear.{name}"].dtype == torch.float32
        assert torch.equal(saved[f"model.linear.{name}"], weight)
        assert torch.equal(ours.linear.get_parameter(name), weight.bfloat16())


class Wide(Regression):
    """Two layers without biases; the first is large enough for moments of 8 bits."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__(dropout=0.1)
        self.linear = nn.Sequential(nn.Linear(4, 1024, bias=False), nn.Linear(1024, 1, bias=False)).to(dtype)

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        return super().forward(replace(batch, rows=batch.rows.to(self.linear[0].weight.dtype)))


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torchao compiles its step with a C++ compiler")
def test_moments_of_8_bits_over_bf16_weights_learn_as_float32_does_and_resume_to_the_very_weights(
    flags: LoopArguments, tmp_path: Path
) -> None:
    pytest.importorskip("torchao", reason="an optional package")
    plan = replace(flags, max_steps=40, save_steps=20, logging_steps=10, learning_rate=2e-3)
    theirs = run(replace(plan, output_dir=str(tmp_path / "float32")), Wide(torch.float32)).state.log_history
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    plan = replace(plan, optim="adamw_8bit", bf16=True)
    whole = run(replace(plan, output_dir=str(tmp_path / "whole")), Wide())
    losses = [[entry["loss"] for entry in history] for history in (whole.state.log_history, theirs)]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)
    assert losses[0][-1] < losses[0][0] / 3
    half = shutil.copytree(tmp_path / "whole" / "checkpoint-20", Path(plan.output_dir) / "checkpoint-20")
    moments = torch.load(half / "training_state.pt", weights_only=True)["optimization"]["optimizer"]["linear.0.weight"]
    assert moments["exp_avg"].codes.dtype == torch.uint8
    assert same_weights(run(replace(plan, resume_from_checkpoint="true"), Wide()), whole)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= graphs + 2  # nothing is compiled at each step
    with pytest.raises(UserError, match="saved with --optim adamw_8bit"):
        run(replace(plan, optim="adamw", resume_from_checkpoint=str(half)), Wide())


def test_8_bits_without_torchao_name_what_to_install(flags: LoopArguments, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(UserError, match=r'torchao is not installed; pip install "rqa\[8bit\]"'):
        replace(flags, optim="adamw_8bit", bf16=True)


def test_trackers_get_project_group_settings_and_metrics(flags: LoopArguments, monkeypatch: pytest.MonkeyPatch) -> None:
    def track(kind: str, metrics: dict[str, float], step: int) -> None:
        start_tracker(replace(flags, report_to=kind, run_project="project", run_group="group"))(metrics, step)

    calls: list[object] = []
    tracker = SimpleNamespace(init=lambda **given: calls.append(given), log=lambda *it, step: calls.append((*it, step)))
    monkeypatch.setitem(sys.modules, "trackio", tracker)
    track("trackio", {"loss": 0.5}, 7)
    assert calls[0].pop("config")["seed"] == 42
    assert calls == [{"project": "project", "group": "group", "name": "run"}, ({"loss": 0.5}, 7)]
    calls.clear()
    writer = SimpleNamespace(add_scalar=lambda *scalar: calls.append(scalar))
    module = SimpleNamespace(SummaryWriter=lambda directory: calls.append(directory) or writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    track("tensorboard", {"loss": 0.5, "norm": 2.0}, 3)
    assert calls == [flags.output_dir, ("loss", 0.5, 3), ("norm", 2.0, 3)]
