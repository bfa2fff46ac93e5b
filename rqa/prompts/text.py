"""Templates, and cutting text to a number of tokens."""

import re
from bisect import bisect_right
from collections.abc import Callable, Sized
from pathlib import Path
from typing import TypeVar

from rqa.data.examples import Example
from rqa.runtime.errors import UserError

Prompt = TypeVar("Prompt", bound=Sized)

LONGEST_WORD = 40  # characters taken back to cut at a word's end; text without spaces is cut where it is


class DoesNotFit(UserError):
    """Question and answer alone are longer than the sequence may be."""


def retrieval_query(example: Example) -> str:
    """The text that a retriever is asked with: what was said before, then the question."""
    return "\n".join([*(turn.message for turn in example.chat_history), example.question])


def fill(template: str, fields: dict[str, str]) -> str:
    """The template with its placeholders replaced in one pass: a passage may hold braces."""
    return re.sub(rf"\{{({'|'.join(fields)})\}}", lambda match: fields[match[1]], template)


def read_template(path: str | None, default: str) -> str:
    """The template at `path`, or the default, whose placeholders it must have.

    Raises:
        UserError: the file cannot be read or lacks a placeholder.
    """
    if path is None:
        return default
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompt_template {path}: cannot be read ({error})") from None
    for name in re.findall(r"\{(\w+)\}", default):
        if f"{{{name}}}" not in text:
            raise UserError(f"--prompt_template {path}: the placeholder {{{name}}} is missing")
    return text.rstrip("\n")


def longest_that_fits(render: Callable[[int | None], Prompt], longest: int, budget: int) -> Prompt:
    """The prompt with passages cut to as many characters as the budget of tokens allows.

    Args:
        render: Characters of a passage at most, or None -> a prompt, whose length is its tokens.
        longest: Characters of the longest passage.
    """
    prompt = render(None)
    if len(prompt) > budget:
        # Token counts are only nearly monotone in the cut, hence the walk down at the end.
        cap = max(bisect_right(range(longest), budget, key=lambda cap: len(render(cap))) - 1, 0)
        while len(prompt := render(cap)) > budget and cap:
            cap -= 1
    return prompt


def cut(text: str, cap: int | None) -> str:
    """At most `cap` characters, ending at a word's end."""
    if cap is None or len(text) <= cap:
        return text
    end = re.search(rf"\s\S{{0,{LONGEST_WORD}}}$", text[: cap + 1])
    return text[: end.start() if end else cap].rstrip()
