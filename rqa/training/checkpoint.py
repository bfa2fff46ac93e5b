"""Checkpoints: the model in its own layout, with all other state that the next step depends on."""

import logging
import random
import re
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from safetensors import SafetensorError

from rqa.runtime import distributed, files
from rqa.runtime.errors import UserError, one_line
from rqa.runtime.parallelize import whole_weights
from rqa.training.arguments import LoopArguments
from rqa.training.journal import STATE_FILE, RunState, continues, read_state
from rqa.training.optim import Optimization

log = logging.getLogger(__name__)

TENSORS_FILE, ARGUMENTS_FILE = "training_state.pt", "all_args.json"
MANIFEST = ".rqa-model.json"  # the model's files at the top of the output directory
WEIGHTS = r"adapter_model\.(safetensors|bin)|(?P<old>pytorch_)?model(-\d+-of-\d+)?\.(?(old)bin|safetensors)"
MODEL_FILE = re.compile(rf"(adapter_|generation_)?config\.json|({WEIGHTS})(\.index\.json)?")  # what libraries load
NOT_MODEL_FILES = {STATE_FILE, TENSORS_FILE, ARGUMENTS_FILE, files.COMPLETION_MARK}


@runtime_checkable
class LiveState(Protocol):
    """State besides weights and optimizer that steps depend on: an index between two refreshes.

    A `before_step` with these members is saved once per version, as `output_dir/<version>/`, to which checkpoints refer
    by name. The directory is deleted with the last checkpoint that refers to it.
    """

    version: str | None  # "index-<number>", new after each refresh, the same in all processes; None: nothing to save

    def collect(self) -> None:
        """Gather on the main process the data that `save` writes. Every process calls this."""

    def save(self, directory: Path) -> None:
        """Write this version into a new, empty directory. Only the main process calls this."""

    def load(self, directory: Path) -> None:
        """Restore a saved version before the first step, so that `version == directory.name`. Every process calls this.

        A version that the present flags cannot use (other documents) may be skipped with a warning; `version` then
        stays None.
        """


def numbered(output: Path, kind: str) -> dict[int, Path]:
    """The directories `<kind>-<number>` of a run by number; a crash may have left one incomplete."""
    matches = {path: re.fullmatch(rf"{kind}-(\d+)", path.name) for path in output.glob(f"{kind}-*")}
    return dict(sorted((int(match[1]), path) for path, match in matches.items() if match))


def checkpoints(output: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return list(filter(files.is_complete, numbered(output, "checkpoint").values()))


def _damage(checkpoint: Path) -> str | None:
    """The problem with a checkpoint, or with the index that it refers to; None if both are complete."""
    if problem := files.damage(checkpoint):
        return problem
    index = read_state(checkpoint).live_state
    problem = files.damage(checkpoint.parent / index) if index else None
    return f"{index}, which it needs: {problem}" if problem else None


def checkpoint_to_resume(flags: LoopArguments) -> Path | None:
    """The checkpoint to continue from, or None for a new run. Deletes half-written files of a crash."""
    output, wanted = Path(flags.output_dir), flags.resume_from_checkpoint or "false"
    files.remove_leftovers(output)
    found = list(numbered(output, "checkpoint").values())
    if wanted.lower() == "true":
        for path in reversed(found):
            if not (problem := _damage(path)):
                return path
            log.warning("%s cannot be used (%s); trying the one before it", path, problem)
        if found:
            raise UserError(f"{output}: no checkpoint can be used; start over with only --overwrite_output_dir true")
        log.info("%s holds no complete checkpoint; starting from step 0", output)
        return None
    source = None if wanted.lower() == "false" else Path(wanted)
    if source and (problem := _damage(source)):
        advice = "give true for the newest complete one in output_dir"
        raise UserError(f"--resume_from_checkpoint {source}: is not a complete checkpoint ({problem}); {advice}")
    holds_a_run = bool(found) or (output / STATE_FILE).exists()
    if holds_a_run and not flags.overwrite_output_dir and not (source and continues(source, flags)):
        raise UserError(
            f"--output_dir {output}: already holds a run; continue it with --resume_from_checkpoint true, "
            "start over with --overwrite_output_dir true, or choose another directory"
        )
    return source


def save_checkpoint(
    output: Path, objective: Any, optimization: Optimization, state: RunState, live: LiveState | None = None
) -> None:
    """Write the live state, if its version is new, then `checkpoint-<step>`, atomically. Every process calls this."""
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    generators = distributed.gather([{"torch": torch.get_rng_state(), "cuda": cuda, "python": random.getstate()}])
    tensors = {"optimization": optimization.state_dict(), "random": generators}
    tensors["measured"] = getattr(objective, "measured", {})  # numbers that were measured on the first batch
    known, state.live_state = state.live_state, live.version if live else None
    index = output / state.live_state if state.live_state else None
    new = distributed.from_main(bool(index) and not (index.name == known and files.is_complete(index)))
    if live and new:
        live.collect()
    path, failure = output / f"checkpoint-{state.step}", None
    with whole_weights(objective), optimization.whole_precision():
        if distributed.is_main():
            try:
                if live and index and new:
                    with files.atomic_directory(index) as directory:
                        live.save(directory)
                with files.atomic_directory(path) as directory:
                    objective.save_pretrained(directory)
                    torch.save(tensors, directory / TENSORS_FILE)
                    files.write_json(directory / STATE_FILE, asdict(state))
                    if (output / ARGUMENTS_FILE).exists():
                        shutil.copyfile(output / ARGUMENTS_FILE, directory / ARGUMENTS_FILE)
            except (OSError, RuntimeError, SafetensorError) as error:  # a full disk raises any of these
                before = checkpoints(output)
                advice = f"continue from {before[-1]}" if before else "start again; no earlier checkpoint exists"
                failure = f"checkpoint {path}: cannot be written ({one_line(error)}); free disk space and {advice}"
    if failure := distributed.from_main(failure):
        raise UserError(failure)


def load_checkpoint(
    directory: Path, objective: Any, optimization: Optimization, state: RunState, live: LiveState | None
) -> None:
    """Restore everything but the model's weights, which the caller has loaded from the same directory."""
    try:
        tensors = torch.load(directory / TENSORS_FILE, map_location="cpu", mmap=True, weights_only=True)
        generators = tensors["random"]
        optimization.load_state_dict(tensors["optimization"])
        for name, value in tensors.get("measured", {}).items():
            objective.measured.setdefault(name, value)  # a flag wins
        if live and state.live_state:
            live.load(directory.parent / state.live_state)
            state.live_state = live.version
        if len(generators) == distributed.world_size():
            mine = generators[distributed.rank()]
            torch.set_rng_state(mine["torch"])
            if mine["cuda"] is not None and torch.cuda.is_available():
                torch.cuda.set_rng_state(mine["cuda"])
            random.setstate(mine["python"])
        else:
            saved, now = len(generators), distributed.world_size()
            log.info("%d processes saved %s, %d continue: dropout masks will differ", saved, directory.name, now)
    except Exception as error:  # a damaged file raises nearly anything
        raise UserError(f"checkpoint {directory}: cannot be resumed ({one_line(error)})") from None
    log.info("continuing from %s, step %d", directory, state.step)


def delete_old_checkpoints(output: Path, keep: int, state: RunState) -> None:
    """Delete all checkpoints but the newest `keep` and the best one, and each index that none of these refers to."""
    if not distributed.is_main():
        return
    found = numbered(output, "checkpoint")
    # Checkpoints of later steps are deleted, too: another resume would take them for the newest of this run.
    kept = [number for number in found if number <= state.step][-keep:] if keep else []
    for number, path in found.items():
        if number not in kept and path.name != state.best_model_checkpoint:
            shutil.rmtree(path)
    states = [path / STATE_FILE for path in numbered(output, "checkpoint").values()]
    references = b"".join(state.read_bytes() for state in states if state.exists())
    for path in numbered(output, "index").values():
        if f'"{path.name}"'.encode() not in references:
            shutil.rmtree(path)


def promote(source: Path, output: Path, whole: bool = True) -> None:
    """Atomically replace the model at the top of the output directory by that in `source`.

    Unless `whole`, `source` has only weights and configuration, and the model's other files stay.
    """
    paths = (path.relative_to(source) for path in source.rglob("*") if path.is_file())
    names = sorted(str(path) for path in paths if path.parts[0] not in NOT_MODEL_FILES)
    names.sort(key=lambda name: name not in ("config.json", "adapter_config.json"))  # nothing loads without it
    try:
        named = map(str, files.read_json(output / MANIFEST, list))
        listed = {name for name in named if files.is_own_file(output, name)}
    except UserError:  # there is no manifest
        listed = {path.name for path in output.glob("*") if MODEL_FILE.fullmatch(path.name) and not path.is_dir()}
    old = {name for name in listed if whole or MODEL_FILE.fullmatch(name)}
    with files.atomic_files(output, [*names, MANIFEST]) as places:
        for name in names:
            shutil.copyfile(source / name, places[name])
        files.write_json(places[MANIFEST], [*names, *(listed - old - set(names))])
        for name in old - set(names):  # leftover weights would be loaded, too
            (output / name).unlink()
