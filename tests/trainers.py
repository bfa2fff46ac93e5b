"""What the tests of executables do with their flags, logs and prompts."""

import json
import runpy
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import MISSING, fields
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from rqa.runtime.flags import Arguments, aliases, parse
from rqa.training.checkpoint import checkpoints

Train = Callable[..., Path]
Flags = Callable[..., dict[str, object]]
Run = Callable[[str, dict[str, object]], int]
BIN = Path(__file__).parents[1] / "bin"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
UNTESTED = {"eval_file": None, "test_file": None}
EXECUTABLES = sorted(path.name for path in BIN.iterdir() if path.is_file())


@cache
def flags_of(name: str) -> tuple[type[Arguments], str]:
    """The class of an executable's flags, and what the executable says of itself."""
    module = runpy.run_path(str(BIN / name), run_name="executable")
    (kind,) = (value for value in module.values() if getattr(value, "__module__", "") == "executable"
               and isinstance(value, type) and issubclass(value, Arguments))  # fmt: skip
    return kind, module["__doc__"]


def required(name: str) -> dict[str, set[str]]:
    """The flags that an executable cannot do without, each with all that the command line calls it."""
    lacks_default = (f for f in fields(flags_of(name)[0]) if f.default is MISSING and f.default_factory is MISSING)
    return {flag.name: {f"--{flag.name}", *aliases(flag)} for flag in lacks_default}


def parsed(name: str, line: list[str]) -> Any:
    """An executable's flags from a command line; a required one that it lacks is "x"."""
    lacking = [f"--{flag}=x" for flag, names in required(name).items() if not names & {*line}]
    return parse(*flags_of(name), [*lacking, *line])


def written(output: Path, name: str) -> Any:
    return json.loads((output / name).read_text())


def history(output: Path, name: str) -> list[float]:
    """A logged value, by step."""
    return [entry[name] for entry in written(output, "trainer_state.json")["log_history"] if name in entry]


def scores(output: Path) -> dict[str, float]:
    return written(output, "score.json")


def calls(monkeypatch: pytest.MonkeyPatch, kind: type, method: str) -> list[tuple[Any, ...]]:
    """The arguments of a method's calls from now on."""
    seen: list[tuple[Any, ...]] = []
    original = getattr(kind, method)
    monkeypatch.setattr(kind, method, lambda self, *given: seen.append(given) or original(self, *given))
    return seen


def wait_for_checkpoint(output: Path, seen: Sequence[Path] = ()) -> None:
    end = time.monotonic() + 90  # seconds, on a busy machine
    while checkpoints(output) == [*seen]:
        assert time.monotonic() < end, "no checkpoint"
        time.sleep(0.1)
