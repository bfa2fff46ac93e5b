"""`-h` of every executable: what it does and its examples, then its flags, each group under its dataclass's words."""

import argparse
import inspect
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import fields

from transformers.hf_argparser import string_to_bool

TAKES = {int: "N", float: "X", str: "TEXT", string_to_bool: "true|false"}
MOST_CHOICES = 5  # that stand beside a flag


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
