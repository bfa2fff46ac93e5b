"""Checkpoints: the model in its own layout, and beside it all that the next step depends on."""

import logging
import random
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from safetensors import SafetensorError

from rqa.runtime import distributed
from rqa.runtime.errors import UserError, one_line
from rqa.runtime.files import (
    COMPLETION_MARK,
    atomic_directory,
    atomic_file,
    damage,
    is_complete,
    remove_leftovers,
    write_json,
)
from rqa.runtime.parallelize import whole_weights
from rqa.training.arguments import LoopArguments
from rqa.training.journal import STATE_FILE, RunState, continues, saved_state
from rqa.training.optim import Optimization


def random_state() -> dict[str, Any]:
    """The generators of this process: torch's, its device's, Python's."""
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return {"torch": torch.get_rng_state(), "cuda": cuda, "python": random.getstate()}


def restore_random_state(state: Mapping[str, Any]) -> None:
    """Draw on from where `random_state` was taken."""
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())
    random.setstate(state["python"])


log = logging.getLogger(__name__)

TENSORS_FILE, ARGUMENTS_FILE = "training_state.pt", "all_args.json"
LIVE_STATE = "live_state"
WEIGHTS = ("adapter_*", "model*.safetensors", "*.safetensors.index.json")
NOT_MODEL_FILES = {STATE_FILE, TENSORS_FILE, ARGUMENTS_FILE, LIVE_STATE, COMPLETION_MARK}


@runtime_checkable
class LiveState(Protocol):
    """What steps depend on besides weights and optimizer: an index between two refreshes.

    A `before_step` with these members is saved once for each of its versions, in `output_dir/<version>/`; checkpoints
    refer to that directory by name. It goes with the last checkpoint that refers to it.
    """

    @property
    def version(self) -> str | None:
        """Names what the next step depends on, such as "index-20": another string after each refresh; None: nothing.

        It must match `index-[0-9]+` and be the same on every process.
        """
        ...

    def save(self, directory: Path) -> None:
        """Write that version into a new, empty directory. Only the main process calls this."""
        ...

    def load(self, directory: Path) -> None:
        """Restore what `save` wrote; `version` is then `directory.name`. Every process calls this, before step 0 of
        the resumed run. Anything that it raises stops the run with one line.
        """


def checkpoint_to_resume(arguments: LoopArguments) -> Path | None:
    """The checkpoint that the arguments ask to continue from; None for a new run.

    What a crash left half-written in the output directory is deleted.

    Raises:
        UserError: it does not exist, is incomplete or damaged, or the output directory already holds a run.
    """
    output, wanted = Path(arguments.output_dir), arguments.resume_from_checkpoint or "false"
    anew = wanted.lower() == "false"
    if arguments.overwrite_output_dir or not anew:
        remove_leftovers(output)
    if wanted.lower() == "true":
        return _newest_good(output)
    source = None if anew else _named(wanted)
    if source and continues(source, arguments):
        return source
    if not arguments.overwrite_output_dir and ((output / STATE_FILE).exists() or _all_checkpoints(output)):
        raise UserError(
            f"--output_dir {output}: holds a run already; continue it with --resume_from_checkpoint true, "
            "start afresh with --overwrite_output_dir true, or choose another directory"
        )
    return source


def _named(path: str) -> Path:
    if problem := damage(path):
        raise UserError(
            f"--resume_from_checkpoint {path}: is not a complete checkpoint ({problem}); "
            "true takes the newest good one of output_dir"
        )
    return Path(path)


def _newest_good(output: Path) -> Path | None:
    found = _all_checkpoints(output)
    for path in reversed(found):
        if not (problem := damage(path)):
            return path
        log.warning("%s cannot be used (%s): looking for the one before it", path, problem)
    if found:
        raise UserError(f"{output}: no checkpoint can be used; start afresh with --overwrite_output_dir true alone")
    log.info("%s holds no complete checkpoint: starting from step 0", output)
    return None


def _all_checkpoints(output: Path) -> list[Path]:
    found = [path for path in output.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=_step)


def _step(path: Path) -> int:
    return int(path.name.partition("-")[2])


def checkpoints(output: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return list(filter(is_complete, _all_checkpoints(output)))


def save_checkpoint(
    output: Path, objective: Any, optimization: Optimization, state: RunState, live: LiveState | None = None
) -> None:
    """Write `checkpoint-<step>`, whole or not at all. Every process calls this.

    Raises:
        UserError: the disk is full or cannot be written; on every process, and the checkpoints before it stand.
    """
    generators = distributed.gather([random_state()])
    write_live_state = live.snapshot() if live else None
    path, failure = output / f"checkpoint-{state.step}", None
    tensors = {"optimization": optimization.state_dict(), "random": generators}
    state = saved_state(state)
    with whole_weights(objective):
        if distributed.is_main():
            try:
                with atomic_directory(path) as directory:
                    _write(directory, output, objective, tensors, state, write_live_state)
            except (OSError, RuntimeError, SafetensorError) as error:  # libraries do not agree on a full disk
                failure = f"checkpoint {path}: cannot be written ({one_line(error)}); {_what_stands(output)}"
    if failure := distributed.from_main(failure):
        raise UserError(failure)


def _write(
    directory: Path,
    output: Path,
    objective: Any,
    tensors: dict[str, Any],
    state: RunState,
    write_live_state: Callable[[Path], None] | None,
) -> None:
    objective.save_pretrained(directory)
    torch.save(tensors, directory / TENSORS_FILE)
    write_json(directory / STATE_FILE, asdict(state))
    if (output / ARGUMENTS_FILE).exists():
        shutil.copyfile(output / ARGUMENTS_FILE, directory / ARGUMENTS_FILE)
    if write_live_state:
        (directory / LIVE_STATE).mkdir()
        write_live_state(directory / LIVE_STATE)


def _what_stands(output: Path) -> str:
    found = checkpoints(output)
    return f"make room and continue from {found[-1]}" if found else "make room; no earlier checkpoint exists"


def load_checkpoint(directory: Path, optimization: Optimization, state: RunState, live: LiveState | None) -> None:
    """Restore all but the model's weights, which the caller loaded from the same directory.

    Raises:
        UserError: the files do not fit the model or cannot be read.
    """
    try:
        tensors = torch.load(directory / TENSORS_FILE, map_location="cpu", mmap=True, weights_only=True)
        generators = tensors["random"]
        optimization.load_state_dict(tensors["optimization"], state.step)
        if live and (directory / LIVE_STATE).is_dir():
            live.load(directory / LIVE_STATE)
        if len(generators) == distributed.world_size():
            restore_random_state(generators[distributed.rank()])
    except Exception as error:  # a damaged file raises nearly anything
        raise UserError(f"checkpoint {directory}: cannot be resumed ({one_line(error)})") from None
    log.info("continuing from %s, step %d", directory, state.step)
    if len(generators) != distributed.world_size():
        log.info("%d processes saved it, %d continue: dropout draws anew", len(generators), distributed.world_size())


def delete_old_checkpoints(output: Path, keep: int | None, state: RunState) -> None:
    """Delete all but the newest `keep` checkpoints and the best one; None: keep all.

    Those of later steps than the run's go in any case: they belong to a past that this run does not continue, and
    would be taken for its newest.
    """
    if not distributed.is_main():
        return
    found = _all_checkpoints(output)
    past = [path for path in found if _step(path) <= state.step]
    old = [] if keep is None else past[: max(len(past) - keep, 0)]
    for path in [*old, *found[len(past) :]]:
        if path.name != state.best_model_checkpoint:
            shutil.rmtree(path)


def promote(source: Path, output: Path) -> None:
    """Put a model's files at the top of the output directory, each file whole at any moment.

    Weights of another kind that stand there, whole or adapters, would be loaded beside these and go.
    """
    for pattern in WEIGHTS:
        for path in output.glob(pattern):
            if not (source / path.name).exists():
                path.unlink()
    for path in sorted(source.rglob("*")):
        relative = path.relative_to(source)
        if relative.parts[0] in NOT_MODEL_FILES:
            continue
        if path.is_dir():
            (output / relative).mkdir(exist_ok=True)
        else:
            with atomic_file(output / relative) as temporary:
                shutil.copyfile(path, temporary)
