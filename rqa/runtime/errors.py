"""Errors of the user, shown as one line with exit status 2 and no traceback."""

import re


class UserError(Exception):
    """A mistake that the user can correct: one line that says where it is, what is wrong and what to do."""

    def __init__(self, message: str) -> None:
        super().__init__(without_credentials(" ".join(message.splitlines())))  # quoted input may have line breaks


def without_credentials(text: str) -> str:
    """The text without user names and passwords in its URLs."""
    return re.sub(r"(?<=://)\S*@", "", text)


def one_line(message: object) -> str:
    """The message of an error or a server, without line breaks, cut after 300 characters."""
    return " ".join(str(message).split())[:300]
