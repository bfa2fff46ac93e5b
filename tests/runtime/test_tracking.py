"""Trackers receive the names and steps of the history. Each is an optional package; a stand-in records its calls."""

import sys
from types import SimpleNamespace
from typing import Any

import pytest

from rqa.runtime.errors import UserError
from rqa.training.journal import start_tracker


@pytest.mark.parametrize("kind", ["wandb", "trackio"])
def test_a_tracker_gets_project_group_settings_and_metrics(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    tracker = SimpleNamespace(
        init=lambda **options: calls.append(options), log=lambda metrics, step: calls.append((metrics, step))
    )
    monkeypatch.setitem(sys.modules, kind, tracker)
    start_tracker(kind, "out/run-1", "project", "group", {"seed": 1})({"loss": 0.5}, 7)
    assert calls == [
        {"project": "project", "group": "group", "name": "run-1", "config": {"seed": 1}},
        ({"loss": 0.5}, 7),
    ]


def test_tensorboard_gets_scalars(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    writer = SimpleNamespace(add_scalar=lambda *scalar: calls.append(scalar))
    module = SimpleNamespace(SummaryWriter=lambda directory: calls.append(directory) or writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    start_tracker("tensorboard", "out", "project", None, {})({"loss": 0.5, "norm": 2.0}, 3)
    assert calls == ["out", ("loss", 0.5, 3), ("norm", 2.0, 3)]


def test_none_tracks_nothing_and_a_missing_package_is_named() -> None:
    assert start_tracker("none", "out", "project", None, {})({"loss": 0.5}, 1) is None
    with pytest.raises(UserError, match="--report_to trackio: the package is not installed"):
        start_tracker("trackio", "out", "project", None, {})
