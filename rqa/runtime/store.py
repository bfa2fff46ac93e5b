"""What was expensive to compute, kept by key in a file that runs and processes share."""

import json
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rqa.runtime.errors import UserError

KEYS_PER_QUERY = 500  # SQLite built with its oldest limit takes 999
SECONDS_TO_WAIT = 60  # for another process's transaction


class Store:
    """JSON values by key, in one SQLite file.

    Each `put` is one transaction: it is kept whole or not at all, whatever kills the process. Several processes may
    use one file. The journal is SQLite's default, since its write-ahead log does not work on network file systems.

    Args:
        path: The file; made, with its directory, if absent.

    Raises:
        UserError: from every method too: the file is damaged or cannot be written, or the disk is full.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        with self._one_line_for_errors():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._database = sqlite3.connect(self.path, timeout=SECONDS_TO_WAIT)
            self._database.execute("CREATE TABLE IF NOT EXISTS kept (key TEXT PRIMARY KEY, value TEXT) WITHOUT ROWID")

    def get(self, keys: Iterable[str]) -> dict[str, Any]:
        """The values of those keys that are kept."""
        names = list(keys)
        found: dict[str, Any] = {}
        with self._one_line_for_errors():
            for start in range(0, len(names), KEYS_PER_QUERY):
                part = names[start : start + KEYS_PER_QUERY]
                rows = self._database.execute(
                    f"SELECT key, value FROM kept WHERE key IN ({','.join('?' * len(part))})", part
                )
                found.update((key, json.loads(value)) for key, value in rows)
        return found

    def put(self, values: Mapping[str, Any]) -> None:
        """Keep all these values, or on an error none; a key's older value is replaced."""
        if not values:
            return
        rows = [(key, json.dumps(value)) for key, value in values.items()]
        with self._one_line_for_errors(), self._database:
            self._database.executemany("INSERT OR REPLACE INTO kept VALUES (?, ?)", rows)

    @contextmanager
    def _one_line_for_errors(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError, ValueError) as error:
            raise UserError(
                f"{self.path}: nothing can be kept there ({error}); free its disk, delete the file if it is damaged, "
                "or set another $RQA_CACHE"
            ) from None
