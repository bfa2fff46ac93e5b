"""Trackers: the same metric names to whichever the user chose. Each is an optional package."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rqa.runtime.errors import UserError

Track = Callable[[Mapping[str, float], int], object]


def start_tracker(kind: str, directory: str, project: str, group: str | None, settings: Mapping[str, Any]) -> Track:
    """A function of (metrics, step).

    Args:
        kind: none, tensorboard, wandb or trackio.
        directory: The run's output directory; its name names the run.
        settings: The run's arguments.

    Raises:
        UserError: the tracker's package is not installed.
    """
    if kind == "none":
        return lambda metrics, step: None
    try:
        if kind == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            writer = SummaryWriter(directory)
            return lambda metrics, step: [writer.add_scalar(name, value, step) for name, value in metrics.items()]
        if kind == "wandb":
            import wandb as tracker
        else:
            import trackio as tracker
    except ImportError:
        raise UserError(f'--report_to {kind}: the package is not installed; pip install "rqa[tracking]"') from None
    tracker.init(project=project, group=group, name=Path(directory).name, config=dict(settings))
    return lambda metrics, step: tracker.log(dict(metrics), step=step)
