"""Flags of the executables: dataclasses filled from the command line, one-line errors, and `-h`."""

import argparse
import copy
import difflib
import logging
import os
import re
import sys
from dataclasses import MISSING, Field, asdict, dataclass, field, fields
from functools import partial
from glob import escape, glob
from inspect import get_annotations
from math import inf
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_type_hints

from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool

from rqa.runtime.cli import as_word
from rqa.runtime.errors import UserError, without_credentials
from rqa.runtime.files import read_json

log = logging.getLogger(__name__)

Flags = TypeVar("Flags", bound="Arguments")

RESULTS = ("score*.json", "*_args.json", "*-predictions.jsonl", "*.trec", "report.html", "log.jsonl")  # a run's files
METAVARS = {int: "N", float: "X", str: "TEXT", string_to_bool: "true|false"}
ALSO = {  # other names that LocalRQA has for flags of several executables
    "embedding_model": ["--embedding_model_name_or_path", "--eval_embedding_model"],
    "document_path": ["--full_dataset_file_path"],
    "index_path": ["--full_dataset_index_path"],
}
REFUSED = {
    "deepspeed": "not supported; rqa shards with PyTorch's FSDP2: use --fsdp full_shard",
    "load_in_4bit": "not supported, as it needs bitsandbytes; use --use_lora true --bf16 true",
    "eval_on_start": "was removed; a retriever is always evaluated before its first step",
}


def flag(
    default: Any = MISSING, help: str = "", choices: list[str] | None = None,
    also: str = "",  # aliases on the command line, separated by spaces
    rare: bool = False,  # shown by `-h full` only
    secret: bool = False,  # left out of the dataclass's `repr`
) -> Any:  # fmt: skip
    """A dataclass field that is a flag; without a default it is required."""
    metadata: dict[str, Any] = {"help": help, "aliases": [f"--{name}" for name in also.split()], "rare": rare}
    metadata |= {"choices": choices} if choices else {}
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata, repr=not secret)


def aliases(member: Field[Any]) -> list[str]:
    """All other names of a flag."""
    return [*member.metadata["aliases"], *ALSO.get(member.name, [])]


@dataclass(kw_only=True)
class Arguments:
    """Base class of all flags. Each class's `check` raises a UserError for values that its flags must not have."""

    def __post_init__(self) -> None:
        for kind in reversed(type(self).__mro__):
            if "check" in vars(kind):
                kind.check(self)

    def check_bounds(
        self, *names: str, at_least: float = -inf, above: float = -inf, at_most: float = inf, below: float = inf
    ) -> None:
        """Refuse numbers, or lists of them, outside these bounds; None, a flag that is not given, is accepted."""
        bounds = {"at least": at_least, "above": above, "at most": at_most, "less than": below}
        wanted = " and ".join(f"{word} {bound}" for word, bound in bounds.items() if abs(bound) < inf)
        for name in names:
            given = getattr(self, name)
            for value in given if isinstance(given, list) else [given]:
                if value is not None and not (at_least <= value <= at_most and above < value < below):
                    raise UserError(f"--{name} {value}: must be {wanted}")

    def refuse_input_as(self, output: str, patterns: tuple[str, ...] = ("",)) -> None:
        """Refuse an output path that is an input of this run, or a directory where a file of these names is one."""
        place = escape(os.path.realpath(getattr(self, output)))
        written = {os.path.realpath(path) for pattern in patterns for path in glob(str(Path(place, pattern)))}
        for name, value in vars(self).items():
            is_input = name != output and name.endswith(("_file", "_path", "_model", "_template", "reranker"))
            for given in (value if isinstance(value, list) else [value]) if is_input else ():
                if (path := os.path.realpath(re.sub("^(bert|reranker)::", "", str(given)))) in written:
                    raise UserError(f"--{output}: would overwrite {path}, which --{name} reads; name another")

    def ignore(self, name: str, why: str) -> None:
        """Reset a flag that has no effect here to its default, and log that: all trainers accept the same flags."""
        default = getattr(type(self), name)
        if getattr(self, name) != default:
            log.info("--%s has no effect here: %s", name, why)
            setattr(self, name, default)

    def to_json(self) -> dict[str, Any]:
        """Values of all flags by name, for `all_args.json`, without API keys and passwords in URLs."""
        values = {name: value for name, value in asdict(self).items() if not name.endswith("api_key")}
        return {name: without_credentials(v) if isinstance(v, str) else v for name, v in values.items()}


def parse(kind: type[Flags], description: str, line: list[str] | None = None) -> Flags:
    """Parse a command line, by default the process's; its only word may be a `.json` file of flags."""
    line = sys.argv[1:] if line is None else line
    if len(line) == 1 and line[0].endswith(".json"):
        line = _from_json(line[0])
    parser = _Parser(kind, description, full=line[1:2] == ["full"])
    known = {name[2:] for name in parser._option_string_actions if name.startswith("--")}
    for part in line:
        name = part[2:].partition("=")[0]
        if part.startswith("--") and name and name not in known and " " not in name:  # with a space it is a value
            if name in REFUSED:
                raise UserError(f"--{name}: {REFUSED[name]}")
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            raise UserError(f"--{name}: unknown flag" + (f"; did you mean --{near[0]}?" if near else ""))
    flags, stray = parser.parse_args_into_dataclasses(line, return_remaining_strings=True, look_for_args_file=False)
    if stray:
        parser.error(f"{stray[0]}: does not belong to a flag")
    return flags


class _Parser(HfArgumentParser):
    """A parser that groups flags by the class that first declared them, and raises one-line errors."""

    def __init__(self, kind: type[Arguments], description: str, full: bool) -> None:
        self.full = full
        epilog, formatter = "" if full else "`-h full` shows all flags.", partial(_Help, max_help_position=32)
        about = {"description": description, "epilog": epilog, "usage": argparse.SUPPRESS}
        super().__init__(kind, **about, formatter_class=formatter, allow_abbrev=False)
        self._actions[0].help = argparse.SUPPRESS  # -h

    def _add_dataclass_arguments(self, dtype: Any) -> None:
        hints, titles = get_type_hints(dtype), {}
        for kind in dtype.__mro__:  # base classes come last: the first to declare a flag wins
            titles |= {name: (kind.__doc__ or "").splitlines()[0].rstrip(".") for name in get_annotations(kind)}
        groups = {title: self.add_argument_group(title) for title in dict.fromkeys(titles.values())}
        for member in map(copy.copy, fields(dtype)):
            metadata = dict(member.metadata)
            if metadata.pop("rare") and not self.full:
                metadata["help"] = argparse.SUPPRESS
            metadata["aliases"] = aliases(member)
            member.metadata, member.type = metadata, hints[member.name]
            self._parse_dataclass_field(groups[titles[member.name]], member)
            if self._actions[-1].nargs == 0:  # --no_x, which transformers adds for an x that is true by default
                self._actions[-1].help = argparse.SUPPRESS

    def error(self, message: str) -> NoReturn:
        message = re.sub(r"^argument (--\w+)\S*: ", r"\1: ", message)  # keeps one of the flag's names
        raise UserError(f"{message}; see {Path(sys.argv[0]).name} -h")


class _Help(argparse.RawDescriptionHelpFormatter):
    """Help that shows each flag's main name, the kind of its value, and its default."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        metavar = "|".join(action.choices or ()) or METAVARS.get(action.type, "TEXT")  # type: ignore[arg-type]
        return f"{action.option_strings[0]} {metavar}" + (" ..." if action.nargs == "+" else "")

    def _get_help_string(self, action: argparse.Action) -> str:
        values = action.default if isinstance(action.default, list) else [action.default]
        if action.required:
            return f"{action.help} (required)"
        if "default:" in (action.help or "").lower() or values in ([], [None], [""], [argparse.SUPPRESS]):
            return action.help or ""
        return f"{action.help} (default: {' '.join(map(as_word, values))})".replace("\n", "\\n").replace("%", "%%")


def _from_json(path: str) -> list[str]:
    line: list[str] = []
    for name, value in read_json(path).items():
        parts = value if isinstance(value, list) else [value]
        if not all(part is None or (isinstance(part, str | int | float) and "\0" not in str(part)) for part in parts):
            raise UserError(f"{path}: '{name}' must be text without null characters, a number, true, false, or a list")
        words = [as_word(part) for part in parts if part is not None]
        line += [f"--{name}", *words] if words else []
    return line
