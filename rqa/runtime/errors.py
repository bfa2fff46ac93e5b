"""What the user did wrong: one line, exit status 2, no traceback."""

import re


class UserError(Exception):
    """A mistake that its reader can mend: one line that says where, what is wrong and what to do."""

    def __init__(self, message: str) -> None:
        super().__init__(without_credentials(" ".join(message.splitlines())))  # what it quotes may hold line breaks


def without_credentials(text: str) -> str:
    """Text whose URLs have no user and no password."""
    return re.sub(r"(?<=://)\S*@", "", text)


def one_line(said: object) -> str:
    """What an error or a server says, without line breaks and not at length."""
    return " ".join(str(said).split())[:300]
