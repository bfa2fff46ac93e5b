"""The flags of every executable: dataclasses filled from the command line, refusals in one line, and `-h`."""

import argparse
import difflib
import inspect
import json
import sys
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, NoReturn

from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool

from rqa.runtime.errors import UserError

TAKES = {int: "N", float: "X", str: "TEXT", string_to_bool: "true|false"}
MOST_CHOICES = 5  # that stand beside a flag
REFUSED = {
    "deepspeed": "rqa shards with PyTorch's own FSDP2; use --fsdp full_shard",
    "load_in_4bit": "QLoRA needs bitsandbytes, which rqa does without; use --use_lora true --bf16 true",
}


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """One name a flag, what kind of value it takes, and its default unless the words tell it."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if action.nargs == 0:
            return ", ".join(action.option_strings)
        takes = TAKES.get(action.type, "TEXT")
        if action.choices and len(action.choices) <= MOST_CHOICES:
            takes = "|".join(action.choices)
        return f"{action.option_strings[0]} {takes}" + (" ..." if action.nargs == "+" else "")

    def _split_lines(self, text: str, width: int) -> list[str]:
        lines = textwrap.wrap(text.replace("(default: ", "(default:\0"), width, break_on_hyphens=False)
        return [line.replace("\0", " ") for line in lines]

    def _get_help_string(self, action: argparse.Action) -> str:
        if action.required:
            return f"{action.help} (required)"
        if action.choices and len(action.choices) > MOST_CHOICES:
            return f"{action.help} One of {', '.join(action.choices)}."
        if action.default in (None, "", [], argparse.SUPPRESS):
            return action.help or ""
        values = action.default if isinstance(action.default, list) else [action.default]
        shown = " ".join(str(value).lower() if isinstance(value, bool) else str(value) for value in values)
        shown = shown.replace("\n", "\\n").replace("%", "%%")
        return f"{action.help} (default: {shown})"


def flag_groups(kinds: Iterable[type]) -> Iterator[tuple[str, list[str]]]:
    """The first line of each dataclass's docstring, and its flags; those it inherits stand with who brought them."""
    for kind in kinds:
        owners = {field.name: _owner(kind, field.name) for field in fields(kind)}
        for owner in kind.__mro__:
            if names := [name for name, its_owner in owners.items() if its_owner is owner]:
                yield (owner.__doc__ or owner.__name__).splitlines()[0].rstrip("."), names


def _owner(kind: type, name: str) -> type:
    """The class that declared a field first."""
    return [base for base in kind.__mro__ if name in inspect.get_annotations(base)][-1]


class _Parser(HfArgumentParser):
    """One line for what is wrong; help with the examples first, and the flags in the groups they are declared in."""

    def format_help(self) -> str:
        formatter = self._get_formatter()
        formatter.add_text(self.description)
        actions = {action.dest: action for action in reversed(self._actions)}  # one of --x and --no_x
        for title, names in flag_groups(self.dataclass_types):
            formatter.start_section(title)
            formatter.add_arguments([actions[name] for name in names])
            formatter.end_section()
        return formatter.format_help()

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {Path(sys.argv[0]).name} -h")


def parse(kinds: tuple[type, ...], description: str, arguments: list[str] | None = None) -> tuple[Any, ...]:
    """Dataclasses filled from the command line, or from a single `.json` file.

    Args:
        kinds: The dataclasses; their fields are the flags.
        description: What the executable does, for `-h`.
        arguments: The command line; by default the process's.

    Raises:
        UserError: an unknown flag, a bad value or a missing one.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = _Parser(kinds, description=description, allow_abbrev=False, formatter_class=HelpFormatter)
    if len(arguments) == 1 and arguments[0].endswith(".json"):
        arguments = _from_json(arguments[0], kinds)
    known = {field.name for kind in kinds for field in fields(kind)} | {"evaluation_strategy"}
    for argument in arguments:
        name = argument[2:].partition("=")[0]
        if argument.startswith("--") and name and name not in known | {"help"}:
            if name in REFUSED:
                raise UserError(f"--{name}: {REFUSED[name]}")
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            raise UserError(f"--{name}: unknown flag" + (f"; did you mean --{near[0]}?" if near else ""))
    try:
        return parser.parse_args_into_dataclasses(arguments)
    except ValueError as error:  # what belongs to no flag
        raise UserError(f"{error}; see {Path(sys.argv[0]).name} -h") from None


def given(arguments: Iterable[Any]) -> dict[str, Any]:
    """What `all_args.json` holds: every flag's value by name, of all dataclasses; API keys are left out."""
    values = {name: value for part in arguments for name, value in asdict(part).items()}
    return {name: value for name, value in values.items() if not name.endswith("api_key")}


def _from_json(path: str, kinds: tuple[type, ...]) -> list[str]:
    """A JSON object of flags as a command line."""
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a readable JSON file ({error})") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected an object of flags, found {type(values).__name__}")
    line: list[str] = []
    for name, value in values.items():
        if value is not None:
            parts = value if isinstance(value, list) else [value]
            if not all(isinstance(part, str | int | float) for part in parts):
                raise UserError(f"{path}: '{name}' must be a string, a number, true, false, or a list of those")
            line += [f"--{name}", *(str(part).lower() if isinstance(part, bool) else str(part) for part in parts)]
    return line
