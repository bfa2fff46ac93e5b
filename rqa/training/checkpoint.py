"""Checkpoints: the model in its own layout, and beside it all that the next step depends on."""

import json
import logging
import os
import pickle
import random
import re
import shutil
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from rqa.runtime import distributed
from rqa.runtime.errors import UserError
from rqa.runtime.files import COMPLETION_MARK, atomic_directory, is_complete, write_json
from rqa.training.arguments import LoopArguments
from rqa.training.optim import Optimization

log = logging.getLogger(__name__)

STATE_FILE, TENSORS_FILE = "trainer_state.json", "training_state.pt"
NOT_MODEL_FILES = {STATE_FILE, TENSORS_FILE, COMPLETION_MARK}


@dataclass
class RunState:
    """How far a run is. Small and readable: `trainer_state.json`.

    Attributes:
        step: Optimizer steps done; with the seed it fixes the next batch.
        log_history: Every log line and evaluation, oldest first.
        best_metric: The best value of the metric that chooses the best model.
        best_model_checkpoint: The name of the checkpoint that reached it, inside the output directory.
        window: Sums since the last log line.
    """

    step: int = 0
    log_history: list[dict[str, float]] = field(default_factory=list)
    best_metric: float | None = None
    best_model_checkpoint: str | None = None
    window: dict[str, float] = field(default_factory=dict)
    interrupted: bool = False


def checkpoint_to_resume(arguments: LoopArguments) -> Path | None:
    """The checkpoint that the arguments ask to continue from; None for a new run.

    Raises:
        UserError: it does not exist or is incomplete, or the output directory already holds a run.
    """
    output, wanted = Path(arguments.output_dir), arguments.resume_from_checkpoint
    if wanted and wanted.lower() != "false":
        if wanted.lower() == "true":
            found = checkpoints(output)
            if not found:
                log.info("%s holds no complete checkpoint: starting from step 0", output)
            return found[-1] if found else None
        if not is_complete(wanted):
            raise UserError(f"--resume_from_checkpoint {wanted}: is not a complete checkpoint")
        return Path(wanted)
    if not arguments.overwrite_output_dir and ((output / STATE_FILE).exists() or checkpoints(output)):
        raise UserError(
            f"--output_dir {output}: holds a run already; continue it with --resume_from_checkpoint true, "
            "start afresh with --overwrite_output_dir true, or choose another directory"
        )
    return None


def checkpoints(output: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    found = [path for path in output.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(filter(is_complete, found), key=lambda path: int(path.name.partition("-")[2]))


def save_checkpoint(output: Path, objective: Any, optimization: Optimization, state: RunState) -> None:
    """Write `checkpoint-<step>`, whole or not at all. Every process calls this."""
    generators = distributed.gather([_random_state()])
    if distributed.is_main():
        with atomic_directory(output / f"checkpoint-{state.step}") as directory:
            objective.save_pretrained(directory)
            torch.save({"optimization": optimization.state_dict(), "random": generators}, directory / TENSORS_FILE)
            write_json(directory / STATE_FILE, asdict(state))
    distributed.barrier()


def load_checkpoint(directory: Path, optimization: Optimization, device: torch.device) -> RunState:
    """Restore all but the model's weights, which the caller loaded from the same directory.

    Raises:
        UserError: the files do not fit the model or cannot be read.
    """
    try:
        state = RunState(**json.loads((directory / STATE_FILE).read_text(encoding="utf-8")))
        tensors = torch.load(directory / TENSORS_FILE, map_location=device, weights_only=True)
        optimization.load_state_dict(tensors["optimization"])
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, pickle.UnpicklingError) as error:
        raise UserError(f"checkpoint {directory}: cannot be resumed ({error})") from None
    generators = tensors["random"]
    if len(generators) == distributed.world_size():
        _restore_random_state(generators[distributed.rank()])
    log.info("continuing from %s, step %d", directory, state.step)
    return replace(state, interrupted=False)


def delete_old_checkpoints(output: Path, keep: int | None, best: str | None = None) -> None:
    """Delete all but the newest `keep` checkpoints and the best one; None: keep all."""
    if keep is None or not distributed.is_main():
        return
    found = checkpoints(output)
    for old in found[: len(found) - keep]:
        if old.name != best:
            shutil.rmtree(old)


def promote(source: Path, output: Path) -> None:
    """Put a model's files at the top of the output directory, each file whole at any moment."""
    for path in sorted(source.rglob("*")):
        relative = path.relative_to(source)
        if path.is_dir():
            (output / relative).mkdir(exist_ok=True)
        elif relative.name not in NOT_MODEL_FILES:
            temporary = output / relative.parent / f".{path.name}.tmp"
            shutil.copyfile(path, temporary)
            os.replace(temporary, output / relative)


def _random_state() -> dict[str, Any]:
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return {"torch": torch.get_rng_state(), "cuda": cuda, "python": random.getstate()}


def _restore_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())
    random.setstate(state["python"])
