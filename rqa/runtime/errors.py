"""What the user did wrong: one line, exit status 2, no traceback."""

from math import inf
from typing import Any


class UserError(Exception):
    """A mistake that its reader can mend.

    The message is one line that names the file and line, flag or path, says what is wrong and what to do.
    `rqa.runtime.cli.run` prints it and exits with status 2.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.splitlines()))  # what it quotes may hold line breaks


def one_line(said: object) -> str:
    """What an error or a server says, without line breaks and not at length."""
    return " ".join(str(said).split())[:300]


def check_bounds(
    arguments: Any, *names: str, at_least: float = -inf, above: float = -inf, at_most: float = inf, below: float = inf
) -> None:
    """Refuse numbers, or lists of them, outside of bounds; None is not given, and so not refused.

    Args:
        names: Attributes of `arguments`, and flags.

    Raises:
        UserError: names the flag and the bounds.
    """
    bounds = {"at least": at_least, "above": above, "at most": at_most, "less than": below}
    told = " and ".join(f"{word} {bound}" for word, bound in bounds.items() if abs(bound) < inf)
    for name in names:
        given = getattr(arguments, name)
        for value in given if isinstance(given, list) else [given]:
            if value is not None and not (value >= at_least and value > above and value <= at_most and value < below):
                raise UserError(f"--{name} {value}: must be {told}")
