"""Trackers receive the names and steps of the history. Each is an optional package; a stand-in records its calls."""

import sys
from types import SimpleNamespace
from typing import Any

import pytest

from rqa.runtime.errors import UserError
from rqa.training.arguments import LoopArguments
from rqa.training.journal import start_tracker


def flags(kind: str) -> LoopArguments:
    return LoopArguments(output_dir="out/run-1", report_to=kind, run_project="project", run_group="group")


def test_trackers_get_project_group_settings_and_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    tracker = SimpleNamespace(init=lambda **given: calls.append(given), log=lambda *it, step: calls.append((*it, step)))
    monkeypatch.setitem(sys.modules, "trackio", tracker)
    start_tracker(flags("trackio"))({"loss": 0.5}, 7)
    assert calls[0].pop("config")["seed"] == 42
    assert calls == [{"project": "project", "group": "group", "name": "run-1"}, ({"loss": 0.5}, 7)]
    calls.clear()
    writer = SimpleNamespace(add_scalar=lambda *scalar: calls.append(scalar))
    module = SimpleNamespace(SummaryWriter=lambda directory: calls.append(directory) or writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    start_tracker(flags("tensorboard"))({"loss": 0.5, "norm": 2.0}, 3)
    assert calls == ["out/run-1", ("loss", 0.5, 3), ("norm", 2.0, 3)]


def test_none_tracks_nothing_and_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert start_tracker(flags("none"))({"loss": 0.5}, 1) is None
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(UserError, match="--report_to trackio: the package is not installed"):
        start_tracker(flags("trackio"))
